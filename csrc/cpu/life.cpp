// Life Regression on the CPU: Life.lives of methods/life.py in one call, and with the lists of all stages in another.
//   x (B, 1 + N, D), weight (D, D), budgets (S,) not rising; returns (B, N) float32, for each stage the rows of its
//   longest-lived tokens, class token first, one stage after the other, and offsets (S, B + 1)
// With n the rows of an image, normalised without scale and shift (eps 1e-5): scores n_i . (W n_0), standardised over
// the image by its sample deviation, then base + (depth - base) * (score * std + mean). float32 inside. B, N or D may
// be 0. Images are independent: threads write disjoint parts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "memory.h"
#include "sort_keys.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

constexpr int64_t kChains = 16;  // partial sums of a product, which the compiler makes vectors of

float dot(const float* a, const float* b, int64_t n) {
  float chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int64_t j = 0; j < kChains; ++j) chains[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) chains[0] += a[i] * b[i];
  for (int64_t half = kChains / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) chains[j] += chains[j + half];
  }
  return chains[0];
}

// Scores (patches,) to lives, in place.
void standardise(float* scores, int64_t patches, double mean, double deviation, int64_t base, int64_t depth) {
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < patches; ++i) sum += scores[i];
  const auto centre = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(patches, 1)));
  for (int64_t i = 0; i < patches; ++i) {
    scores[i] -= centre;
    squares += static_cast<double>(scores[i]) * scores[i];
  }
  const auto variance = static_cast<float>(squares / static_cast<double>(std::max<int64_t>(patches - 1, 1)));
  const float spread = std::sqrt(std::max(variance, std::numeric_limits<float>::min())) + 1e-8f;
  for (int64_t i = 0; i < patches; ++i) {
    const float normalised = scores[i] / spread * static_cast<float>(deviation) + static_cast<float>(mean);
    scores[i] = static_cast<float>(base) + static_cast<float>(depth - base) * normalised;
  }
}

Tensor lives(const Tensor& tokens, const Tensor& weight, double mean, double deviation, int64_t base, int64_t depth) {
  check_dim("x", tokens, 3, "(B, 1 + N, D)");
  const Dtype dtype = check_dtype("x", tokens);
  const Tensor x = as_contiguous(tokens);
  const int64_t batch = x.size(0), length = x.size(1), d = x.size(2);
  MTVIT_CHECK(length >= 1, "x must have a class token, got ", shape_of(x));
  check_dim("weight", weight, 2, "(D, D)");
  MTVIT_CHECK(weight.size(0) == d && weight.size(1) == d, "weight must have shape (", d, ", ", d, "), got ",
              shape_of(weight));
  const Floats matrix("weight", weight);
  const int64_t patches = length - 1;
  Tensor out = empty_float32(std::array{batch, patches});
  const Kernels& native = kernels();
  // units of 1 and 0: a layer norm without scale and shift
  const Buffer ones = allocate(d), zeros = allocate(d);
  std::fill_n(ones.get(), d, 1.0f);
  std::fill_n(zeros.get(), d, 0.0f);
  const auto image_bytes = length * d * static_cast<int64_t>(x.element_size());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Buffer large;
    float* scratch = thread_scratch(2 * length * d + d, large);
    float *wide = scratch, *normed = wide + length * d, *direction = normed + length * d;
    for (int64_t b = begin; b < end; ++b) {
      native.to_float32(dtype, data<char>(x) + b * image_bytes, wide, length * d);
      LayerNormTask t{};
      t.x = wide;
      t.weight = ones.get();
      t.bias = zeros.get();
      t.out = normed;
      t.d = t.x_stride = d;
      t.eps = 1e-5f;
      native.layer_norm(t, 0, length);
      for (int64_t c = 0; c < d; ++c) direction[c] = dot(matrix.data() + c * d, normed, d);
      float* scores = mutable_data<float>(out) + b * patches;
      for (int64_t i = 0; i < patches; ++i) scores[i] = dot(normed + (i + 1) * d, direction, d);
      standardise(scores, patches, mean, deviation, base, depth);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> longest_lived(const Tensor& tokens, const Tensor& weight, double mean,
                                                 double deviation, int64_t base, int64_t depth,
                                                 const std::vector<int64_t>& budgets) {
  const Tensor scored = lives(tokens, weight, mean, deviation, base, depth);
  const int64_t batch = tokens.size(0), length = tokens.size(1), patches = length - 1;
  const auto stages = static_cast<int64_t>(budgets.size());
  int64_t total = 0, most = length;
  for (const int64_t budget : budgets) {
    MTVIT_CHECK(budget >= 1 && budget <= most, "budgets must be in [1, ", length, "] and not rise, got ", budget);
    most = budget;
    total += budget;
  }
  MTVIT_CHECK(batch * length <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 tokens, got ",
              shape_of(tokens));
  Tensor rows = empty_int32(std::array{batch * total}), ends = empty_int32(std::array{stages, batch + 1});
  auto* list = mutable_data<int32_t>(rows);
  auto* offsets = mutable_data<int32_t>(ends);
  const int64_t first_budget = budgets.empty() ? 0 : budgets.front() - 1;  // of patches
  constexpr int64_t kImages = 8;  // a thread's least share: an image takes microseconds
  torch::stable::parallel_for(0, batch, kImages, [&](int64_t begin, int64_t end) {
    std::vector<Key32> keys(static_cast<size_t>(patches));
    for (int64_t b = begin; b < end; ++b) {
      const float* of_image = data<float>(scored) + b * patches;
      for (int64_t i = 0; i < patches; ++i) keys[i] = key_of(of_image[i], static_cast<int32_t>(i));
      const auto middle = keys.begin() + std::max<int64_t>(first_budget, 0);
      if (middle != keys.end()) std::nth_element(keys.begin(), middle, keys.end());
      std::sort(keys.begin(), middle);
      int64_t stage_begin = 0;
      for (const int64_t budget : budgets) {
        int32_t* out = list + stage_begin + b * budget;
        const auto first = static_cast<int32_t>(b * length);
        *out++ = first;
        for (int64_t i = 0; i < budget - 1; ++i) *out++ = first + 1 + place_of(keys[i]);
        stage_begin += batch * budget;
      }
    }
  });
  for (int64_t s = 0; s < stages; ++s) {
    for (int64_t b = 0; b <= batch; ++b) offsets[s * (batch + 1) + b] = static_cast<int32_t>(b * budgets[s]);
  }
  return {scored, rows, ends};
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "longest_lived(Tensor x, Tensor weight, float mean, float std, int base, int depth, int[] budgets) -> "
      "(Tensor lives, Tensor rows, Tensor cu_seqlens)");
  m.def("lives(Tensor x, Tensor weight, float mean, float std, int base, int depth) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("lives", TORCH_BOX(&mtvit_ops::lives));
  m.impl("longest_lived", TORCH_BOX(&mtvit_ops::longest_lived));
}
