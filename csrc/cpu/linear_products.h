// How the rows of a linear layer meet the panels of its weight: as float32, widened on the way, or, where the CPU has
// the instruction for it, as pairs of bfloat16.
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "row_kernels.h"
#include "simd.h"
#ifdef MTVIT_OPS_BF16_DOTS
#include "gemm_bf16.h"
#endif

namespace mtvit_ops {
namespace {

// weight (n, k), rows `stride` apart, to panels [begin, end) of 2 W of its rows each: (k, 2 W), zeros past the last
// row.
template <typename E>
void pack_weight_panels(const void* weight, int64_t stride, int64_t n, int64_t k, void* panels, int64_t begin,
                        int64_t end) {
  using T = typename E::T;
  const auto* from = static_cast<const T*>(weight);
  for (int64_t panel = begin; panel < end; ++panel) {
    T* to = static_cast<T*>(panels) + panel * k * 2 * W;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = panel * 2 * W + half * W, rows = n - first < W ? n - first : W;
      for (int64_t c = 0; c < k; c += W) {
        const int64_t depth = k - c < W ? k - c : W;
        Vec block[W];
        for (int64_t i = 0; i < W; ++i) {
          const T* row = from + (first + i) * stride + c;
          block[i] = i >= rows ? Vec{} : depth == W ? E::load(row) : load_part<E>(row, depth);
        }
        transpose(block);
        for (int64_t i = 0; i < depth; ++i) E::store(to + (c + i) * 2 * W + half * W, block[i]);
      }
    }
  }
}

// To float32 by way of E: what E would have kept, in the same bits.
template <typename E>
struct Rounded {
  using T = float;
  MTVIT_INLINE Vec round(Vec x) {
    typename E::T kept[W];
    E::store(kept, x);
    return E::load(kept);
  }
  MTVIT_INLINE void store(float* p, Vec x) { mtvit_ops::store(p, round(x)); }
};

// The layer norm of the task on rows [begin, begin + count), as To, to `out` (count, k).
template <typename E, typename To>
void normed_rows(const LinearTask& t, int64_t begin, int64_t count, void* out) {
  LayerNormTask norm{};
  norm.x = t.a_rows ? t.a : static_cast<const typename E::T*>(t.a) + begin * t.a_stride;
  norm.rows = t.a_rows ? t.a_rows + begin : nullptr;
  norm.weight = t.norm_weight;
  norm.bias = t.norm_bias;
  norm.out = out;
  norm.d = t.k;
  norm.x_stride = t.a_stride;
  norm.eps = t.eps;
  layer_norm_rows<E, To>(norm, 0, count);
}

// Panels (k, 2 W) of E; both factors become float32.
template <typename E>
struct Widened {
  using T = typename E::T;
  static constexpr int64_t kDepth = kLinearDepth, kStep = 1;  // products of a sum, and of a step of it

  // Rows [begin, begin + count) of the left factor, *apart from one to the next: normalised where the task says so, or
  // `scratch` stays unused and they lie where they are.
  static const float* left_rows(const LinearTask& t, int64_t begin, int64_t count, float* scratch, int64_t* apart) {
    *apart = t.k;
    if (t.norm_weight != nullptr) {
      normed_rows<E, Rounded<E>>(t, begin, count, scratch);
      return scratch;
    }
    const T* a = static_cast<const T*>(t.a);
    if constexpr (sizeof(T) == sizeof(float)) {
      *apart = t.a_stride;
      return a + begin * t.a_stride;
    } else {
      const int64_t full = t.k / W * W;
      for (int64_t i = 0; i < count; ++i) {
        const T* row = a + (begin + i) * t.a_stride;
        float* to = scratch + i * t.k;
        for (int64_t j = 0; j < full; j += W) store(to + j, E::load(row + j));
        if (full < t.k) store_part<F32>(to + full, load_part<E>(row + full, t.k - full), t.k - full);
      }
      return scratch;
    }
  }

  // `depth` rows of a panel.
  MTVIT_INLINE const float* part(const T* panel, int64_t depth, float* scratch) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return panel;
    } else {
      for (int64_t i = 0; i < depth * 2 * W; i += W) store(scratch + i, E::load(panel + i));
      return scratch;
    }
  }

  template <typename Next>
  MTVIT_INLINE void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                             bool add, Next next) {
    multiply_rows<2, false>(rows, a, lda, b, depth, c, 2 * W, add, next);
  }
};

#ifdef MTVIT_OPS_BF16_DOTS
// Panels (k / 2, 2 W, 2) of bfloat16, for an even k.
struct Pairs {
  using T = uint16_t;
  static constexpr int64_t kDepth = 2 * kLinearDepth, kStep = 2;  // as many bytes as of float32

  static const T* left_rows(const LinearTask& t, int64_t begin, int64_t count, float* scratch, int64_t* apart) {
    if (t.norm_weight != nullptr) {
      *apart = t.k;
      normed_rows<BF16, BF16>(t, begin, count, scratch);
      return reinterpret_cast<const T*>(scratch);
    }
    *apart = t.a_stride;
    return static_cast<const T*>(t.a) + begin * t.a_stride;
  }

  MTVIT_INLINE const T* part(const T* panel, int64_t, float*) { return panel; }

  template <typename Next>
  MTVIT_INLINE void multiply(int64_t rows, const T* a, int64_t lda, const T* b, int64_t depth, float* c, bool add,
                             Next next) {
    multiply_pair_rows<2>(rows, a, lda, b, depth / 2, c, 2 * W, 1.0f, add, next);
  }
};
#endif

}  // namespace
}  // namespace mtvit_ops
