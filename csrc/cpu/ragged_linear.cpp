// ragged_linear and ragged_linear_residual_ on the CPU, and the linear layers of blocks where oneDNN does not serve.
//   a (T, K), weight (N, K) or packed (N / columns, K, columns), bias (N,) or none, cu_seqlens (B + 1,)
//   out (T, N), zeros behind the live rows; or x (R, N), rows (T,) or none (row i), scale none, (N,) or (T, 1)
// T, K, N or R may be 0. Who computes what: panel_layers.cpp.
#include <algorithm>
#include <cstring>
#include <optional>

#include "../checks.h"
#include "memory.h"
#include "ops.h"
#include "panel_layers.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

// A linear layer of a (T, K), and what its task points to.
struct Work {
  Work(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu)
      : layer(checked(a, weight), nullptr), panels(layer), shift(bias_of(a, bias, layer.n)) {
    task.dtype = task.out_dtype = check_dtype("a", a);
    task.a = a.data_ptr();
    task.a_stride = a.stride(0);
    task.k = layer.k;
    task.panels = panels.data;
    task.n = layer.n;
    task.bias = shift.data();
    task.gelu = gelu;
  }

  static const Tensor& checked(const Tensor& a, const Tensor& weight) {
    check_panels(a.size(1), a, weight, std::nullopt);
    return weight;
  }

  static Floats bias_of(const Tensor& a, const std::optional<Tensor>& bias, int64_t n) {
    if (!bias) return {};
    check_length("bias", *bias, n);
    MTVIT_CHECK(same_dtype(*bias, a), "bias must have a's dtype");
    return Floats("bias", *bias);
  }

  const PanelLayer layer;
  const Panels panels;
  const Floats shift;
  LinearTask task{};
};

// The task's first rows into `out` (tokens, N), zeros behind `live`.
Tensor results(LinearTask& t, Tensor out, int64_t live) {
  const int64_t tokens = out.size(0);
  t.out = out.data_ptr();
  t.out_stride = t.n;
  run_linear(t, live);
  const auto row = t.n * static_cast<int64_t>(out.element_size());
  if (row > 0 && live < tokens) std::memset(mutable_data<char>(out) + live * row, 0, (tokens - live) * row);
  return out;
}

// x[rows[i]] += scale * (...) for the first `live` of the `tokens` entries.
void add(LinearTask& t, const Tensor& x, const std::optional<Tensor>& rows, const std::optional<Tensor>& scale,
         int64_t tokens, int64_t live) {
  MTVIT_CHECK(x.size(1) == t.n, "x must have shape (R, ", t.n, "), got ", shape_of(x));
  MTVIT_CHECK(t.n <= 1 || x.stride(1) == 1, "x must be contiguous in its last dimension");
  MTVIT_CHECK(x.size(0) <= 1 || x.stride(0) >= t.n, "rows of x must not overlap");
  Tensor list;
  if (rows) {
    list = int32_vector("rows", *rows);
    MTVIT_CHECK(list.size(0) == tokens, "rows must have shape (", tokens, ",), got ", shape_of(list));
    check_rows(data<int32_t>(list), tokens, x.size(0));
    t.rows = data<int32_t>(list);
  } else {
    MTVIT_CHECK(tokens <= x.size(0), "a must have at most x's ", x.size(0), " rows, got ", tokens);
  }
  Floats factors;
  if (scale) {
    const bool per_column = check_scale(*scale, t.n, tokens);
    factors = Floats("scale", *scale);
    (per_column ? t.column_scale : t.row_scale) = factors.data();
  }
  t.out_dtype = check_dtype("x", x);
  MTVIT_CHECK(t.out_dtype == t.dtype || t.out_dtype == Dtype::f32, "x must be float32 or have a's dtype");
  t.out = x.data_ptr();
  t.out_stride = x.stride(0);
  t.residual = true;
  run_linear(t, live);
}

int64_t live_of(const Tensor& cu_seqlens, int64_t tokens) {
  const Tensor cu = cu_seqlens_vector("cu_seqlens", cu_seqlens);
  check_cu_seqlens("cu_seqlens", data<int32_t>(cu), cu.size(0) - 1, tokens);
  return data<int32_t>(cu)[cu.size(0) - 1];
}

Tensor left(const Tensor& a) {
  check_dim("a", a, 2, "(T, K)");
  return dense_rows(a);
}

Tensor ragged_linear(const Tensor& given, const Tensor& weight, std::optional<Tensor> bias, const Tensor& cu_seqlens,
                     bool gelu) {
  const Tensor a = left(given);
  const int64_t live = live_of(cu_seqlens, a.size(0));
  Work work(a, weight, bias, gelu);
  return results(work.task, empty_as(a, std::array{a.size(0), work.layer.n}), live);
}

void ragged_linear_residual_(Tensor x, std::optional<Tensor> rows, const Tensor& given, const Tensor& weight,
                             std::optional<Tensor> bias, const Tensor& cu_seqlens, std::optional<Tensor> scale) {
  check_dim("x", x, 2, "(R, N)");
  const Tensor a = apart_from(x, left(given));
  const int64_t live = live_of(cu_seqlens, a.size(0));
  if (bias) bias = apart_from(x, *bias);
  if (scale) scale = apart_from(x, *scale);
  Work work(a, weight, bias, false);
  add(work.task, x, rows, scale, a.size(0), live);
}

