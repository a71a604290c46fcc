// halting_step on the CPU: one layer of A-ViT's halting in one pass over channel 0 of the live rows and the readout
// rows.
//   x (R, D), rows (T,) or none (row i), cu_seqlens (B + 1,), readout_rows (P,)
//   cumulative, remainder, ponder (R,) float32, counters (R,) int32, output (P, D) float32: the state, not written to
// Entries past cu_seqlens[B] and dead ones (-1) are skipped; R, T, B or P may be 0. Images are independent, and so are
// readout rows: threads write disjoint parts.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace mtvit_ops {
namespace {

struct Gate {
  float scale, center, bar;  // a token halts once its sum reaches the bar, 1 - eps
  bool last;
};

void check_state(const char* name, const Tensor& t, int64_t length, bool counts = false) {
  check_length(name, t, length);
  MTVIT_CHECK(counts ? is_int32(t) : is_float32(t), name, " must be ", counts ? "int32" : "float32");
}

struct State {
  float *cumulative, *remainder, *ponder, *score;
  int32_t* counters;
  float* share;  // (R,): the weight with which this layer's token enters the output
};

// One token; true if it lives on.
bool step_token(const Gate& gate, const State& s, int64_t row, float channel) {
  const float score = 1.0f / (1.0f + std::exp(-(channel * gate.scale - gate.center)));
  const float step = gate.last ? 1.0f : score;
  const float grown = s.cumulative[row] + step;
  const bool reached = grown > gate.bar, going = grown < gate.bar;
  s.score[row] = score;
  s.share[row] = reached ? s.remainder[row] : going ? step : step * 0.0f;  // NaN for NaN
  s.cumulative[row] = grown;
  s.ponder[row] += reached ? 1.0f + s.remainder[row] : 1.0f;
  s.remainder[row] -= step * static_cast<float>(going);  // a NaN stays one
  s.counters[row] += going;
  return going;
}

template <typename T>
void run(const Gate& gate, const State& s, const Tensor& x, const int32_t* rows, const int32_t* cu, int64_t batch,
         const int32_t* readout, int64_t num_readout, float* output, std::vector<int32_t>& going,
         std::vector<int32_t>& counts) {
  const T* values = data<T>(x);
  const int64_t stride = x.stride(0), d = x.size(1);
  constexpr int64_t kImages = 8;  // a thread's least share: an image takes a microsecond
  torch::stable::parallel_for(0, batch, kImages, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t* out = going.data() + cu[b];
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
        const int32_t row = rows ? rows[i] : static_cast<int32_t>(i);
        if (row >= 0 && step_token(gate, s, row, static_cast<float>(values[row * stride]))) *out++ = row;
      }
      counts[b] = static_cast<int32_t>(out - (going.data() + cu[b]));
    }
  });
  torch::stable::parallel_for(0, num_readout, row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = readout[p];
      if (row < 0) continue;
      const float share = s.share[row];
      for (int64_t c = 0; c < d; ++c) output[p * d + c] += share * static_cast<float>(values[row * stride + c]);
    }
  });
}

}  // namespace

void check_halting(const Tensor& x, const Tensor& readout_rows, const Tensor& cumulative, const Tensor& remainder,
                   const Tensor& ponder, const Tensor& counters, const Tensor& output) {
  const int64_t num_rows = x.size(0), d = x.size(1);
  MTVIT_CHECK(d >= 1, "x must have at least one channel, got ", shape_of(x));
  const Tensor readout = int32_vector("readout_rows", readout_rows);
  const int64_t num_readout = readout.size(0);
  check_rows(data<int32_t>(readout), num_readout, num_rows, "readout_rows", 0);
  check_state("cumulative", cumulative, num_rows);
  check_state("remainder", remainder, num_rows);
  check_state("ponder", ponder, num_rows);
  check_state("counters", counters, num_rows, true);
  check_dim("output", output, 2, "(P, D)");
  MTVIT_CHECK(output.size(0) == num_readout && output.size(1) == d && is_float32(output),
              "output must be float32 of shape (", num_readout, ", ", d, "), got ", shape_of(output));
}

