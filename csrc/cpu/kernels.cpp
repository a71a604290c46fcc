// Compiled once per instruction set; MTVIT_OPS_ISA_<level> says which.
#include "kernels.h"

#include "attention_backward_tile.h"
#include "attention_tile.h"
#include "linear_tile.h"
#include "predictor_tile.h"
#include "row_kernels.h"
#include "simd.h"

namespace mtvit_ops {
namespace {

// The member of a family of kernels that is made for a dtype.
#define MTVIT_BY_DTYPE(dtype, kernel, ...)                      \
  do {                                                          \
    if (dtype == Dtype::f32) return kernel<F32>(__VA_ARGS__);   \
    if (dtype == Dtype::bf16) return kernel<BF16>(__VA_ARGS__); \
    return kernel<F16>(__VA_ARGS__);                            \
  } while (false)

void attention(const AttentionTask& t) {
  MTVIT_BY_DTYPE(t.dtype, attention_blocks, t);
}

void attention_backward(const AttentionBackwardTask& t) {
  MTVIT_BY_DTYPE(t.dtype, attention_gradients, t);
}

void layer_norm(const LayerNormTask& t, int64_t begin, int64_t end) {
  MTVIT_BY_DTYPE(t.dtype, layer_norm_rows, t, begin, end);
}

void scatter_residual(const ScatterTask& t, int64_t begin, int64_t end) {
  MTVIT_BY_DTYPE(t.dtype, scatter_residual_rows, t, begin, end);
}

void predict_tail(const PredictorTask& t, int64_t image, float* scratch, float* logits) {
  MTVIT_BY_DTYPE(t.dtype, predict_tail_of, t, image, scratch, logits);
}

void pack_weight(Dtype dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* panels, int64_t begin,
                 int64_t end) {
#ifdef MTVIT_OPS_BF16_DOTS
  if (dtype == Dtype::bf16 && k % 2 == 0) {
    return pack_weight_pairs(static_cast<const uint16_t*>(weight), stride, n, k, static_cast<float*>(panels), begin,
                             end);
  }
#endif
  MTVIT_BY_DTYPE(dtype, pack_weight_panels, weight, stride, n, k, panels, begin, end);
}

template <typename E, typename P = Widened<E>>
void linear_of(const LinearTask& t, int64_t begin, int64_t count, int64_t first, int64_t last, float* scratch) {
  MTVIT_ASSERT(count <= kLinearRows);
  // results have the factors' dtype, or float32
  if (t.out_dtype == t.dtype) return linear_block<P, E>(t, begin, count, first, last, scratch);
  linear_block<P, F32>(t, begin, count, first, last, scratch);
}

void linear(const LinearTask& t, int64_t begin, int64_t count, int64_t first, int64_t last, float* scratch) {
#ifdef MTVIT_OPS_BF16_DOTS
  if (t.dtype == Dtype::bf16 && t.k % 2 == 0) return linear_of<BF16, Pairs>(t, begin, count, first, last, scratch);
#endif
  MTVIT_BY_DTYPE(t.dtype, linear_of, t, begin, count, first, last, scratch);
}

template <typename E>
void to_float32_array(const void* x, float* out, int64_t n) {
  const auto* from = static_cast<const typename E::T*>(x);
  const int64_t full = n / W * W;
  for (int64_t i = 0; i < full; i += W) store(out + i, E::load(from + i));
  if (full < n) store_part<F32>(out + full, load_part<E>(from + full, n - full), n - full);
}

void to_float32(Dtype dtype, const void* x, float* out, int64_t n) {
  MTVIT_BY_DTYPE(dtype, to_float32_array, x, out, n);
}

void exp2_array(const float* x, float* out, int64_t n) {
  const int64_t full = n / W * W;
  for (int64_t i = 0; i < full; i += W) store(out + i, exp2(load(x + i)));
  if (full < n) store_part<F32>(out + full, exp2(load_part<F32>(x + full, n - full)), n - full);
}

}  // namespace

#define MTVIT_KERNELS(level)                                                                                       \
  const Kernels kernels_##level {                                                                                  \
    #level, attention, attention_backward, layer_norm, scatter_residual, predict_tail, 2 * W, pack_weight, linear, \
        to_float32, exp2_array                                                                                     \
  }

#if defined(MTVIT_OPS_ISA_avx512bf16)
MTVIT_KERNELS(avx512bf16);
#elif defined(MTVIT_OPS_ISA_avx512)
MTVIT_KERNELS(avx512);
#elif defined(MTVIT_OPS_ISA_avx2)
MTVIT_KERNELS(avx2);
#else
MTVIT_KERNELS(portable);
#endif

}  // namespace mtvit_ops
