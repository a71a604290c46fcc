// A linear layer over a block of rows: products with panels of the weight, a layer norm on the way in, bias, GELU and
// the residual on the way out.
#pragma once
#include "kernels.h"
#include "linear_products.h"
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

// Shares memory out among tiles of products: weights come from far, and while one part of them is multiplied the next
// one can be on its way.
class Share {
 public:
  Share(const void* begin, const void* end, int64_t steps)
      : at_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {
    step_ = steps > 0 ? (end_ - at_ + steps - 1) / steps : 0;
  }

  // What a tile of so many steps takes: on the side where vectors are long and steps few, else at once, before it.
  __attribute__((always_inline)) auto take(int64_t steps) {
    const char* first = at_;
    at_ += steps * step_;
    if constexpr (W == 16) {
      return Ahead{first, step_};
    } else {
      fetch(first, at_ < end_ ? at_ : end_);
      return NothingAhead{};
    }
  }

  void take_all() const { fetch(at_, end_); }

 private:
  static void fetch(const char* begin, const char* end) {
    for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 2);
  }

  const char *at_, *end_;
  int64_t step_;
};

// Rows [begin, begin + count) times panels [first, last). Sums are made of sums of P::kDepth products, whatever the
// blocks: no result depends on who computes it.
template <typename P, typename O>
void linear_block(const LinearTask& t, int64_t begin, int64_t count, int64_t first, int64_t last, float* scratch) {
  using T = typename P::T;
  constexpr int64_t kColumns = 2 * W;
  float* sums = scratch;                              // (count, 2 W)
  float* widened = sums + kLinearRows * kColumns;     // (kLinearDepth, 2 W)
  float* copied = widened + kLinearDepth * kColumns;  // (count, k)
  const auto* weight = static_cast<const T*>(t.panels);
  const T* weight_end = weight + last * t.k * kColumns;
  const auto depth_at = [&](int64_t k) { return t.k - k < P::kDepth ? t.k - k : P::kDepth; };
  const int64_t tiles = (count + kRows - 1) / kRows;
  // between fewer tiles there is no time for bursts
  const bool fetches = W == 16 || tiles >= 4;
  const T* ahead = weight + first * t.k * kColumns;
  const auto until = [&](int64_t depth) {
    return !fetches ? ahead : weight_end - ahead < depth * kColumns ? weight_end : ahead + depth * kColumns;
  };
  // what comes first has nothing to come beside but the layer norm
  Share(ahead, until(depth_at(0)), 1).take_all();
  int64_t apart;
  const auto* a = P::left_rows(t, begin, count, copied, &apart);
  for (int64_t panel = first; panel < last; ++panel) {
    const T* b = weight + panel * t.k * kColumns;
    int64_t k = 0;
    do {  // once where k is 0, for zeros
      const int64_t depth = depth_at(k);
      ahead = b + (k + depth) * kColumns;
      Share next(ahead, until(depth), tiles * (depth / P::kStep));
      const auto* part = P::part(b + k * kColumns, depth, widened);
      for_each_tile(count, [&](int64_t i, int64_t rows) {
        if (k + depth == t.k) fetch_out<O>(t, begin + i, rows, panel * kColumns);
        P::multiply(rows, a + i * apart + k, apart, part, depth, sums + i * kColumns, k > 0,
                    next.take(depth / P::kStep));
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
