// A linear layer over a block of rows: products with panels of the weight, a layer norm on the way in, bias, GELU and
// the residual on the way out.
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "row_kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

// x * Phi(x). With z = |x| / sqrt(2) and t = 1 / (1 + 0.36 z): erfc(z) exp(z^2) is a polynomial in t, a minimax fit
// with a relative error of 5.3e-8; the result is within 2.4e-7 (float32's own erf: 3.8e-7) for all x.
MTVIT_INLINE Vec gelu(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (size * (0.36f * 0.70710678f) + 1.0f);
  Vec p = splat(-0.16456492449360385f);
  p = p * t + 0.5679946961524114f;
  p = p * t - 0.3619320046002613f;
  p = p * t + 0.4339961098338816f;
  p = p * t + 0.10518929724546551f;
  p = p * t + 0.21716019095415495f;
  p = p * t + 0.20215676661459637f;
  const Vec tail = 0.5f * t * p * exp2(size * size * -0.72134752f);  // Phi(-|x|)
  const Vec lost = (size > 20.0f ? splat(20.0f) : size) * tail;      // infinity times 0 would be no number
  return x >= 0.0f ? x - lost : -lost;
}

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

// Rows [begin, begin + count) of the left factor as float32, k apart: normalised where the task says so, or `scratch`
// stays unused and they lie where they are.
template <typename E>
const float* left_rows(const LinearTask& t, int64_t begin, int64_t count, float* scratch, int64_t* apart) {
  using T = typename E::T;
  const T* a = static_cast<const T*>(t.a);
  *apart = t.k;
  if (t.norm_weight != nullptr) {
    LayerNormTask norm{};
    norm.x = t.a_rows ? a : a + begin * t.a_stride;
    norm.rows = t.a_rows ? t.a_rows + begin : nullptr;
    norm.weight = t.norm_weight;
    norm.bias = t.norm_bias;
    norm.out = scratch;
    norm.d = t.k;
    norm.x_stride = t.a_stride;
    norm.eps = t.eps;
    layer_norm_rows<E, Rounded<E>>(norm, 0, count);
    return scratch;
  }
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

// Where results of row i go; null: nowhere.
template <typename T>
MTVIT_INLINE T* out_row(const LinearTask& t, int64_t i) {
  const int64_t row = t.residual && t.rows ? t.rows[i] : i;
  return row < 0 ? nullptr : static_cast<T*>(t.out) + row * t.out_stride;
}

// What becomes of sums (W of the columns from `column` on) of row i.
template <typename O>
MTVIT_INLINE void finish(const LinearTask& t, int64_t i, int64_t column, Vec y) {
  using T = typename O::T;
  const int64_t left = t.n - column;
  if (left <= 0) return;
  const bool whole = left >= W;
  const auto of_columns = [&](const float* p) { return whole ? load(p + column) : load_part<F32>(p + column, left); };
  if (t.bias) y += of_columns(t.bias);
  if (t.gelu) y = gelu(y);
  T* to = out_row<T>(t, i);
  if (!to) return;
  to += column;
  if (!t.residual) return whole ? O::store(to, y) : store_part<O>(to, y, left);
  if (t.rounds) y = Rounded<O>::round(y);
  if (t.column_scale) y *= of_columns(t.column_scale);
  if (t.row_scale) y *= t.row_scale[i];
  if (whole) {
    O::store(to, O::load(to) + y);
  } else {
    store_part<O>(to, load_part<O>(to, left) + y, left);
  }
}

// The lines that results of rows [begin, begin + count) go to, on their way before there are results.
template <typename O>
MTVIT_INLINE void fetch_out(const LinearTask& t, int64_t begin, int64_t count, int64_t column) {
  for (int64_t i = begin; i < begin + count; ++i) {
    const auto* to = out_row<typename O::T>(t, i);
    if (to) __builtin_prefetch(to + column, 1, 3);
  }
}

// Brings memory to the L2 cache, a share with each call: weights come from far, and while one part of them is
// multiplied the next one can be on its way.
class Prefetch {
 public:
  Prefetch(const void* begin, const void* end, int64_t calls)
      : at_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {
    const int64_t lines = (end_ - at_ + 63) / 64;
    share_ = 64 * ((lines + calls - 1) / calls);
  }

  __attribute__((always_inline)) void some() {
    const char* until = end_ - at_ < share_ ? end_ : at_ + share_;
    for (; at_ < until; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t share_;
};

// Rows [begin, begin + count) times panels [first, last). Sums are made of sums of kLinearDepth products, whatever the
// blocks: no result depends on who computes it.
template <typename E, typename O>
void linear_block(const LinearTask& t, int64_t begin, int64_t count, int64_t first, int64_t last, float* scratch) {
  using T = typename E::T;
  constexpr int64_t kColumns = 2 * W;
  float* sums = scratch;                              // (count, 2 W)
  float* widened = sums + kLinearRows * kColumns;     // (kLinearDepth, 2 W)
  float* copied = widened + kLinearDepth * kColumns;  // (count, k)
  const auto* weight = static_cast<const T*>(t.panels);
  const T* weight_end = weight + last * t.k * kColumns;
  const auto depth_at = [&](int64_t k) { return t.k - k < kLinearDepth ? t.k - k : kLinearDepth; };
  const auto part_end = [&](const T* part, int64_t depth) {
    return weight_end - part < depth * kColumns ? weight_end : part + depth * kColumns;
  };
  const int64_t tiles = (count + kRows - 1) / kRows;
  const T* ahead = weight + first * t.k * kColumns;
  // with fewer tiles the products take no longer than the way itself
  const bool fetches = tiles >= 4;
  if (fetches) Prefetch(ahead, part_end(ahead, depth_at(0)), 1).some();
  int64_t apart;
  const float* a = left_rows<E>(t, begin, count, copied, &apart);
  for (int64_t panel = first; panel < last; ++panel) {
    const T* b = weight + panel * t.k * kColumns;
    int64_t k = 0;
    do {  // once where k is 0, for zeros
      const int64_t depth = depth_at(k);
      ahead = b + (k + depth) * kColumns;
      Prefetch next(ahead, part_end(ahead, depth), tiles);
      const float* part;
      if constexpr (sizeof(T) == sizeof(float)) {
        part = b + k * kColumns;
      } else {
        for (int64_t i = 0; i < depth * kColumns; i += W) store(widened + i, E::load(b + k * kColumns + i));
        part = widened;
      }
      for_each_tile(count, [&](int64_t i, int64_t rows) {
        if (fetches) next.some();
        if (k + depth == t.k) fetch_out<O>(t, begin + i, rows, panel * kColumns);
        multiply_rows<2, false>(rows, a + i * apart + k, apart, part, depth, sums + i * kColumns, kColumns, k > 0);
      });
      k += depth;
    } while (k < t.k);
    for (int64_t i = 0; i < count; ++i) {
      finish<O>(t, begin + i, panel * kColumns, load(sums + i * kColumns));
      finish<O>(t, begin + i, panel * kColumns + W, load(sums + i * kColumns + W));
    }
  }
}

}  // namespace
}  // namespace mtvit_ops
