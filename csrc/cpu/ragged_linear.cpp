// ragged_linear and ragged_linear_residual_ on the CPU, and the linear layers of blocks where oneDNN does not serve.
//   a (T, K), weight (N, K) or packed (N / columns, K, columns), bias (N,) or none, cu_seqlens (B + 1,)
//   out (T, N), zeros behind the live rows; or x (R, N), rows (T,) or none (row i), scale none, (N,) or (T, 1)
// T, K, N or R may be 0. The work is a list of (block of rows, panel of the weight); each thread takes a run of it and
// writes what nobody else writes. Sums do not depend on the blocks, so that results depend on no thread count.
#include <algorithm>
#include <cstring>
#include <optional>

#include "../checks.h"
#include "memory.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

constexpr int64_t kWorthThreads = 1 << 19;  // multiplications, some 20 microseconds: fewer wake no other thread

int64_t num_panels(int64_t n) {
  return (n + kernels().panel_columns - 1) / kernels().panel_columns;
}

// The weight in panels: the tensor's own memory where it is packed, else a copy.
class Panels {
 public:
  Panels(const Tensor& weight, int64_t k, ScalarType dtype) : n(check_panels(k, dtype, weight, std::nullopt)) {
    const Kernels& native = kernels();
    if (weight.dim() == 3) {
      data = weight.data_ptr();
      return;
    }
    const auto element = static_cast<int64_t>(weight.element_size());
    copy_ = allocate((num_panels(n) * k * native.panel_columns * element + 3) / 4);
    data = copy_.get();
    pack(weight, copy_.get());
  }

  static void pack(const Tensor& weight, void* panels) {
    const Tensor w = dense_rows(weight);
    const Kernels& native = kernels();
    const int64_t n = w.size(0), k = w.size(1);
    const Dtype dtype = check_dtype("weight", w);
    torch::stable::parallel_for(0, num_panels(n), row_grain(k * native.panel_columns), [&](int64_t begin, int64_t end) {
      native.pack_weight(dtype, w.data_ptr(), w.stride(0), n, k, panels, begin, end);
    });
  }

  const int64_t n;
  const void* data;

 private:
  Buffer copy_;
};

// Rows [0, tokens) of the task, by all threads.
void run(const LinearTask& t, int64_t tokens) {
  const int64_t panels = num_panels(t.n);
  if (tokens == 0 || panels == 0) return;
  const Kernels& native = kernels();
  // the left factor of a block stays in the L2 cache: 256 KiB, but enough rows to pay for a panel's way there
  const int64_t fitting = std::clamp<int64_t>(65536 / std::max<int64_t>(t.k, 1), 4 * kMaxRows, kLinearRows);
  const int64_t blocks = (tokens + fitting - 1) / fitting, most = (tokens + blocks - 1) / blocks;
  const bool copies = t.norm_weight != nullptr || t.dtype != Dtype::f32;
  const int64_t unit = most * native.panel_columns * std::max<int64_t>(t.k, 1);
  const int64_t grain = tokens * t.n * t.k < kWorthThreads ? blocks * panels : std::max<int64_t>(32768 / unit, 1);
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    Buffer large;
    float* scratch = thread_scratch(linear_scratch_floats(most, copies ? t.k : 0), large);
    while (begin < end) {
      const int64_t block = begin / panels, first = begin % panels, last = std::min(panels, first + end - begin);
      const int64_t row = block * tokens / blocks, count = (block + 1) * tokens / blocks - row;
      native.linear(t, row, count, first, last, scratch);
      begin += last - first;
    }
  });
}

LinearTask task_of(const Tensor& a, const Panels& panels, const Floats& bias, bool gelu) {
  LinearTask t{};
  t.dtype = t.out_dtype = check_dtype("a", a);
  t.a = a.data_ptr();
  t.a_stride = a.stride(0);
  t.k = a.size(1);
  t.panels = panels.data;
  t.n = panels.n;
  t.bias = bias.data();
  t.gelu = gelu;
  return t;
}

Floats bias_of(const std::optional<Tensor>& bias, int64_t n, ScalarType dtype) {
  if (!bias) return {};
  check_length("bias", *bias, n);
  MTVIT_CHECK(bias->scalar_type() == dtype, "bias must have a's dtype");
  return Floats("bias", *bias);
}

// The task's first rows into `out` (tokens, N), zeros behind `live`.
Tensor results(LinearTask& t, Tensor out, int64_t live) {
  const int64_t tokens = out.size(0);
  t.out = out.data_ptr();
  t.out_stride = t.n;
  run(t, live);
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
  run(t, live);
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
  const Panels panels(weight, a.size(1), a.scalar_type());
  const Floats shift = bias_of(bias, panels.n, a.scalar_type());
  LinearTask t = task_of(a, panels, shift, gelu);
  return results(t, empty_as(a, std::array{a.size(0), t.n}), live);
}

