// Plain C interface between the operators (bindings.cpp) and the CUDA kernels: neither side sees the other's headers,
// so the .cu files compile with the CUDA toolkit alone. All tensors are contiguous unless a stride is given; all
// functions return 0 or a cudaError_t, and only queue work on the stream.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum MtvitDtype { MTVIT_F32 = 0, MTVIT_BF16 = 1, MTVIT_F16 = 2, MTVIT_F64 = 3 };

struct MtvitSelection {
  const void* scores;          // (T,), may be null with mask
  const int32_t* rows;         // (T,) or null: entry i is row i
  const int32_t* cu_seqlens;   // (B + 1,)
  const uint8_t* mask;         // (T,) or null: the rule
  const int32_t* keep_counts;  // (B,) or null: the rule
  int64_t tokens, batch;
  int64_t keep;        // >= 0: the rule
  uint64_t threshold;  // the rule where there is no other: bits of a number of the scores' dtype
  int64_t num_prefix_tokens;
  int32_t by_score, return_dropped;
  int32_t dtype;  // of the scores
  int64_t capacity, dropped_capacity;
  int32_t *out, *out_cu;          // (capacity,), (B + 1,)
  int32_t *dropped, *dropped_cu;  // (dropped_capacity,), (B + 1,)
  int32_t* counts;                // (B,), scratch for mask and threshold
  int32_t* marks;                 // (T,), scratch where T exceeds mtvit_cuda_select_limit()
};

struct MtvitHalting {
  const void* x;                                 // (R, D), rows x_stride apart
  const int32_t* rows;                           // (T,) or null
  const int32_t* cu_seqlens;                     // (B + 1,)
  const int32_t* readout;                        // (P,)
  const float *cumulative, *remainder, *ponder;  // (R,)
  const int32_t* counters;                       // (R,)
  const float* output;                           // (P, D)
  int64_t num_rows, dim, x_stride, tokens, batch, num_readout;
  float gate_scale, gate_center, bar;  // bar: 1 - eps
  int32_t last;
  int32_t dtype;                                               // of x
  float *new_cumulative, *new_remainder, *new_ponder, *score;  // (R,)
  int32_t* new_counters;                                       // (R,)
  float* new_output;                                           // (P, D)
  int32_t *next, *next_cu;                                     // (T,), (B + 1,)
  float* share;                                                // (R,), scratch
  int32_t *going, *counts;                                     // (T,), (B,), scratch
};

// Tokens of one image that the token_select kernel sorts in shared memory.
int64_t mtvit_cuda_select_limit(void);
int mtvit_cuda_token_select(const struct MtvitSelection* selection, void* stream);
int mtvit_cuda_halting_step(const struct MtvitHalting* step, void* stream);

// out[i] = x[rows[i]], zeros where rows[i] is negative; strides and widths in bytes.
int mtvit_cuda_gather_rows(const void* x, int64_t x_stride, const int32_t* rows, int64_t num_rows, int64_t width,
                           void* out, void* stream);
// x[rows[i]] = y[i], unless rows[i] is negative.
int mtvit_cuda_scatter_rows(void* x, int64_t x_stride, const int32_t* rows, int64_t num_rows, int64_t width,
                            const void* y, int64_t y_stride, void* stream);

const char* mtvit_cuda_error_string(int code);

#ifdef __cplusplus
}
#endif
