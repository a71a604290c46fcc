// The inner loops of the CPU operators: plain C interface, because each is compiled once per instruction set.
// Nothing from the standard library here or in what kernels.cpp includes: an inline function compiled for AVX-512
// could otherwise be the copy that the linker keeps for everyone.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mtvit_ops {

// What the operators guarantee their kernels; looked at in a debug build (MTVIT_OPS_DEBUG=1) only.
#ifdef MTVIT_OPS_DEBUG
#define MTVIT_ASSERT(condition)                                                                  \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      __builtin_printf("mtvit_ops: %s does not hold (%s:%d)\n", #condition, __FILE__, __LINE__); \
      __builtin_trap();                                                                          \
    }                                                                                            \
  } while (false)
#else
#define MTVIT_ASSERT(condition) static_cast<void>(0)
#endif

enum class Dtype : int { f32, bf16, f16 };

constexpr size_t element_size(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : 2;
}

inline constexpr int64_t kMaxWidth = 16;             // floats in the widest vector
inline constexpr int64_t kMaxRows = 12;              // query rows of the tallest tile
inline constexpr int64_t kGroupRows = 2 * kMaxRows;  // queries that meet all keys at a time

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Queries are taken in blocks of about this many rows; column sums are kept per block, so that their order of
// addition depends on the lengths alone.
constexpr int64_t num_blocks(int64_t num_queries) {
  const int64_t blocks = (num_queries + kGroupRows - 1) / kGroupRows;
  return blocks < 64 ? blocks : 64;
}

// One head of one image, query blocks [block_begin, block_end). Strides in elements.
struct AttentionTask {
  Dtype dtype;
  const void *q, *k, *v;  // first token of the image in this head: (nq, d), (nk, d), (nk, dv)
  void* out;              // (nq, dv)
  float* lse;             // (nq,) or null
  const float* bias;      // (nk,) or null
  float* class_row;       // (nk,): probabilities of the first query, or null
  float* block_sums;      // (blocks, round_up(nk, kMaxWidth)): column sums of each block's probabilities, or null
  float* scratch;         // scratch_floats(nk, d, dv) floats, 64-byte aligned
  int64_t q_stride, k_stride, v_stride, out_stride, bias_stride;
  int64_t nq, nk, d, dv;  // nq > 0 and nk > 0
  int64_t block_begin, block_end;
  float scale;
};

// Keys and values in float32 panels; logits, queries and results of a group of rows; biases.
constexpr int64_t scratch_floats(int64_t nk, int64_t d, int64_t dv) {
  const int64_t keys = round_up(nk, kMaxWidth), depth = round_up(d, kMaxWidth), values = round_up(dv, kMaxWidth);
  return keys * depth + keys * values + kGroupRows * (keys + kMaxWidth + depth + values) + keys;
}

// One head of one image: gradients of q, k, v and of the bias. Strides in elements.
struct AttentionBackwardTask {
  Dtype dtype;
  const void *grad_out, *q, *k, *v;  // (nq, dv), (nq, d), (nk, d), (nk, dv)
  const float* lse;                  // (nq,)
  const float* bias;                 // (nk,) or null
  void *grad_q, *grad_k, *grad_v;    // (nq, d), (nk, d), (nk, dv)
  float* grad_bias;                  // (nk,)
  float* scratch;                    // backward_scratch_floats(nq, nk, d, dv) floats, 64-byte aligned
  int64_t grad_out_stride, q_stride, k_stride, v_stride, lse_stride, bias_stride;
  int64_t grad_q_stride, grad_k_stride, grad_v_stride, grad_bias_stride;
  int64_t nq, nk, d, dv;  // nq > 0 and nk > 0
  float scale;
};

// Queries whose probabilities are kept at once: some 64 thousand numbers, so that they stay in the cache.
constexpr int64_t backward_block(int64_t nq, int64_t nk) {
  const int64_t most = round_up(65536 / (nk + 1) + 1, kMaxRows);
  return most < nq ? most : nq;
}

// K, K^T and V^T; of a block of queries q and grad_out, as they are and in panels, probabilities and their gradients,
// and the gradient of q; the gradients of K and V; biases and their gradients.
constexpr int64_t backward_scratch_floats(int64_t nq, int64_t nk, int64_t d, int64_t dv) {
  const int64_t keys = round_up(nk, kMaxWidth), depth = round_up(d, kMaxWidth), values = round_up(dv, kMaxWidth);
  const int64_t block = backward_block(nq, nk);
  return keys * (2 * depth + values) + 2 * block * (depth + values) + 2 * block * (keys + kMaxWidth) + block * depth +
         keys * (depth + values) + 2 * keys + 16 * kMaxWidth;
}

