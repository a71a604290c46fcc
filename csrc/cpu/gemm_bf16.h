// Products of bfloat16 matrices by the instruction that multiplies pairs (AVX512_BF16): twice the float32 products a
// cycle, no widening; sums are float32, subnormal factors count as 0.
#pragma once
#include <immintrin.h>

#include "gemm.h"

namespace mtvit_ops {
namespace {

constexpr int64_t kMostPairs = 128;  // of one of attention's sums

constexpr int64_t num_pairs(int64_t depth) {
  return (depth + 1) / 2;
}

// Up to W pairs of a row of n numbers, zeros behind them.
MTVIT_INLINE Vec load_pairs(const uint16_t* p, int64_t n) {
  Vec pairs{};
  if (n >= 2 * W) {
    __builtin_memcpy(&pairs, p, sizeof pairs);
  } else {
    __builtin_memcpy(&pairs, p, static_cast<size_t>(2 * n));
  }
  return pairs;
}

// The first `rows` of W rows of d numbers become columns of pairs, zeros behind them: `to` (pairs, W), `width` apart.
inline void turn_pairs(const uint16_t* from, int64_t stride, int64_t rows, int64_t d, float* to, int64_t width) {
  const int64_t pairs = num_pairs(d);
  for (int64_t c = 0; c < pairs; c += W) {
    const int64_t depth = pairs - c < W ? pairs - c : W;
    Vec block[W];
    for (int64_t i = 0; i < W; ++i) block[i] = i < rows ? load_pairs(from + i * stride + 2 * c, d - 2 * c) : Vec{};
    transpose(block);
    for (int64_t i = 0; i < depth; ++i) store(to + (c + i) * width, block[i]);
  }
}

// weight (n, k), rows `stride` apart, k even, to panels [begin, end) of 2 W of its rows each: (pairs, 2 W), zeros past
// the last row; a float here is a pair.
inline void pack_weight_pairs(const uint16_t* weight, int64_t stride, int64_t n, int64_t k, float* panels,
                              int64_t begin, int64_t end) {
  for (int64_t half = 2 * begin; half < 2 * end; ++half) {
    const int64_t first = half * W;
    turn_pairs(weight + first * stride, stride, n - first, k, panels + half / 2 * k * W + half % 2 * W, 2 * W);
  }
}

// k (nk, d) to panels of K^T: (pairs, panel width) each, zero past the last key; a float here is a pair.
inline void pack_key_pairs(const uint16_t* k, int64_t stride, int64_t nk, int64_t d, float* panels) {
  const int64_t columns = round_up(nk, W), pairs = num_pairs(d);
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t panel = first / (2 * W) * (2 * W);
    const int64_t width = panel + 2 * W <= columns ? 2 * W : W;
    turn_pairs(k + first * stride, stride, nk - first, d, panels + panel * pairs + (first - panel), width);
  }
}

// v (nk, dv) to panels: (pairs of keys, panel width) each, zero past the last key and the last column.
inline void pack_value_pairs(const uint16_t* v, int64_t stride, int64_t nk, int64_t dv, float* panels) {
  const int64_t columns = round_up(dv, W), pairs = num_pairs(nk);
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t panel = first / (2 * W) * (2 * W);
    const int64_t width = panel + 2 * W <= columns ? 2 * W : W;
    float* to = panels + panel * pairs + (first - panel);
    const auto row = [&](int64_t key) {
      if (key >= nk) return UVec{};
      const uint16_t* from = v + key * stride + first;
      if (dv - first >= W) return load_16(from);
      uint16_t part[W] = {};
      __builtin_memcpy(part, from, static_cast<size_t>(2 * (dv - first)));
      return load_16(part);
    };
    for (int64_t i = 0; i < pairs; ++i) store(to + i * width, bits<Vec>(row(2 * i) | row(2 * i + 1) << 16));
  }
}

// c (MR, NV * W) = or += scale * a (MR, pairs, 2) times a panel of b (pairs, NV * W, 2); lda in numbers.
template <int MR, int NV, typename Next>
__attribute__((noinline)) void multiply_pair_tile(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t pairs,
                                                  float* c, int64_t ldc, float scale, bool add, Next next) {
  __m512 acc[MR][NV] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh bk[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bk[j] = bits<__m512bh>(load_pairs(b + j * 2 * W, 2 * W));
    b += NV * 2 * W;
    fetch(next);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * lda + 2 * k, sizeof pair);  // as an integer: as a float it may be a NaN
      const auto aik = bits<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], aik, bk[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * W;
      const Vec sums = bits<Vec>(acc[i][j]) * scale;
      store(to, add ? sums + load(to) : sums);
    }
  }
}

template <int NV, int MR = kRows, typename Next = NothingAhead>
MTVIT_INLINE void multiply_pair_rows(int64_t rows, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t pairs,
                                     float* c, int64_t ldc, float scale, bool add, Next next = {}) {
  if constexpr (MR > 1) {
    if (rows < MR) return multiply_pair_rows<NV, MR - 1>(rows, a, lda, b, pairs, c, ldc, scale, add, next);
  }
  multiply_pair_tile<MR, NV>(a, lda, b, pairs, c, ldc, scale, add, next);
}

// c (rows, columns) = scale * a (rows, pairs) times b (pairs, columns) in panels, a float of both being a pair; columns
// is a multiple of W. Long sums are made of sums of kMostPairs, as in gemm.h. A part of a panel meets all rows while it
// is in the L1 cache.
inline void multiply_pairs(int64_t rows, const float* a, int64_t lda, const float* b, int64_t pairs, float* c,
                           int64_t ldc, int64_t columns, float scale) {
  const auto* left = reinterpret_cast<const uint16_t*>(a);
  for (int64_t j = 0; j < columns; j += 2 * W) {
    const int64_t width = j + 2 * W <= columns ? 2 * W : W;
    const auto* panel = reinterpret_cast<const uint16_t*>(b + j * pairs);
    int64_t k = 0;
    do {
      const int64_t part = pairs - k < kMostPairs ? pairs - k : kMostPairs;
      for_each_tile(rows, [&](int64_t i, int64_t count) {
        const uint16_t *from = left + 2 * (i * lda + k), *by = panel + 2 * k * width;
        float* to = c + i * ldc + j;
        if (width == 2 * W) {
          multiply_pair_rows<2>(count, from, 2 * lda, by, part, to, ldc, scale, k > 0);
        } else {
          multiply_pair_rows<1>(count, from, 2 * lda, by, part, to, ldc, scale, k > 0);
        }
      });
      k += part;
    } while (k < pairs);
  }
}

}  // namespace
}  // namespace mtvit_ops
