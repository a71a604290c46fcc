// One layer of A-ViT's halting, in place, on what an operator has checked.
#pragma once
#include "kernels.h"

namespace mtvit_ops {

struct HaltingTask {
  Dtype dtype;
  const void* x;  // (R, d), row stride x_stride
  int64_t num_rows, d, x_stride;
  const int32_t *rows, *cu_seqlens;  // (T,) or null: row i; (batch + 1,)
  int64_t batch, count;              // count: T
  const int32_t* readout_rows;       // (num_readout,)
  int64_t num_readout;
  float *cumulative, *remainder, *ponder;  // (R,), the state
  int32_t* counters;                       // (R,)
  float* output;                           // (num_readout, d)
  float* score;                            // (R,): of this layer, 0 where nobody lived
  int32_t *next_rows, *next_cu_seqlens;    // (T,), -1 behind the live ones; (batch + 1,)
  float gate_scale, gate_center, bar;      // a token halts once its sum reaches the bar, 1 - eps
};

void halt(const HaltingTask& t, bool last);

}  // namespace mtvit_ops
