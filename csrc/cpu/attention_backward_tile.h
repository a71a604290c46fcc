// Gradients of O = softmax(Q K^T + bias) V for one head of one image, in float32 whatever the dtype.
//
// A block of queries at a time: P = exp(S - lse) and dS = P (dP - sum(P dP)) are computed once and stay in the cache,
// then dQ = dS K, dK += dS^T Q, dV += P^T dO. Sums over queries run in the order of the blocks, whose size depends on
// the lengths alone.
#pragma once
#include "attention_tile.h"
#include "gemm.h"

namespace mtvit_ops {
namespace {

// rows (n, d) as float32 rows of stride `columns`, zero past d, times a factor.
template <typename E>
void widen(const typename E::T* from, int64_t stride, int64_t n, int64_t d, float factor, float* to, int64_t columns) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t c = 0;
    for (; c + W <= d; c += W) store(to + i * columns + c, E::load(from + i * stride + c) * factor);
    if (c < d) store(to + i * columns + c, load_part<E>(from + i * stride + c, d - c) * factor);
  }
}

// The reverse: rows times a factor, rounded to the dtype.
template <typename E>
void narrow(const float* from, int64_t columns, int64_t n, int64_t d, float factor, typename E::T* to, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t c = 0;
    for (; c + W <= d; c += W) E::store(to + i * stride + c, load(from + i * columns + c) * factor);
    if (c < d) store_part<E>(to + i * stride + c, load(from + i * columns + c) * factor, d - c);
  }
}

// Rows of logits in base 2 to probabilities, and rows of their gradients to the logits' gradients, in place.
MTVIT_INLINE void gradient_row(float* s, float* ds, int64_t columns, const float* bias, Vec tail, float lse,
                               bool alone) {
  // no key, no probability
  const float shift = lse == -__builtin_inff() ? __builtin_inff() : lse * kLog2E;
  Vec product{};
  for (int64_t j = 0; j < columns; j += W) {
    Vec x = load(s + j);
    if (bias) {
      x += load(bias + j);
    } else if (j == columns - W) {
      x += tail;
    }
    const Vec p = exp2(x - shift);
    store(s + j, p);
    product += p * load(ds + j);
  }
  const float mean = sum(product);
  // the weight of a single key is 1, whatever its logit
  for (int64_t j = 0; j < columns; j += W) store(ds + j, alone ? Vec{} : load(s + j) * (load(ds + j) - mean));
}

template <typename E>
void attention_gradients(const AttentionBackwardTask& t) {
  using T = typename E::T;
  const int64_t nq = t.nq, nk = t.nk, d = t.d, dv = t.dv;
  const int64_t columns = round_up(nk, W), depth = round_up(d, W), values = round_up(dv, W);
  const int64_t lds = columns + W;  // W more, so that rows of 2^n logits do not fall into one cache set
  const int64_t block = backward_block(nq, nk);
  float* free = t.scratch;
  const auto take = [&free](int64_t floats) {
    float* taken = free;
    free += round_up(floats, kMaxWidth);
    return taken;
  };
  float* k_turned = take(columns * d);
  float* k_panels = take(nk * depth);
  float* v_turned = take(columns * dv);
  float* queries = take(block * depth);
  float* q_panels = take(block * depth);
  float* grads = take(block * values);
  float* grad_panels = take(block * values);
  float* s = take(block * lds);
  float* ds = take(block * lds);
  float* grad_q = take(block * depth);
  float* grad_k = take(nk * depth);
  float* grad_v = take(nk * values);
  float* grad_bias = take(columns);
  float* bias = t.bias ? take(columns) : nullptr;
  MTVIT_ASSERT(free <= t.scratch + backward_scratch_floats(nq, nk, d, dv));

  const auto* k = static_cast<const T*>(t.k);
  const auto* v = static_cast<const T*>(t.v);
  pack_keys<E>(k, t.k_stride, nk, d, k_turned);
  pack_values<E>(k, t.k_stride, nk, d, k_panels);
  pack_keys<E>(v, t.v_stride, nk, dv, v_turned);
  Vec tail;
  for (int i = 0; i < W; ++i) tail[i] = columns - W + i < nk ? 0.0f : -__builtin_inff();
  if (bias) {
    for (int64_t j = 0; j < columns; ++j) bias[j] = j < nk ? t.bias[j * t.bias_stride] * kLog2E : -__builtin_inff();
  }
  __builtin_memset(grad_bias, 0, sizeof(float) * columns);

  for (int64_t first = 0; first < nq; first += block) {
    const int64_t n = nq - first < block ? nq - first : block;
    const T* q = static_cast<const T*>(t.q) + first * t.q_stride;
    const T* grad = static_cast<const T*>(t.grad_out) + first * t.grad_out_stride;
    widen<E>(q, t.q_stride, n, d, t.scale * kLog2E, queries, depth);
    pack_values<E>(q, t.q_stride, n, d, q_panels);
    widen<E>(grad, t.grad_out_stride, n, dv, 1.0f, grads, values);
    pack_values<E>(grad, t.grad_out_stride, n, dv, grad_panels);
    for (int64_t row = 0; row < n; row += kGroupRows) {
      const int64_t rows = n - row < kGroupRows ? n - row : kGroupRows;
      multiply(rows, queries + row * depth, depth, k_turned, d, s + row * lds, lds, columns);
      multiply(rows, grads + row * values, values, v_turned, dv, ds + row * lds, lds, columns);
      for (int64_t i = row; i < row + rows; ++i) {
        gradient_row(s + i * lds, ds + i * lds, columns, bias, tail, t.lse[(first + i) * t.lse_stride], nk == 1);
      }
      for (int64_t j = 0; j < columns; j += W) {
        Vec column = load(grad_bias + j);
        for (int64_t i = row; i < row + rows; ++i) column += load(ds + i * lds + j);
        store(grad_bias + j, column);
      }
      multiply(rows, ds + row * lds, lds, k_panels, nk, grad_q + row * depth, depth, depth);
    }
    narrow<E>(grad_q, depth, n, d, t.scale, static_cast<T*>(t.grad_q) + first * t.grad_q_stride, t.grad_q_stride);
    multiply<true>(nk, ds, lds, q_panels, n, grad_k, depth, depth, first > 0);
    multiply<true>(nk, s, lds, grad_panels, n, grad_v, values, values, first > 0);
  }
  narrow<E>(grad_k, depth, nk, d, t.scale, static_cast<T*>(t.grad_k), t.grad_k_stride);
  narrow<E>(grad_v, values, nk, dv, 1.0f, static_cast<T*>(t.grad_v), t.grad_v_stride);
  for (int64_t j = 0; j < nk; ++j) t.grad_bias[j * t.grad_bias_stride] = grad_bias[j];
}

}  // namespace
}  // namespace mtvit_ops
