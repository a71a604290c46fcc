// slow_fast_merge and slow_fast_update on the CPU: one representative a image, and its gain for those it stands for.
//   x (R, D), rows (T,) or none (row i, T = R), cu_seqlens (B + 1,), weights (T,), increment (B, D)
// Any of B, R, D, T or a length may be 0; a dead entry (-1) has a weight, but is a row of zeros. The live entries of
// rows must differ: then threads write disjoint rows. Sums are in float32, in the order of the list, and rounded once.
#include <optional>
#include <vector>

#include "../checks.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

// The tokens of images, as lists of rows.
struct Lists {
  Tensor rows, offsets;
  bool listed = false;
  int64_t batch = 0, tokens = 0, longest = 0;

  const int32_t* cu() const { return data<int32_t>(offsets); }
  const int32_t* list() const { return listed ? data<int32_t>(rows) : nullptr; }
};

Lists check_lists(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& cu_seqlens, int64_t max_seqlen) {
  check_dim("x", x, 2, "(R, D)");
  Lists lists;
  lists.listed = rows.has_value();
  if (rows) lists.rows = int32_vector("rows", *rows);
  lists.tokens = rows ? lists.rows.size(0) : x.size(0);
  lists.offsets = cu_seqlens_vector("cu_seqlens", cu_seqlens);
  lists.batch = lists.offsets.size(0) - 1;
  if (rows) check_rows(lists.list(), lists.tokens, x.size(0));
  lists.longest = check_cu_seqlens("cu_seqlens", lists.cu(), lists.batch, lists.tokens);
  MTVIT_CHECK_VALUE(max_seqlen >= lists.longest, "max_seqlen of cu_seqlens must be at least the longest sequence, ",
                    lists.longest, ", got ", max_seqlen);
  return lists;
}

int64_t image_grain(int64_t longest, int64_t columns) {
  return row_grain(std::max<int64_t>(longest, 1) * std::max<int64_t>(columns, 1));
}

Tensor slow_fast_merge(const Tensor& tokens, const Tensor& weights, std::optional<Tensor> rows,
                       const Tensor& cu_seqlens, int64_t max_seqlen, bool normalize) {
  const Lists lists = check_lists(tokens, rows, cu_seqlens, max_seqlen);
  const Dtype dtype = check_dtype("x", tokens);
  check_length("weights", weights, lists.tokens);
  const Tensor shares = as_float32("weights", weights), x = dense_rows(tokens);
  const int64_t d = x.size(1), element = dtype == Dtype::f32 ? 4 : 2;
  Tensor out = empty_float32(std::array{lists.batch, d});
  const auto* weight = data<float>(shares);
  const auto* from = static_cast<const char*>(x.data_ptr());
  const int32_t *cu = lists.cu(), *list = lists.list();
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, lists.batch, image_grain(lists.longest, d), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(d));
    for (int64_t b = begin; b < end; ++b) {
      float* sums = mutable_data<float>(out) + b * d;
      std::fill(sums, sums + d, 0.0f);
      float total = 0;
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) total += weight[i];
      ScatterTask t{};
      t.dtype = Dtype::f32;
      t.x = sums;
      t.d = d;
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
        const int64_t place = list ? list[i] : i;
        if (place < 0) continue;
        const float share = !normalize ? weight[i] : total == 0 ? 0.0f : weight[i] / total;
        t.y = from + place * x.stride(0) * element;
        if (dtype != Dtype::f32) {
          native.to_float32(dtype, t.y, row.data(), d);
          t.y = row.data();
        }
        t.row_scale = &share;
        native.scatter_residual(t, 0, 1);
      }
    }
  });
  return dtype == Dtype::f32 ? out : torch::stable::to(out, tokens.scalar_type());
}

Tensor slow_fast_update(const Tensor& x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
                        const Tensor& increment) {
  const Lists lists = check_lists(x, rows, cu_seqlens, max_seqlen);
  const Dtype dtype = check_dtype("x", x);
  const int64_t d = x.size(1), element = dtype == Dtype::f32 ? 4 : 2;
  check_dim("increment", increment, 2, "(B, D)");
  MTVIT_CHECK(same_dtype(increment, x), "increment must have x's dtype");
  MTVIT_CHECK(increment.size(0) == lists.batch && increment.size(1) == d, "increment must have shape (", lists.batch,
              ", ", d, "), got ", shape_of(increment));
  const Tensor step = dense_rows(increment);
  Tensor out = copy_of<2>(x);
  const int32_t *cu = lists.cu(), *list = lists.list();
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, lists.batch, image_grain(lists.longest, d), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      ScatterTask t{};
      t.dtype = dtype;
      t.x = static_cast<char*>(out.data_ptr()) + (list ? 0 : cu[b] * d * element);
      t.rows = list ? list + cu[b] : nullptr;
      // one row for all of the image
      t.y = static_cast<const char*>(step.data_ptr()) + b * step.stride(0) * element;
      t.d = d;
      t.x_stride = d;
      native.scatter_residual(t, 0, cu[b + 1] - cu[b]);
    }
  });
  return out;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "slow_fast_merge(Tensor x, Tensor weights, Tensor? rows, Tensor cu_seqlens, int max_seqlen, bool normalize)"
      " -> Tensor");
  m.def("slow_fast_update(Tensor x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor increment) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("slow_fast_merge", TORCH_BOX(&mtvit_ops::slow_fast_merge));
  m.impl("slow_fast_update", TORCH_BOX(&mtvit_ops::slow_fast_update));
}