Halted halting_step(const Tensor& tokens, std::optional<Tensor> rows, const Tensor& cu_seqlens,
                    const Tensor& readout_rows, const Tensor& cumulative, const Tensor& remainder, const Tensor& ponder,
                    const Tensor& counters, const Tensor& output, double gate_scale, double gate_center, double eps,
                    bool last) {
  check_dim("x", tokens, 2, "(R, D)");
  const Tensor x = dense_rows(tokens);
  const Dtype dtype = check_dtype("x", x);
  const int64_t num_rows = x.size(0);
  const Tensor cu = cu_seqlens_vector("cu_seqlens", cu_seqlens);
  const Tensor readout = int32_vector("readout_rows", readout_rows);
  const int64_t batch = cu.size(0) - 1, num_readout = readout.size(0);
  Tensor list;
  if (rows) {
    list = int32_vector("rows", *rows);
    check_rows(data<int32_t>(list), list.size(0), num_rows);
  }
  const int64_t count = rows ? list.size(0) : num_rows;
  const auto* offsets = data<int32_t>(cu);
  check_cu_seqlens("cu_seqlens", offsets, batch, count);
  check_halting(x, readout, cumulative, remainder, ponder, counters, output);

  Tensor new_cumulative = copy_of<1>(cumulative);
  Tensor new_remainder = copy_of<1>(remainder);
  Tensor new_ponder = copy_of<1>(ponder);
  Tensor new_counters = copy_of<1>(counters);
  Tensor new_output = copy_of<2>(output);
  Tensor score = empty_float32(std::array{num_rows});
  Tensor next = empty_int32(std::array{count});
  Tensor next_cu = empty_int32(std::array{batch + 1});

  std::fill_n(mutable_data<float>(score), num_rows, 0.0f);
  std::vector<float> share(static_cast<size_t>(num_rows), 0.0f);
  std::vector<int32_t> going(static_cast<size_t>(count)), counts(static_cast<size_t>(batch));
  const Gate gate{static_cast<float>(gate_scale), static_cast<float>(gate_center), static_cast<float>(1.0 - eps), last};
  const State state{mutable_data<float>(new_cumulative), mutable_data<float>(new_remainder),
                    mutable_data<float>(new_ponder),     mutable_data<float>(score),
                    mutable_data<int32_t>(new_counters), share.data()};
  const auto* live = rows ? data<int32_t>(list) : nullptr;
  const auto call = [&](auto kernel) {
    kernel(gate, state, x, live, offsets, batch, data<int32_t>(readout), num_readout, mutable_data<float>(new_output),
           going, counts);
  };
  if (dtype == Dtype::f32) {
    call(run<float>);
  } else if (dtype == Dtype::bf16) {
    call(run<torch::headeronly::BFloat16>);
  } else {
    call(run<torch::headeronly::Half>);
  }

  auto* out = mutable_data<int32_t>(next);
  auto* ends = mutable_data<int32_t>(next_cu);
  ends[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    ends[b + 1] = ends[b] + counts[b];
    std::copy_n(going.data() + offsets[b], counts[b], out + ends[b]);
  }
  std::fill(out + ends[batch], out + count, -1);
  return {new_cumulative, new_remainder, new_ponder, new_counters, new_output, score, next, next_cu};
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "halting_step(Tensor x, Tensor? rows, Tensor cu_seqlens, Tensor readout_rows, Tensor cumulative, Tensor "
      "remainder, "
      "Tensor ponder, Tensor counters, Tensor output, float gate_scale, float gate_center, float eps, bool last) -> "
      "(Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score, Tensor rows, "
      "Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("halting_step", TORCH_BOX(&mtvit_ops::halting_step));
}
