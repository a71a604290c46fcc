// gather_layer_norm on the CPU: out[i] = layer_norm(x[rows[i]]).
//   x (R, D), rows (T,) or none (row i), weight and bias (D,); out (T, D), mean and rstd (T,) float32
// R, D or T may be 0; a dead entry (-1) gives zeros. Rows are independent: threads write disjoint parts.
#include <algorithm>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "memory.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

void check_parameter(const char* name, const Tensor& given, const Tensor& x) {
  check_length(name, given, x.size(1));
  MTVIT_CHECK(same_dtype(given, x) || is_float32(given), name, " must be float32 or have x's dtype");
}

// `mean` and `rstd` are made where they are wanted.
Tensor normalise(const Tensor& tokens, const std::optional<Tensor>& rows, const Tensor& weight, const Tensor& bias,
                 double eps, Tensor* mean, Tensor* rstd) {
  check_dim("x", tokens, 2, "(R, D)");
  const Tensor x = dense_rows(tokens);
  const Dtype dtype = check_dtype("x", x);
  const int64_t d = x.size(1);
  check_layer_norm(x, weight, bias);
  const Floats weights("weight", weight), biases("bias", bias);
  Tensor list;
  if (rows) {
    list = int32_vector("rows", *rows);
    check_rows(data<int32_t>(list), list.size(0), x.size(0));
  }
  const int64_t count = rows ? list.size(0) : x.size(0);
  Tensor out = empty_as(x, std::array{count, d});
  LayerNormTask t{};
  if (mean != nullptr) t.mean = mutable_data<float>(*mean = empty_float32(std::array{count}));
  if (rstd != nullptr) t.rstd = mutable_data<float>(*rstd = empty_float32(std::array{count}));
  t.dtype = dtype;
  t.x = x.data_ptr();
  t.rows = rows ? data<int32_t>(list) : nullptr;
  t.weight = weights.data();
  t.bias = biases.data();
  t.out = out.data_ptr();
  t.d = d;
  t.x_stride = x.stride(0);
  t.eps = static_cast<float>(eps);
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, count, row_grain(d),
                              [&](int64_t begin, int64_t end) { native.layer_norm(t, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_layer_norm(const Tensor& tokens, std::optional<Tensor> rows,
                                                     const Tensor& weight, const Tensor& bias, double eps) {
  Tensor mean, rstd;
  const Tensor out = normalise(tokens, rows, weight, bias, eps, &mean, &rstd);
  return {out, mean, rstd};
}

}  // namespace

void check_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_parameter("weight", weight, x);
  check_parameter("bias", bias, x);
}

Tensor layer_norm_rows(const Tensor& tokens, const std::optional<Tensor>& rows, const Tensor& weight,
                       const Tensor& bias, double eps) {
  return normalise(tokens, rows, weight, bias, eps, nullptr, nullptr);
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "gather_layer_norm(Tensor x, Tensor? rows, Tensor weight, Tensor bias, float eps) -> "
      "(Tensor out, Tensor mean, Tensor rstd)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("gather_layer_norm", TORCH_BOX(&mtvit_ops::gather_layer_norm));
}
