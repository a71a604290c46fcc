// The mean of each image's patches on the CPU: pool_tokens of methods/_pooling.py in one call.
//   x (B * N, D), N tokens an image, the first num_prefix_tokens of them no patches; returns (B, D), 0 without patches
// Summed in float32, row by row, and rounded once. B or D may be 0, N not. Images are independent: threads write
// disjoint rows.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace mtvit_ops {
namespace {

template <typename T>
void average(const float* sums, int64_t d, int64_t patches, T* out) {
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(patches, 1));
  for (int64_t c = 0; c < d; ++c) out[c] = static_cast<T>(sums[c] * share);
}

Tensor mean_patches(const Tensor& tokens, int64_t batch, int64_t num_prefix_tokens) {
  check_dim("x", tokens, 2, "(B * N, D)");
  const Dtype dtype = check_dtype("x", tokens);
  const Tensor x = as_contiguous(tokens);
  const int64_t num_rows = x.size(0), d = x.size(1);
  const bool fits = batch == 0 ? num_rows == 0 : batch > 0 && num_rows > 0 && num_rows % batch == 0;
  MTVIT_CHECK(fits, "x must have as many rows, and at least one, for each of ", batch, " images, got ",
              shape_of(tokens));
  const int64_t length = batch > 0 ? num_rows / batch : 0;
  MTVIT_CHECK(num_prefix_tokens >= 0 && (batch == 0 || num_prefix_tokens <= length),
              "num_prefix_tokens must be in [0, ", length, "], got ", num_prefix_tokens);
  const int64_t patches = length - num_prefix_tokens, row = d * static_cast<int64_t>(element_size(dtype));
  Tensor out = empty_as(x, std::array{batch, d});
  const auto* rows = data<char>(x);
  auto* means = mutable_data<char>(out);
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, batch, row_grain(length * d), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(d)), wide(static_cast<size_t>(d));
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t i = b * length + num_prefix_tokens; i < (b + 1) * length; ++i) {
        native.to_float32(dtype, rows + i * row, wide.data(), d);
        for (int64_t c = 0; c < d; ++c) sums[c] += wide[c];
      }
      void* to = means + b * row;
      if (dtype == Dtype::f32) {
        average(sums.data(), d, patches, static_cast<float*>(to));
      } else if (dtype == Dtype::bf16) {
        average(sums.data(), d, patches, static_cast<torch::headeronly::BFloat16*>(to));
      } else {
        average(sums.data(), d, patches, static_cast<torch::headeronly::Half*>(to));
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("mean_patches(Tensor x, int images, int num_prefix_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("mean_patches", TORCH_BOX(&mtvit_ops::mean_patches));
}
