// Attention of one head of one image: O = softmax(Q K^T + bias) V, in float32 whatever the dtype.
//
// K^T and V are packed once into panels of 2 W columns, which both products then read front to back. kGroupRows queries
// at a time meet all keys: whole rows of logits stay in the cache, so that softmax needs no rescaling and each
// probability is final when it is first seen. Every row's result is independent of the rows beside it.
#pragma once
#include "gemm.h"
#ifdef MTVIT_OPS_BF16_DOTS
#include "gemm_bf16.h"
#endif
#include "kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;

// Numbers in N chains, N vectors at a time: one chain would wait for each of its links.
template <int N, typename F>
MTVIT_INLINE void in_chains(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + N * W <= end; j += N * W) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) f(n, j + n * W);
  }
  for (; j < end; j += W) f(0, j);
}

// Logits in base 2 (columns, a multiple of W) to unnormalised probabilities, in place. bias, with -inf past the last
// key, may be null; then tail does the same for the last vector. Returns the sum; *top gets the greatest logit.
MTVIT_INLINE float softmax_row(float* s, int64_t columns, const float* bias, Vec tail, float* top) {
  constexpr int kChains = 4;
  Vec greatest[kChains];
#pragma GCC unroll 4
  for (Vec& each : greatest) each = splat(-__builtin_inff());
  if (bias) {
    in_chains<kChains>(0, columns, [&](int n, int64_t j) {
      const Vec x = load(s + j) + load(bias + j);
      store(s + j, x);
      greatest[n] = max(x, greatest[n]);
    });
  } else {
    in_chains<kChains>(0, columns - W, [&](int n, int64_t j) { greatest[n] = max(load(s + j), greatest[n]); });
    const Vec x = load(s + columns - W) + tail;
    store(s + columns - W, x);
    greatest[0] = max(x, greatest[0]);
  }
  *top = max(max(max(greatest[0], greatest[1]), max(greatest[2], greatest[3])));
  // a row without any key keeps its -inf and sums to 0; one with a NaN sums to NaN
  const float shift = *top == -__builtin_inff() ? 0.0f : *top;
  Vec total[kChains] = {};
  in_chains<kChains>(0, columns, [&](int n, int64_t j) {
    const Vec p = exp2(load(s + j) - shift);
    store(s + j, p);
    total[n] += p;
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Logits of a group of queries, in base 2: float32 products, whatever the dtype.
template <typename E>
struct Logits {
  int64_t d, depth, columns, lds;
  float *k_panels, *queries, *logits;
  float scale;

  void pack(const typename E::T* k, int64_t stride, int64_t nk) const { pack_keys<E>(k, stride, nk, d, k_panels); }

  void multiply(const typename E::T* q, int64_t stride, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i, q += stride) {
      int64_t c = 0;
      for (; c + W <= d; c += W) store(queries + i * depth + c, E::load(q + c) * scale);
      if (c < d) store(queries + i * depth + c, load_part<E>(q + c, d - c) * scale);
    }
    mtvit_ops::multiply(rows, queries, depth, k_panels, d, logits, lds, columns);
  }
};

#ifdef MTVIT_OPS_BF16_DOTS
// Pairs of bfloat16 products, exact before they are added.
template <>
struct Logits<BF16> {
  int64_t d, depth, columns, lds;
  float *k_panels, *queries, *logits;
  float scale;

  void pack(const uint16_t* k, int64_t stride, int64_t nk) const { pack_key_pairs(k, stride, nk, d, k_panels); }

  void multiply(const uint16_t* q, int64_t stride, int64_t rows) const {
    const int64_t pairs = num_pairs(d);
    for (int64_t i = 0; i < rows; ++i, q += stride) {
      for (int64_t c = 0; c < pairs; c += W) store(queries + i * depth + c, load_pairs(q + 2 * c, d - 2 * c));
    }
    multiply_pairs(rows, queries, depth, k_panels, pairs, logits, lds, columns, scale);
  }
};
#endif

// Values of a group of queries: unnormalised probabilities, which it may overwrite, times V.
template <typename E>
struct Mixed {
  int64_t nk, dv, values, lds;
  float *v_panels, *result;

  void pack(const typename E::T* v, int64_t stride) const { pack_values<E>(v, stride, nk, dv, v_panels); }

  void multiply(float* probabilities, int64_t rows) const {
    mtvit_ops::multiply(rows, probabilities, lds, v_panels, nk, result, values, values);
  }
};

#ifdef MTVIT_OPS_BF16_DOTS
// Probabilities rounded to bfloat16, as V is; their sum is not.
template <>
struct Mixed<BF16> {
  int64_t nk, dv, values, lds;
  float *v_panels, *result;

  void pack(const uint16_t* v, int64_t stride) const { pack_value_pairs(v, stride, nk, dv, v_panels); }

  void multiply(float* probabilities, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = probabilities + i * lds;
      auto* rounded = reinterpret_cast<uint16_t*>(row);  // half as long: never ahead of what is still to be read
      for (int64_t j = 0; j < nk; j += W) BF16::store(rounded + j, load(row + j));
    }
    multiply_pairs(rows, probabilities, lds, v_panels, num_pairs(nk), result, values, values, 1.0f);
  }
};
#endif

// sums (N * W) += rows of logits times their factors, in N chains: one would wait for every addition.
template <int N>
MTVIT_INLINE void add_columns(int64_t rows, const float* logits, int64_t lds, const float* factors, float* sums) {
  Vec column[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) column[n] = load(sums + n * W);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec factor = splat(factors[i]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] += load(logits + i * lds + n * W) * factor;
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(sums + n * W, column[n]);
}

template <typename E>
void attention_blocks(const AttentionTask& t) {
  using T = typename E::T;
  const int64_t nk = t.nk, d = t.d, dv = t.dv;
  const int64_t columns = round_up(nk, W), depth = round_up(d, W), values = round_up(dv, W);
  const int64_t lds = columns + W;  // W more, so that rows of 2^n logits do not fall into one cache set
  float* k_panels = t.scratch;
  float* v_panels = k_panels + round_up(columns * d, kMaxWidth);
  float* logits = v_panels + round_up(nk * values, kMaxWidth);
  float* queries = logits + round_up(kGroupRows * lds, kMaxWidth);
  float* result = queries + round_up(kGroupRows * depth, kMaxWidth);
  float* after = result + round_up(kGroupRows * values, kMaxWidth);
  float* bias = t.bias ? after : nullptr;
  MTVIT_ASSERT(after + (t.bias ? columns : 0) <= t.scratch + scratch_floats(nk, d, dv));

  const Logits<E> product{d, depth, columns, lds, k_panels, queries, logits, t.scale * kLog2E};
  product.pack(static_cast<const T*>(t.k), t.k_stride, nk);
  const Mixed<E> mixed{nk, dv, values, lds, v_panels, result};
  mixed.pack(static_cast<const T*>(t.v), t.v_stride);
  Vec tail;
  for (int i = 0; i < W; ++i) tail[i] = columns - W + i < nk ? 0.0f : -__builtin_inff();
  if (bias) {
    for (int64_t j = 0; j < columns; ++j) bias[j] = j < nk ? t.bias[j * t.bias_stride] * kLog2E : -__builtin_inff();
  }

  const int64_t blocks = num_blocks(t.nq);
  for (int64_t block = t.block_begin; block < t.block_end; ++block) {
    const int64_t end = (block + 1) * t.nq / blocks;
    float* sums = t.block_sums ? t.block_sums + block * round_up(nk, kMaxWidth) : nullptr;
    if (sums) __builtin_memset(sums, 0, sizeof(float) * columns);
    for (int64_t row = block * t.nq / blocks; row < end;) {
      const int64_t rows = end - row < kGroupRows ? end - row : kGroupRows;
      product.multiply(static_cast<const T*>(t.q) + row * t.q_stride, t.q_stride, rows);
      float inverse[kGroupRows];
      for (int64_t i = 0; i < rows; ++i) {
        float top;
        const float total = softmax_row(logits + i * lds, columns, bias, tail, &top);
        inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
        if (t.lse == nullptr) continue;
        t.lse[row + i] = total == 0.0f ? -__builtin_inff() : float(double(top) * kLn2 + double(__builtin_logf(total)));
      }
      if (t.class_row && row == 0) {
        for (int64_t j = 0; j < nk; ++j) t.class_row[j] = logits[j] * inverse[0];
      }
      if (sums) {
        int64_t j = 0;
        for (; j + 4 * W <= columns; j += 4 * W) add_columns<4>(rows, logits + j, lds, inverse, sums + j);
        for (; j < columns; j += W) add_columns<1>(rows, logits + j, lds, inverse, sums + j);
      }
      mixed.multiply(logits, rows);
      for (int64_t i = 0; i < rows; ++i) {
        T* out = static_cast<T*>(t.out) + (row + i) * t.out_stride;
        const float* from = result + i * values;
        // no key, no value: 0 * inf must not leak in
        const bool empty = inverse[i] == 0.0f;
        int64_t c = 0;
        for (; c + W <= dv; c += W) E::store(out + c, empty ? Vec{} : load(from + c) * inverse[i]);
        if (c < dv) store_part<E>(out + c, empty ? Vec{} : load(from + c) * inverse[i], dv - c);
      }
      row += rows;
    }
  }
}

}  // namespace
}  // namespace mtvit_ops
