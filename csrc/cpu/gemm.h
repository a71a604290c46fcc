// Products of small float32 matrices out of the cache, and the panels of W or 2 W columns they read.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

// Memory to bring to the L2 cache on the side, `step` bytes further with each step of a product. Many at once would
// stand in the way of what is needed now.
struct Ahead {
  const char* at;
  int64_t step;
};

struct NothingAhead {};

MTVIT_INLINE void fetch(NothingAhead&) {}

MTVIT_INLINE void fetch(Ahead& ahead) {
  __builtin_prefetch(ahead.at, 0, 2);
  ahead.at += ahead.step;
}

// c (MR, NV * W) = or += a (MR, depth) times a panel of b (depth, NV * W), all in registers. TURNED: a lies as
// (depth, MR).
template <int MR, int NV, bool TURNED, typename Next>
__attribute__((noinline)) void multiply_tile(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                                             int64_t ldc, bool add, Next next) {
  Vec acc[MR][NV] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec bk[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bk[j] = load(b + j * W);
    b += NV * W;
    fetch(next);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const Vec aik = splat(TURNED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += aik * bk[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * W;
      store(to, add ? acc[i][j] + load(to) : acc[i][j]);
    }
  }
}

template <int NV, bool TURNED, int MR = kRows, typename Next = NothingAhead>
MTVIT_INLINE void multiply_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                                int64_t ldc, bool add, Next next = {}) {
  if constexpr (MR > 1) {
    if (rows < MR) return multiply_rows<NV, TURNED, MR - 1>(rows, a, lda, b, depth, c, ldc, add, next);
  }
  multiply_tile<MR, NV, TURNED>(a, lda, b, depth, c, ldc, add, next);
}

// Tiles of at most kRows rows and about one height, as body(first, count): a last tile of one or two rows would wait
// for its own sums.
template <typename Body>
MTVIT_INLINE void for_each_tile(int64_t rows, Body body) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * rows / tiles;
    body(first, (tile + 1) * rows / tiles - first);
  }
}

// c (rows, columns) = or += a (rows, depth) times b (depth, columns) in panels; columns is a multiple of W. Long sums
// are made of sums of kDepth products: rounding errors then grow with the number of parts, not with the depth. A part
// of a panel meets all rows while it is in the L1 cache; no row's result depends on the others.
template <bool TURNED = false>
void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc,
              int64_t columns, bool add = false) {
  constexpr int64_t kDepth = 256;
  for (int64_t j = 0; j < columns; j += 2 * W) {
    const bool wide = j + 2 * W <= columns;
    const float* panel = b + j * depth;
    int64_t k = 0;
    do {
      const int64_t part = depth - k < kDepth ? depth - k : kDepth;
      for_each_tile(rows, [&](int64_t i, int64_t count) {
        const float* from = TURNED ? a + k * lda + i : a + i * lda + k;
        float* to = c + i * ldc + j;
        if (wide) {
          multiply_rows<2, TURNED>(count, from, lda, panel + k * 2 * W, part, to, ldc, add || k > 0);
        } else {
          multiply_rows<1, TURNED>(count, from, lda, panel + k * W, part, to, ldc, add || k > 0);
        }
      });
      k += part;
    } while (k < depth);
  }
}

// k (nk, d) to panels of K^T: (d, panel width) each, zero past the last key.
template <typename E>
void pack_keys(const typename E::T* k, int64_t stride, int64_t nk, int64_t d, float* panels) {
  const int64_t columns = round_up(nk, W);
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t panel = first / (2 * W) * (2 * W);
    const int64_t width = panel + 2 * W <= columns ? 2 * W : W;
    float* to = panels + panel * d + (first - panel);
    const int64_t keys = nk - first < W ? nk - first : W;
    for (int64_t c = 0; c < d; c += W) {
      const int64_t depth = d - c < W ? d - c : W;
      const typename E::T* from = k + first * stride + c;
      Vec block[W];
      if (keys == W && depth == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = E::load(from + i * stride);
      } else {
        for (int i = 0; i < W; ++i) block[i] = i < keys ? load_part<E>(from + i * stride, depth) : Vec{};
      }
      transpose(block);
      if (depth == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + (c + i) * width, block[i]);
      } else {
        for (int64_t i = 0; i < depth; ++i) store(to + (c + i) * width, block[i]);
      }
    }
  }
}

// v (nk, dv) to panels: (nk, panel width) each, zero past the last column.
template <typename E>
void pack_values(const typename E::T* v, int64_t stride, int64_t nk, int64_t dv, float* panels) {
  const int64_t columns = round_up(dv, W);
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t panel = first / (2 * W) * (2 * W);
    const int64_t width = panel + 2 * W <= columns ? 2 * W : W;
    float* to = panels + panel * nk + (first - panel);
    if (dv - first >= W) {
      for (int64_t i = 0; i < nk; ++i) store(to + i * width, E::load(v + i * stride + first));
    } else {
      for (int64_t i = 0; i < nk; ++i) store(to + i * width, load_part<E>(v + i * stride + first, dv - first));
    }
  }
}

}  // namespace
}  // namespace mtvit_ops