struct LayerNormTask {
  Dtype dtype;
  const void* x;               // (R, d), row stride x_stride
  const int32_t* rows;         // (T,) or null: row i
  const float *weight, *bias;  // (d,)
  void* out;                   // (T, d)
  float *mean, *rstd;          // (T,)
  int64_t d, x_stride;
  float eps;
};

struct ScatterTask {
  Dtype dtype;
  void* x;                                // (R, d), row stride x_stride
  const int32_t* rows;                    // (T,) or null: row i
  const void* y;                          // (T, d), row stride y_stride
  const float *column_scale, *row_scale;  // (d,), (T,); null: 1
  int64_t d, x_stride, y_stride;
};

// Rows times the transposed weight. Panels: pack_weight's; bias and scales in float32.
struct LinearTask {
  Dtype dtype, out_dtype;
  const void* a;                          // (T, k), row stride a_stride
  const int32_t* a_rows;                  // with a layer norm: the row of `a` to read, -1: zeros; null: row i
  const float *norm_weight, *norm_bias;   // (k,): a layer norm on the way in; null: none
  const void* panels;                     // of the weight (n, k), dtype of `a`
  const float* bias;                      // (n,), or null
  void* out;                              // (T, n), or with a residual (R, n); row stride out_stride
  const int32_t* rows;                    // with a residual: the row to add to, -1: none; null: row i
  const float *column_scale, *row_scale;  // of the residual: (n,), (T,); null: 1
  int64_t k, n, a_stride, out_stride;
  float eps;
  bool gelu, residual, rounds;  // rounds: the residual adds what has been rounded to x's dtype
};

inline constexpr int64_t kLinearDepth = 256;  // of one sum: half a panel of float32 in the L1 cache
inline constexpr int64_t kLinearRows = 204;   // most rows of one block

// Sums of a block, a panel's part as float32, the block's left factor.
constexpr int64_t linear_scratch_floats(int64_t rows, int64_t k) {
  return (kLinearRows + kLinearDepth) * 2 * kMaxWidth + rows * k;
}

// Where the pixels of a resampled side come from: pixel i is the sum of weights[i * most + k] times pixel start[i] + k.
struct Taps {
  const int32_t *start, *length;  // (count,); a length of 0: the pixel is 0
  const float* weights;           // (count, most)
  int64_t count, most;
};

// MT-ViT's tail predictor. Layers: the first convolution, then of each pair the depthwise and the pointwise one, with
// their batch norms folded in; weights (taps or inputs, width), widths padded with zeros to multiples of kMaxWidth.
struct PredictorTask {
  Dtype dtype;
  const void* images;  // (B, channels, height, width)
  int64_t channels, height, width;
  Taps rows, columns;           // three pixels for each position of the first convolution
  const int64_t* widths;        // (1 + pairs,): channels behind the first convolution and behind each pair
  const float* const* weights;  // (1 + 2 * pairs,)
  const float* const* shifts;
  const float *head, *head_bias;  // (tails, padded width), (tails,)
  int64_t pairs, outputs, most_activations;
};

// A strip of resampled rows, the pixels, and the activations before and behind a layer.
constexpr int64_t predictor_scratch_floats(const PredictorTask& t) {
  return round_up(t.width, kMaxWidth) * kMaxWidth + t.channels * t.columns.count * round_up(t.rows.count, kMaxWidth) +
         2 * t.most_activations;
}

struct Kernels {
  const char* name;
  void (*attention)(const AttentionTask&);
  void (*attention_backward)(const AttentionBackwardTask&);
  void (*layer_norm)(const LayerNormTask&, int64_t begin, int64_t end);
  void (*scatter_residual)(const ScatterTask&, int64_t begin, int64_t end);
  void (*predict_tail)(const PredictorTask&, int64_t image, float* scratch, float* logits);
  int64_t panel_columns;  // rows of a weight that a panel holds
  void (*pack_weight)(Dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* panels, int64_t begin,
                      int64_t end);
  void (*linear)(const LinearTask&, int64_t begin, int64_t count, int64_t first_panel, int64_t last_panel,
                 float* scratch);
  void (*to_float32)(Dtype, const void* x, float* out, int64_t n);
  void (*exp2)(const float* x, float* out, int64_t n);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512bf16;

// The level this CPU runs best, or the one MTVIT_OPS_ISA names; throws where the CPU lacks that one.
const Kernels& kernels();

}  // namespace mtvit_ops
