// Vectors of W floats as GCC and Clang know them, and how float32, bfloat16 and float16 get in and out of them.
// Included by kernels.cpp alone, once per instruction set.
#pragma once
#include <stdint.h>
#ifdef MTVIT_OPS_BF16_DOTS
#include <immintrin.h>
#endif

namespace mtvit_ops {
namespace {

#if defined(MTVIT_OPS_ISA_avx512) || defined(MTVIT_OPS_ISA_avx512bf16)
constexpr int W = 16;
constexpr int kRows = 12;  // 12 x 2 accumulators, 2 vectors of B and a broadcast in 32 registers
#elif defined(MTVIT_OPS_ISA_avx2)
constexpr int W = 8;
constexpr int kRows = 6;  // 6 x 2 + 2 + 1 of 16 registers
#else
constexpr int W = 4;
constexpr int kRows = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IVec __attribute__((vector_size(4 * W)));
typedef uint32_t UVec __attribute__((vector_size(4 * W)));
typedef uint16_t HVec __attribute__((vector_size(2 * W)));

#define MTVIT_INLINE static inline __attribute__((always_inline))

template <typename To, typename From>
MTVIT_INLINE To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

MTVIT_INLINE Vec splat(float x) {
  return x - Vec{};
}  // x - 0 is x, for -0 too

MTVIT_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

MTVIT_INLINE void store(float* p, Vec x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// The lanes of x, lane i ^ STEP in lane i's place.
template <int STEP>
MTVIT_INLINE Vec swapped(Vec x) {
  IVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i ^ STEP;
#ifdef __clang__
  Vec y;
  for (int i = 0; i < W; ++i) y[i] = x[lane[i]];
  return y;
#else
  return __builtin_shuffle(x, lane);
#endif
}

// Lane 0 of halves added to halves, until one lane is left.
MTVIT_INLINE float sum(Vec x) {
  if constexpr (W > 8) x += swapped<8>(x);
  if constexpr (W > 4) x += swapped<4>(x);
  x += swapped<2>(x);
  return x[0] + x[1];
}

MTVIT_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

MTVIT_INLINE float max(Vec x) {
  if constexpr (W > 8) x = max(x, swapped<8>(x));
  if constexpr (W > 4) x = max(x, swapped<4>(x));
  x = max(x, swapped<2>(x));
  return x[0] > x[1] ? x[0] : x[1];
}

// 2^x for x <= 0. Within 2 ulp for x >= -126; from there to -127 results are subnormal, below it they are 0. -inf gives
// 0, NaN gives NaN. The polynomial is a minimax fit of 2^f on [-1/2, 1/2], relative error 1.9e-9.
MTVIT_INLINE Vec exp2(Vec x) {
  x = max(splat(-127.0f), x);  // in this order a NaN stays
  constexpr float kMagic = 0x1.8p23f + 127.0f;
  const Vec shifted = x + kMagic;  // the integer part, rounded, plus the exponent's bias: the lowest mantissa bits
  const Vec f = x - (shifted - kMagic);
  Vec p = splat(1.534581242594868e-4f);
  p = p * f + 1.3399930903688073e-3f;
  p = p * f + 9.618489071726799e-3f;
  p = p * f + 5.550328642129898e-2f;
  p = p * f + 2.4022646248340607e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  const IVec power = bits<IVec>(shifted) << 23;
  return p * bits<Vec>(power);
}

struct F32 {
  using T = float;
  MTVIT_INLINE Vec load(const T* p) { return mtvit_ops::load(p); }
  MTVIT_INLINE void store(T* p, Vec x) { mtvit_ops::store(p, x); }
};

MTVIT_INLINE UVec load_16(const uint16_t* p) {
  HVec h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, UVec);
}

MTVIT_INLINE void store_16(uint16_t* p, UVec x) {
  const HVec h = __builtin_convertvector(x, HVec);
  __builtin_memcpy(p, &h, sizeof h);
}

struct BF16 {
  using T = uint16_t;
  MTVIT_INLINE Vec load(const T* p) { return bits<Vec>(load_16(p) << 16); }
  MTVIT_INLINE void store(T* p, Vec x) {
#ifdef MTVIT_OPS_BF16_DOTS
    const auto wide = bits<__m512>(x);
    constexpr int kSubnormal = 0x20;  // which the instruction would make 0
    if (__builtin_expect(_mm512_fpclass_ps_mask(wide, kSubnormal) == 0, 1)) {
      const __m256bh h = _mm512_cvtneps_pbh(wide);
      __builtin_memcpy(p, &h, sizeof h);
      return;
    }
#endif
    const UVec u = bits<UVec>(x);
    const UVec nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // ties to even
    store_16(p, (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : nearest);
  }
};

struct F16 {
  using T = uint16_t;
  MTVIT_INLINE Vec load(const T* p) {
    const UVec h = load_16(p);
    const UVec magnitude = (h & 0x7fff) << 13;
    // the exponent's bias grows from 15 to 127; exact, and subnormals come out right
    const UVec finite = bits<UVec>(bits<Vec>(magnitude) * 0x1p112f);
    const UVec special = magnitude >= (0x7c00 << 13) ? finite | 0x7f800000 : finite;  // inf, NaN
    return bits<Vec>(special | (h & 0x8000) << 16);
  }
  MTVIT_INLINE void store(T* p, Vec x) {
    const UVec u = bits<UVec>(x), magnitude = u & 0x7fffffff;
    const UVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // ties to even
    // 0.5's last place is half's smallest subnormal, so that the addition rounds there
    const UVec tiny = bits<UVec>(bits<Vec>(magnitude) + 0.5f) - 0x3f000000;
    UVec h = magnitude < (113u << 23) ? tiny : normal;
    h = magnitude >= (143u << 23) ? UVec{} + 0x7c00 : h;
    h = magnitude > 0x7f800000 ? UVec{} + 0x7e00 : h;
    store_16(p, h | ((u >> 16) & 0x8000));
  }
};

// The first n < W elements; the rest of the vector is zero.
template <typename E>
MTVIT_INLINE Vec load_part(const typename E::T* p, int64_t n) {
  typename E::T buffer[W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return E::load(buffer);
}

template <typename E>
MTVIT_INLINE void store_part(typename E::T* p, Vec x, int64_t n) {
  typename E::T buffer[W];
  E::store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// Interleaves the lower (HALF = 0) or upper (HALF = 1) halves of two vectors.
template <int HALF>
MTVIT_INLINE Vec zip(Vec a, Vec b) {
#ifdef __clang__
#define MTVIT_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MTVIT_SHUFFLE(...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif
  constexpr int o = HALF * W / 2;
#if defined(MTVIT_OPS_ISA_avx512) || defined(MTVIT_OPS_ISA_avx512bf16)
  return MTVIT_SHUFFLE(o, o + 16, o + 1, o + 17, o + 2, o + 18, o + 3, o + 19, o + 4, o + 20, o + 5, o + 21, o + 6,
                       o + 22, o + 7, o + 23);
#elif defined(MTVIT_OPS_ISA_avx2)
  return MTVIT_SHUFFLE(o, o + 8, o + 1, o + 9, o + 2, o + 10, o + 3, o + 11);
#else
  return MTVIT_SHUFFLE(o, o + 4, o + 1, o + 5);
#endif
#undef MTVIT_SHUFFLE
}

// W rows of W floats become columns: log2(W) rounds of the perfect shuffle of rows i and i + W/2.
MTVIT_INLINE void transpose(Vec (&rows)[W]) {
#pragma GCC unroll 4
  for (int step = W; step > 1; step /= 2) {
    Vec next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = zip<0>(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = zip<1>(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace mtvit_ops
