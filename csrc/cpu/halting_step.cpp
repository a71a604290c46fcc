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
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "halting.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace mtvit_ops {
namespace {

void check_state(const char* name, const Tensor& t, int64_t length, bool counts = false) {
  check_length(name, t, length);
  MTVIT_CHECK(counts ? is_int32(t) : is_float32(t), name, " must be ", counts ? "int32" : "float32");
}

// One token, whose share is the weight with which it enters the output; true if it lives on.
bool step_token(const HaltingTask& t, bool last, int64_t row, float channel, float* share) {
  const float score = 1.0f / (1.0f + std::exp(-(channel * t.gate_scale - t.gate_center)));
  const float step = last ? 1.0f : score;
  const float grown = t.cumulative[row] + step;
  const bool reached = grown > t.bar, going = grown < t.bar;
  t.score[row] = score;
  share[row] = reached ? t.remainder[row] : going ? step : step * 0.0f;  // NaN for NaN
  t.cumulative[row] = grown;
  t.ponder[row] += reached ? 1.0f + t.remainder[row] : 1.0f;
  t.remainder[row] -= step * static_cast<float>(going);  // a NaN stays one
  t.counters[row] += going;
  return going;
}

template <typename T>
void run(const HaltingTask& t, bool last, std::vector<int32_t>& counts) {
  const T* values = static_cast<const T*>(t.x);
  std::vector<float> shares(static_cast<size_t>(t.num_rows), 0.0f);
  float* share = shares.data();
  constexpr int64_t kImages = 8;  // a thread's least share: an image takes a microsecond
  torch::stable::parallel_for(0, t.batch, kImages, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = t.cu_seqlens[b];
      int32_t* out = t.next_rows + first;
      for (int64_t i = first; i < t.cu_seqlens[b + 1]; ++i) {
        const int32_t row = t.rows ? t.rows[i] : static_cast<int32_t>(i);
        if (row >= 0 && step_token(t, last, row, static_cast<float>(values[row * t.x_stride]), share)) *out++ = row;
      }
      counts[b] = static_cast<int32_t>(out - (t.next_rows + first));
    }
  });
  torch::stable::parallel_for(0, t.num_readout, row_grain(t.d), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = t.readout_rows[p];
      if (row < 0) continue;
      const T* token = values + row * t.x_stride;
      for (int64_t c = 0; c < t.d; ++c) t.output[p * t.d + c] += share[row] * static_cast<float>(token[c]);
    }
  });
}

}  // namespace

void halt(const HaltingTask& t, bool last) {
  std::vector<int32_t> counts(static_cast<size_t>(t.batch));
  std::fill_n(t.score, t.num_rows, 0.0f);
  if (t.dtype == Dtype::f32) {
    run<float>(t, last, counts);
  } else if (t.dtype == Dtype::bf16) {
    run<torch::headeronly::BFloat16>(t, last, counts);
  } else {
    run<torch::headeronly::Half>(t, last, counts);
  }
  // each image's list moves up to the one before it
  int32_t live = 0;
  for (int64_t b = 0; b < t.batch; ++b) {
    const int32_t* from = t.next_rows + t.cu_seqlens[b];
    t.next_cu_seqlens[b] = live;
    std::copy(from, from + counts[b], t.next_rows + live);
    live += counts[b];
  }
  t.next_cu_seqlens[t.batch] = live;
  std::fill(t.next_rows + live, t.next_rows + t.count, -1);
}

namespace {

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

  HaltingTask t{};
  const auto fresh = [](Tensor copy, auto& memory) {
    memory = static_cast<std::decay_t<decltype(memory)>>(copy.data_ptr());
    return copy;
  };
  const Tensor new_cumulative = fresh(copy_of<1>(cumulative), t.cumulative);
  const Tensor new_remainder = fresh(copy_of<1>(remainder), t.remainder);
  const Tensor new_ponder = fresh(copy_of<1>(ponder), t.ponder);
  const Tensor new_counters = fresh(copy_of<1>(counters), t.counters);
  const Tensor new_output = fresh(copy_of<2>(output), t.output);
  const Tensor score = fresh(empty_float32(std::array{num_rows}), t.score);
  const Tensor next = fresh(empty_int32(std::array{count}), t.next_rows);
  const Tensor next_cu = fresh(empty_int32(std::array{batch + 1}), t.next_cu_seqlens);
  t.dtype = dtype;
  t.x = x.data_ptr();
  t.num_rows = num_rows;
  t.d = x.size(1);
  t.x_stride = x.stride(0);
  t.rows = rows ? data<int32_t>(list) : nullptr;
  t.cu_seqlens = offsets;
  t.batch = batch;
  t.count = count;
  t.readout_rows = data<int32_t>(readout);
  t.num_readout = num_readout;
  t.gate_scale = static_cast<float>(gate_scale);
  t.gate_center = static_cast<float>(gate_center);
  t.bar = static_cast<float>(1.0 - eps);
  halt(t, last);
  return {new_cumulative, new_remainder, new_ponder, new_counters, new_output, score, next, next_cu};
}

}  // namespace
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