void ragged_linear_residual_(Tensor x, std::optional<Tensor> rows, const Tensor& given, const Tensor& weight,
                             std::optional<Tensor> bias, const Tensor& cu_seqlens, std::optional<Tensor> scale) {
  check_dim("x", x, 2, "(R, N)");
  const Tensor a = apart_from(x, left(given));
  const int64_t live = live_of(cu_seqlens, a.size(0));
  const Panels panels(weight, a.size(1), a.scalar_type());
  if (bias) bias = apart_from(x, *bias);
  if (scale) scale = apart_from(x, *scale);
  const Floats shift = bias_of(bias, panels.n, a.scalar_type());
  LinearTask t = task_of(a, panels, shift, false);
  add(t, x, rows, scale, a.size(0), live);
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

int64_t check_panels(int64_t k, ScalarType dtype, const Tensor& weight, const std::optional<Tensor>& bias) {
  MTVIT_CHECK(weight.is_cpu() && is_strided(weight), "weight must be a CPU tensor, not one packed for oneDNN");
  MTVIT_CHECK(weight.scalar_type() == dtype, "weight must have x's dtype");
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
    MTVIT_CHECK(bias->scalar_type() == dtype, "bias must have x's dtype");
  }
  return n;
}

Tensor panel_linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  const Tensor a = left(given);
  const Panels panels(weight, a.size(1), a.scalar_type());
  const Floats shift = bias_of(bias, panels.n, a.scalar_type());
  LinearTask t = task_of(a, panels, shift, gelu);
  return results(t, empty_as(a, std::array{a.size(0), t.n}), a.size(0));
}

Tensor panel_linear_of_norm(const Tensor& given, const std::optional<Tensor>& rows, const Tensor& norm_weight,
                            const Tensor& norm_bias, double eps, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool gelu, Place place) {
  check_dim("x", given, 2, "(R, D)");
  const Tensor x = dense_rows(given);
  check_layer_norm(x, norm_weight, norm_bias);
  const Floats norm_scale("norm_weight", norm_weight), norm_shift("norm_bias", norm_bias);
  Tensor list;
  if (rows) {
    list = int32_vector("rows", *rows);
    check_rows(data<int32_t>(list), list.size(0), x.size(0));
  }
  const Panels panels(weight, x.size(1), x.scalar_type());
  const Floats shift = bias_of(bias, panels.n, x.scalar_type());
  LinearTask t = task_of(x, panels, shift, gelu);
  t.a_rows = rows ? data<int32_t>(list) : nullptr;
  t.norm_weight = norm_scale.data();
  t.norm_bias = norm_shift.data();
  t.eps = static_cast<float>(eps);
  const int64_t tokens = rows ? list.size(0) : x.size(0);
  return results(t, kept_as(place, x, std::array{tokens, t.n}), tokens);
}

void panel_linear_residual_(Tensor x, const std::optional<Tensor>& rows, const Tensor& given, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
  check_dim("x", x, 2, "(R, N)");
  const Tensor a = left(given);
  const Panels panels(weight, a.size(1), a.scalar_type());
  const Floats shift = bias_of(bias, panels.n, a.scalar_type());
  LinearTask t = task_of(a, panels, shift, false);
  t.rounds = true;  // as if the linear layer were an operator of its own
  add(t, x, rows, std::nullopt, a.size(0), a.size(0));
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("ragged_linear(Tensor a, Tensor weight, Tensor? bias, Tensor cu_seqlens, bool gelu) -> Tensor");
  m.def(
      "ragged_linear_residual_(Tensor(a!) x, Tensor? rows, Tensor a, Tensor weight, Tensor? bias, Tensor cu_seqlens, "
      "Tensor? scale) -> ()");
  m.def("linear(Tensor a, Tensor weight, Tensor? bias, bool gelu) -> Tensor");
  m.def("pack_panels(Tensor weight) -> Tensor");
  m.def("panel_columns() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("ragged_linear", TORCH_BOX(&mtvit_ops::ragged_linear));
  m.impl("ragged_linear_residual_", TORCH_BOX(&mtvit_ops::ragged_linear_residual_));
  m.impl("linear", TORCH_BOX(&mtvit_ops::linear));
  m.impl("pack_panels", TORCH_BOX(&mtvit_ops::pack_panels));
}

// to refuse oneDNN's own weights in words
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("linear", TORCH_BOX(&mtvit_ops::linear));
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CompositeExplicitAutograd, m) {
  m.impl("panel_columns", TORCH_BOX(&mtvit_ops::panel_columns));
}
