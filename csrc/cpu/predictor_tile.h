// MT-ViT's tail predictor on one image: resampling, a convolution, pairs of depthwise and pointwise ones, a linear
// layer. Activations are (position, channel), channels padded with zeros to whole vectors.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

constexpr int kPositions = 4;  // taken together: one chain of additions would wait for itself

MTVIT_INLINE Vec relu(Vec x) {
  return x < Vec{} ? Vec{} : x;  // keeps NaN
}

template <typename E>
MTVIT_INLINE Vec load_up_to(const typename E::T* p, int64_t n) {
  return n >= W ? E::load(p) : load_part<E>(p, n);
}

// The pixels that the first convolution reads, as out[channel][column][row], `row_stride` apart: W rows at once, first
// down the columns, then, transposed, along the rows.
template <typename E>
MTVIT_INLINE void resample(const PredictorTask& t, const typename E::T* image, float* strip, float* out) {
  const int64_t row_stride = round_up(t.rows.count, kMaxWidth);
  for (int64_t c = 0; c < t.channels; ++c) {
    const typename E::T* plane = image + c * t.height * t.width;
    for (int64_t first = 0; first < t.rows.count; first += W) {
      for (int64_t x = 0; x < t.width; x += W) {
        Vec tile[W] = {};
        for (int i = 0; i < W && first + i < t.rows.count; ++i) {
          const float* weight = t.rows.weights + (first + i) * t.rows.most;
          const typename E::T* from = plane + t.rows.start[first + i] * t.width + x;
          for (int32_t k = 0; k < t.rows.length[first + i]; ++k, from += t.width) {
            tile[i] += splat(weight[k]) * load_up_to<E>(from, t.width - x);
          }
        }
        transpose(tile);
        for (int i = 0; i < W; ++i) store(strip + (x + i) * W, tile[i]);
      }
      for (int64_t column = 0; column < t.columns.count; ++column) {
        const float* weight = t.columns.weights + column * t.columns.most;
        const float* from = strip + t.columns.start[column] * W;
        Vec pixels{};
        for (int32_t k = 0; k < t.columns.length[column]; ++k) pixels += splat(weight[k]) * load(from + k * W);
        store(out + (c * t.columns.count + column) * row_stride + first, pixels);
      }
    }
  }
}

// 3 x 3 windows that do not overlap here: resampling left the pixels between them out.
MTVIT_INLINE void first_convolution(const PredictorTask& t, const float* pixels, float* out) {
  const int64_t width = round_up(t.widths[0], kMaxWidth), row_stride = round_up(t.rows.count, kMaxWidth);
  const int64_t across = t.columns.count / 3, positions = t.rows.count / 3 * across;
  for (int64_t p = 0; p < positions; p += kPositions) {
    const int count = positions - p < kPositions ? int(positions - p) : kPositions;
    const float* corner[kPositions];
    for (int q = 0; q < kPositions; ++q) {
      const int64_t at = p + (q < count ? q : 0);
      corner[q] = pixels + at % across * 3 * row_stride + at / across * 3;
    }
    for (int64_t v = 0; v < width; v += W) {
      Vec sums[kPositions];
      for (int q = 0; q < kPositions; ++q) sums[q] = load(t.shifts[0] + v);
      const float* weight = t.weights[0] + v;
      for (int64_t c = 0; c < t.channels; ++c) {
        for (int64_t y = 0; y < 3; ++y) {
          for (int64_t x = 0; x < 3; ++x, weight += width) {
            const int64_t offset = (c * t.columns.count + x) * row_stride + y;
            for (int q = 0; q < kPositions; ++q) sums[q] += splat(corner[q][offset]) * load(weight);
          }
        }
      }
      for (int q = 0; q < count; ++q) store(out + (p + q) * width + v, relu(sums[q]));
    }
  }
}

// 3 x 3, every second position, zeros around; each channel by itself.
MTVIT_INLINE void depthwise(const float* x, int64_t high, int64_t across, int64_t width, const float* weights,
                            const float* shift, float* out) {
  const int64_t out_high = (high + 1) / 2, out_across = (across + 1) / 2;
  for (int64_t i = 0; i < out_high; ++i) {
    for (int64_t j = 0; j < out_across; ++j, out += width) {
      for (int64_t v = 0; v < width; v += W) {
        Vec total = load(shift + v);
        for (int64_t ky = 0; ky < 3; ++ky) {
          const int64_t row = 2 * i + ky - 1;
          if (row < 0 || row >= high) continue;
          for (int64_t kx = 0; kx < 3; ++kx) {
            const int64_t column = 2 * j + kx - 1;
            if (column < 0 || column >= across) continue;
            total += load(x + (row * across + column) * width + v) * load(weights + (ky * 3 + kx) * width + v);
          }
        }
        store(out + v, relu(total));
      }
    }
  }
}

MTVIT_INLINE void pointwise(const float* x, int64_t positions, int64_t inputs, int64_t width, int64_t out_width,
                            const float* weights, const float* shift, float* out) {
  for (int64_t p = 0; p < positions; p += kPositions) {
    const int count = positions - p < kPositions ? int(positions - p) : kPositions;
    const float* from[kPositions];
    for (int q = 0; q < kPositions; ++q) from[q] = x + (p + (q < count ? q : 0)) * width;
    for (int64_t v = 0; v < out_width; v += W) {
      Vec sums[kPositions];
      for (int q = 0; q < kPositions; ++q) sums[q] = load(shift + v);
      for (int64_t k = 0; k < inputs; ++k) {
        const Vec weight = load(weights + k * out_width + v);
        for (int q = 0; q < kPositions; ++q) sums[q] += splat(from[q][k]) * weight;
      }
      for (int q = 0; q < count; ++q) store(out + (p + q) * out_width + v, relu(sums[q]));
    }
  }
}

template <typename E>
void predict_tail_of(const PredictorTask& t, int64_t image, float* scratch, float* logits) {
  int64_t high = t.rows.count / 3, across = t.columns.count / 3, width = round_up(t.widths[0], kMaxWidth);
  float* strip = scratch;
  float* pixels = strip + round_up(t.width, kMaxWidth) * kMaxWidth;
  float* x = pixels + t.channels * t.columns.count * round_up(t.rows.count, kMaxWidth);
  float* y = x + t.most_activations;
  const auto* from = static_cast<const typename E::T*>(t.images) + image * t.channels * t.height * t.width;
  resample<E>(t, from, strip, pixels);
  first_convolution(t, pixels, x);
  for (int64_t pair = 1; pair <= t.pairs; ++pair) {
    const int64_t layer = 2 * pair - 1, inputs = t.widths[pair - 1];
    depthwise(x, high, across, width, t.weights[layer], t.shifts[layer], y);
    high = (high + 1) / 2;
    across = (across + 1) / 2;
    const int64_t out_width = round_up(t.widths[pair], kMaxWidth);
    pointwise(y, high * across, inputs, width, out_width, t.weights[layer + 1], t.shifts[layer + 1], x);
    width = out_width;
  }
  for (int64_t v = 0; v < width; v += W) {
    Vec total{};
    for (int64_t p = 0; p < high * across; ++p) total += load(x + p * width + v);
    store(y + v, total / float(high * across));
  }
  for (int64_t k = 0; k < t.outputs; ++k) {
    Vec total{};
    for (int64_t v = 0; v < width; v += W) total += load(y + v) * load(t.head + k * width + v);
    logits[k] = sum(total) + t.head_bias[k];
  }
}

}  // namespace
}  // namespace mtvit_ops