// linear(layer_norm(x[cu_seqlens[:-1]])), x (R, D); out (B, N). Without offsets each row is an image.
Tensor classify(const Tensor& given, std::optional<Tensor> cu_seqlens, const Tensor& norm_weight,
                const Tensor& norm_bias, double eps, const Tensor& weight, std::optional<Tensor> bias) {
  check_dim("x", given, 2, "(R, D)");
  const Tensor x = dense_rows(given);
  check_layer_norm(x, norm_weight, norm_bias);
  check_panels(x.size(1), x, weight, bias);
  Stream stream(x, std::nullopt, false);
  if (cu_seqlens) {
    stream.list = cu_seqlens_vector("cu_seqlens", *cu_seqlens);
    stream.tokens = stream.list.size(0) - 1;
    stream.rows = data<int32_t>(stream.list);
    check_rows(stream.rows, stream.tokens, stream.num_rows, "cu_seqlens", 0);
  }
  const PanelLayer layer(weight, bias ? &*bias : nullptr);
  Tensor out = empty_as(x, std::array{stream.tokens, layer.n});
  linear_of_norm(stream, PanelNorm(norm_weight, norm_bias, eps), layer, false, out.data_ptr());
  return out;
}

// A weight (N, K), N a multiple of a panel's columns, as the kernels here read it.
Tensor pack_panels(const Tensor& weight) {
  check_dim("weight", weight, 2, "(N, K)");
  check_dtype("weight", weight);
  const int64_t columns = kernels().panel_columns, n = weight.size(0);
  MTVIT_CHECK(n % columns == 0, "weight must have a multiple of ", columns, " rows, got ", shape_of(weight));
  Tensor panels = empty_as(weight, std::array{n / columns, weight.size(1), columns});
  Panels::pack(weight, panels.data_ptr());
  return panels;
}

Tensor linear(const Tensor& a, const Tensor& weight, std::optional<Tensor> bias, bool gelu) {
  return panel_linear(a, weight, bias, gelu);
}

int64_t panel_columns() {
  return kernels().panel_columns;
}

}  // namespace

int64_t check_panels(int64_t k, const Tensor& like, const Tensor& weight, const std::optional<Tensor>& bias) {
  MTVIT_CHECK(weight.is_cpu() && is_strided(weight), "weight must be a CPU tensor, not one packed for oneDNN");
  MTVIT_CHECK(same_dtype(weight, like), "weight must have x's dtype");
  int64_t n = 0;
  if (weight.dim() == 3) {
    const int64_t columns = kernels().panel_columns;
    MTVIT_CHECK(weight.size(1) == k && weight.size(2) == columns && weight.is_contiguous(),
                "a packed weight must have shape (N / ", columns, ", ", k, ", ", columns, "), got ", shape_of(weight));
    n = weight.size(0) * columns;
  } else {
    MTVIT_CHECK(weight.dim() == 2 && weight.size(1) == k, "weight must have shape (out_features, ", k, "), got ",
                shape_of(weight));
    n = weight.size(0);
  }
  if (bias) {
    check_length("bias", *bias, n);
    MTVIT_CHECK(same_dtype(*bias, like), "bias must have x's dtype");
  }
  return n;
}

Tensor panel_linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  const Tensor a = left(given);
  Work work(a, weight, bias, gelu);
  return results(work.task, empty_as(a, std::array{a.size(0), work.layer.n}), a.size(0));
}

void panel_linear_residual_(Tensor x, const std::optional<Tensor>& rows, const Tensor& given, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
  check_dim("x", x, 2, "(R, N)");
  const Tensor a = left(given);
  Work work(a, weight, bias, false);
  work.task.rounds = true;  // as if the linear layer were an operator of its own
  add(work.task, x, rows, std::nullopt, a.size(0), a.size(0));
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("ragged_linear(Tensor a, Tensor weight, Tensor? bias, Tensor cu_seqlens, bool gelu) -> Tensor");
  m.def(
      "ragged_linear_residual_(Tensor(a!) x, Tensor? rows, Tensor a, Tensor weight, Tensor? bias, Tensor cu_seqlens, "
      "Tensor? scale) -> ()");
  m.def("linear(Tensor a, Tensor weight, Tensor? bias, bool gelu) -> Tensor");
  m.def(
      "classify(Tensor x, Tensor? cu_seqlens, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, "
      "Tensor? bias) -> Tensor");
  m.def("pack_panels(Tensor weight) -> Tensor");
  m.def("panel_columns() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("ragged_linear", TORCH_BOX(&mtvit_ops::ragged_linear));
  m.impl("ragged_linear_residual_", TORCH_BOX(&mtvit_ops::ragged_linear_residual_));
  m.impl("linear", TORCH_BOX(&mtvit_ops::linear));
  m.impl("classify", TORCH_BOX(&mtvit_ops::classify));
  m.impl("pack_panels", TORCH_BOX(&mtvit_ops::pack_panels));
}

// to refuse oneDNN's own weights in words
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("linear", TORCH_BOX(&mtvit_ops::linear));
  m.impl("classify", TORCH_BOX(&mtvit_ops::classify));
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CompositeExplicitAutograd, m) {
  m.impl("panel_columns", TORCH_BOX(&mtvit_ops::panel_columns));
}
