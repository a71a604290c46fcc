// scatter_residual_ on the CPU: x[rows[i]] += scale * y[i], in place.
//   x (R, D), rows (T,) or none (row i, T = R), y (T, D), scale none, (D,) or (T, 1)
// R, D or T may be 0; a dead entry (-1) is skipped. The live entries of rows must differ: then threads write disjoint
// rows. Multiplied and added in float32 and rounded once.
#include <optional>

#include "../checks.h"
#include "memory.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
void scatter_residual_(Tensor x, std::optional<Tensor> rows, const Tensor& y, std::optional<Tensor> scale) {
  check_dim("x", x, 2, "(R, D)");
  check_dim("y", y, 2, "(T, D)");
  const Dtype dtype = check_dtype("x", x);
  const int64_t d = x.size(1);
  MTVIT_CHECK(same_dtype(y, x), "y must have x's dtype");
  MTVIT_CHECK(d <= 1 || x.stride(1) == 1, "x must be contiguous in its last dimension");
  MTVIT_CHECK(x.size(0) <= 1 || x.stride(0) >= d, "rows of x must not overlap");
  Tensor list;
  if (rows) list = int32_vector("rows", *rows);
  const int64_t count = rows ? list.size(0) : x.size(0);
  MTVIT_CHECK(y.size(0) == count && y.size(1) == d, "y must have shape (", count, ", ", d, "), got ", shape_of(y));
  Tensor factors;
  ScatterTask t{};
  if (scale) {
    const bool per_column = check_scale(*scale, d, count);
    factors = apart_from(x, as_float32("scale", *scale));
    (per_column ? t.column_scale : t.row_scale) = data<float>(factors);
  }
  if (rows) check_rows(data<int32_t>(list), count, x.size(0));
  const Tensor step = apart_from(x, dense_rows(y));
  t.dtype = dtype;
  t.x = x.data_ptr();
  t.rows = rows ? data<int32_t>(list) : nullptr;
  t.y = step.data_ptr();
  t.d = d;
  t.x_stride = x.stride(0);
  t.y_stride = step.stride(0);
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, count, row_grain(d),
                              [&](int64_t begin, int64_t end) { native.scatter_residual(t, begin, end); });
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("scatter_residual_(Tensor(a!) x, Tensor? rows, Tensor y, Tensor? scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("scatter_residual_", TORCH_BOX(&mtvit_ops::scatter_residual_));
}
