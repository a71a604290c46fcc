// Inner loops over rows: layer norm through a list, scaled addition through a list.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

// Sum of f(vector of x, lanes that hold one of its d elements), in four chains: one would wait for every addition.
template <typename E, typename F>
MTVIT_INLINE Vec sum_over(const typename E::T* x, int64_t d, F f) {
  const IVec all = IVec{} - 1;
  Vec chain[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= d; j += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) chain[i] += f(E::load(x + j + i * W), all);
  }
  for (; j + W <= d; j += W) chain[0] += f(E::load(x + j), all);
  if (j < d) {
    IVec lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    chain[1] += f(load_part<E>(x + j, d - j), lane < IVec{} + int32_t(d - j));
  }
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

template <typename E, typename Out = E>
void layer_norm_rows(const LayerNormTask& t, int64_t begin, int64_t end) {
  using T = typename E::T;
  using To = typename Out::T;
  const int64_t d = t.d, full = d / W * W, rest = d - full;
  const Vec zero{};
  for (int64_t i = begin; i < end; ++i) {
    To* out = static_cast<To*>(t.out) + i * d;
    const int64_t row = t.rows ? t.rows[i] : i;
    if (row < 0) {
      if (d > 0) __builtin_memset(out, 0, sizeof(To) * d);
      if (t.mean) t.mean[i] = t.rstd[i] = 0.0f;
      continue;
    }
    const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
    // statistics in float32 whatever the dtype, in two passes: no cancellation; the row stays in the L1 cache
    const float mean = sum(sum_over<E>(x, d, [](Vec value, IVec) { return value; })) / float(d);
    const float squares = sum(sum_over<E>(x, d, [&](Vec value, IVec in_row) {
      const Vec off = in_row ? value - mean : zero;
      return off * off;
    }));
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(d) + t.eps);
    for (int64_t j = 0; j < full; j += W) {
      Out::store(out + j, (E::load(x + j) - mean) * rstd * load(t.weight + j) + load(t.bias + j));
    }
    if (rest) {
      const Vec normal = (load_part<E>(x + full, rest) - mean) * rstd;
      store_part<Out>(out + full, normal * load_part<F32>(t.weight + full, rest) + load_part<F32>(t.bias + full, rest),
                      rest);
    }
    if (!t.mean) continue;
    t.mean[i] = mean;
    t.rstd[i] = rstd;
  }
}

template <typename E>
void scatter_residual_rows(const ScatterTask& t, int64_t begin, int64_t end) {
  using T = typename E::T;
  const int64_t d = t.d, full = d / W * W, rest = d - full;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = t.rows ? t.rows[i] : i;
    if (row < 0) continue;
    T* x = static_cast<T*>(t.x) + row * t.x_stride;
    const T* y = static_cast<const T*>(t.y) + i * t.y_stride;
    const float factor = t.row_scale ? t.row_scale[i] : 1.0f;
    // float32 inside, one rounding at the end
    if (t.column_scale) {
      for (int64_t j = 0; j < full; j += W) {
        E::store(x + j, E::load(x + j) + E::load(y + j) * load(t.column_scale + j));
      }
      if (rest) {
        const Vec step = load_part<E>(y + full, rest) * load_part<F32>(t.column_scale + full, rest);
        store_part<E>(x + full, load_part<E>(x + full, rest) + step, rest);
      }
    } else {
      for (int64_t j = 0; j < full; j += W) E::store(x + j, E::load(x + j) + E::load(y + j) * factor);
      if (rest) {
        store_part<E>(x + full, load_part<E>(x + full, rest) + load_part<E>(y + full, rest) * factor, rest);
      }
    }
  }
}

}  // namespace
}  // namespace mtvit_ops
