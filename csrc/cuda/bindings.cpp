// Operators mtvit_ops_cuda::*: checks, allocation, one call of the C interface each. They only queue work.
//
// Nothing of CUDA is linked but its static runtime, which finds the driver when it is first needed: the library loads
// under a PyTorch for the CPU, too.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace mtvit_ops {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

// In libtorch_cuda, which a PyTorch for the CPU lacks: looked up, not linked. It is loaded already; a search without
// its name would miss it, since Python loads PyTorch's libraries for themselves alone.
void* current_stream(const Tensor& on) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  MTVIT_CHECK(get, "this PyTorch has no CUDA");
  void* stream = nullptr;
  MTVIT_CHECK(get(on.get_device_index(), &stream) == 0, "the current CUDA stream was not to be had");
  return stream;
}

void check_launch(const char* name, int code) {
  MTVIT_CHECK(code == 0, name, ": CUDA error: ", mtvit_cuda_error_string(code));
}

struct Door {
  const Tensor& first;  // decides the device

  void check(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape) const {
    MTVIT_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), name,
                " must be a CUDA tensor on the device of the others");
    MTVIT_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
    bool fits = t.dim() == static_cast<int64_t>(shape.size());
    int64_t i = 0;
    for (const int64_t size : shape) fits = fits && t.size(i++) == size;
    MTVIT_CHECK(fits, name, " has the wrong shape, got ", shape_of(t));
  }

  // Contiguous, after a check.
  Tensor take(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape) const {
    check(name, t, type, shape);
    return contiguous(t);
  }
};

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

int32_t dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return MTVIT_F32;
    case ScalarType::BFloat16:
      return MTVIT_BF16;
    case ScalarType::Half:
      return MTVIT_F16;
    default:
      MTVIT_CHECK(t.scalar_type() == ScalarType::Double, name, " must be floating-point");
      return MTVIT_F64;
  }
}

// The number that PyTorch compares scores of a dtype with.
uint64_t threshold_bits(int32_t dtype, double threshold) {
  const auto single = static_cast<float>(threshold);
  if (dtype == MTVIT_F32) return std::bit_cast<uint32_t>(single);
  if (dtype == MTVIT_BF16) return torch::headeronly::BFloat16(single).x;
  if (dtype == MTVIT_F16) return torch::headeronly::Half(single).x;
  return std::bit_cast<uint64_t>(threshold);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_select(std::optional<Tensor> scores, std::optional<Tensor> rows,
                                                        const Tensor& cu_seqlens, std::optional<Tensor> mask,
                                                        std::optional<Tensor> keep_counts, int64_t keep,
                                                        std::optional<double> threshold, int64_t num_prefix_tokens,
                                                        bool by_score, int64_t capacity, bool return_dropped,
                                                        int64_t dropped_capacity) {
  const int rules = (keep >= 0) + keep_counts.has_value() + threshold.has_value() + mask.has_value();
  MTVIT_CHECK(rules == 1, "exactly one of keep, keep_counts, threshold and mask must be given, got ", rules);
  MTVIT_CHECK(scores || mask, "scores must be given unless mask is");
  MTVIT_CHECK(num_prefix_tokens >= 0 && capacity >= 0 && dropped_capacity >= 0,
              "num_prefix_tokens and capacities must be at least 0");
  MTVIT_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must have shape (B + 1,)");
  const Door door{cu_seqlens};
  const Tensor& given = scores ? *scores : *mask;
  MTVIT_CHECK(given.dim() == 1, "scores and mask must have shape (T,)");
  const int64_t tokens = given.size(0), batch = cu_seqlens.size(0) - 1;
  const Tensor cu = door.take("cu_seqlens", cu_seqlens, ScalarType::Int, {batch + 1});
  const int32_t dtype = scores ? dtype_of("scores", *scores) : MTVIT_F32;
  if (scores) scores = door.take("scores", *scores, scores->scalar_type(), {tokens});
  if (rows) rows = door.take("rows", *rows, ScalarType::Int, {tokens});
  if (mask) mask = door.take("mask", *mask, ScalarType::Bool, {tokens});
  if (keep_counts) keep_counts = door.take("keep_counts", *keep_counts, ScalarType::Int, {batch});

  const DeviceGuard guard(cu.get_device_index());
  const Tensor out = new_empty(cu, {capacity}), out_cu = new_empty(cu, {batch + 1});
  const Tensor dropped = new_empty(cu, {return_dropped ? dropped_capacity : 0});
  const Tensor dropped_cu = new_empty(cu, {batch + 1});
  const Tensor counts = new_empty(cu, {threshold || mask ? batch : 0});
  const Tensor marks = new_empty(cu, {tokens > mtvit_cuda_select_limit() ? tokens : 0});
  const MtvitSelection selection{
      .scores = scores ? scores->data_ptr() : nullptr,
      .rows = pointer<int32_t>(rows),
      .cu_seqlens = data<int32_t>(cu),
      .mask = pointer<uint8_t>(mask),
      .keep_counts = pointer<int32_t>(keep_counts),
      .tokens = tokens,
      .batch = batch,
      .keep = keep,
      .threshold = threshold ? threshold_bits(dtype, *threshold) : 0,
      .num_prefix_tokens = num_prefix_tokens,
      .by_score = by_score,
      .return_dropped = return_dropped,
      .dtype = dtype,
      .capacity = capacity,
      .dropped_capacity = dropped_capacity,
      .out = mutable_data<int32_t>(out),
      .out_cu = mutable_data<int32_t>(out_cu),
      .dropped = mutable_data<int32_t>(dropped),
      .dropped_cu = mutable_data<int32_t>(dropped_cu),
      .counts = mutable_data<int32_t>(counts),
      .marks = mutable_data<int32_t>(marks),
  };
  check_launch("token_select", mtvit_cuda_token_select(&selection, current_stream(cu)));
  return {out, out_cu, dropped, dropped_cu};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> halting_step(
    const Tensor& tokens, std::optional<Tensor> rows, const Tensor& cu_seqlens, const Tensor& readout_rows,
    const Tensor& cumulative, const Tensor& remainder, const Tensor& ponder, const Tensor& counters,
    const Tensor& output, double gate_scale, double gate_center, double eps, bool last) {
  MTVIT_CHECK(tokens.dim() == 2 && tokens.size(1) >= 1, "x must have shape (R, D) and a channel, got ",
              shape_of(tokens));
  MTVIT_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must have shape (B + 1,)");
  MTVIT_CHECK(readout_rows.dim() == 1 && (!rows || rows->dim() == 1), "rows and readout_rows must have one dimension");
  const int32_t dtype = dtype_of("x", tokens);
  MTVIT_CHECK(dtype != MTVIT_F64, "x must be float32, bfloat16 or float16");
  const Door door{tokens};
  const int64_t num_rows = tokens.size(0), d = tokens.size(1), batch = cu_seqlens.size(0) - 1;
  const int64_t num_readout = readout_rows.size(0), listed = rows ? rows->size(0) : num_rows;
  door.check("x", tokens, tokens.scalar_type(), {num_rows, d});
  const Tensor x = d == 1 || tokens.stride(1) == 1 ? tokens : contiguous(tokens);
  if (rows) rows = door.take("rows", *rows, ScalarType::Int, {listed});
  const Tensor cu = door.take("cu_seqlens", cu_seqlens, ScalarType::Int, {batch + 1});
  const Tensor readout = door.take("readout_rows", readout_rows, ScalarType::Int, {num_readout});
  const auto state = [&](const char* name, const Tensor& t) {
    return door.take(name, t, ScalarType::Float, {num_rows});
  };
  const Tensor sums = state("cumulative", cumulative), left = state("remainder", remainder);
  const Tensor lived = state("ponder", ponder), layers = door.take("counters", counters, ScalarType::Int, {num_rows});
  const Tensor read = door.take("output", output, ScalarType::Float, {num_readout, d});

  const DeviceGuard guard(x.get_device_index());
  const auto floats = [&] { return new_empty(sums, {num_rows}); };
  const auto ints = [&](int64_t size) { return new_empty(cu, {size}); };
  const Tensor new_sums = floats(), new_left = floats(), new_lived = floats(), score = floats(), share = floats();
  const Tensor new_layers = ints(num_rows), next = ints(listed), next_cu = ints(batch + 1);
  const Tensor going = ints(listed), counts = ints(batch);
  const Tensor new_output = new_empty(read, {num_readout, d});
  const MtvitHalting step{
      .x = x.data_ptr(),
      .rows = pointer<int32_t>(rows),
      .cu_seqlens = data<int32_t>(cu),
      .readout = data<int32_t>(readout),
      .cumulative = data<float>(sums),
      .remainder = data<float>(left),
      .ponder = data<float>(lived),
      .counters = data<int32_t>(layers),
      .output = data<float>(read),
      .num_rows = num_rows,
      .dim = d,
      .x_stride = x.stride(0),
      .tokens = listed,
      .batch = batch,
      .num_readout = num_readout,
      .gate_scale = static_cast<float>(gate_scale),
      .gate_center = static_cast<float>(gate_center),
      .bar = static_cast<float>(1.0 - eps),
      .last = last,
      .dtype = dtype,
      .new_cumulative = mutable_data<float>(new_sums),
      .new_remainder = mutable_data<float>(new_left),
      .new_ponder = mutable_data<float>(new_lived),
      .score = mutable_data<float>(score),
      .new_counters = mutable_data<int32_t>(new_layers),
      .new_output = mutable_data<float>(new_output),
      .next = mutable_data<int32_t>(next),
      .next_cu = mutable_data<int32_t>(next_cu),
      .share = mutable_data<float>(share),
      .going = mutable_data<int32_t>(going),
      .counts = mutable_data<int32_t>(counts),
  };
  check_launch("halting_step", mtvit_cuda_halting_step(&step, current_stream(x)));
  return {new_sums, new_left, new_lived, new_layers, new_output, score, next, next_cu};
}

// x (R, D): where its rows lie, in bytes; a last stride other than 1 is the caller's to mend.
int64_t row_stride(const char* name, const Tensor& x) {
  MTVIT_CHECK(x.dim() == 2, name, " must have two dimensions, got ", shape_of(x));
  MTVIT_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must have rows without gaps");
  return x.stride(0) * static_cast<int64_t>(x.element_size());
}

Tensor gather_rows(const Tensor& tokens, const Tensor& rows) {
  const Tensor x = tokens.dim() == 2 && tokens.size(1) > 1 && tokens.stride(1) != 1 ? contiguous(tokens) : tokens;
  const int64_t stride = row_stride("x", x);
  MTVIT_CHECK(rows.dim() == 1, "rows must have shape (T,), got ", shape_of(rows));
  const Door door{x};
  door.check("x", x, x.scalar_type(), {x.size(0), x.size(1)});
  const Tensor list = door.take("rows", rows, ScalarType::Int, {rows.size(0)});
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = new_empty(x, {list.size(0), x.size(1)});
  const int64_t width = x.size(1) * static_cast<int64_t>(x.element_size());
  check_launch("gather_rows", mtvit_cuda_gather_rows(x.data_ptr(), stride, data<int32_t>(list), list.size(0), width,
                                                     out.data_ptr(), current_stream(x)));
  return out;
}

void scatter_rows_(Tensor x, const Tensor& rows, const Tensor& values) {
  const int64_t x_stride = row_stride("x", x);
  MTVIT_CHECK(rows.dim() == 1, "rows must have shape (T,), got ", shape_of(rows));
  const Door door{x};
  door.check("x", x, x.scalar_type(), {x.size(0), x.size(1)});
  const Tensor list = door.take("rows", rows, ScalarType::Int, {rows.size(0)});
  const Tensor y = door.take("y", values, x.scalar_type(), {list.size(0), x.size(1)});
  const DeviceGuard guard(x.get_device_index());
  const int64_t width = x.size(1) * static_cast<int64_t>(x.element_size());
  check_launch("scatter_rows_", mtvit_cuda_scatter_rows(x.data_ptr(), x_stride, data<int32_t>(list), list.size(0),
                                                        width, y.data_ptr(), width, current_stream(x)));
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY(mtvit_ops_cuda, m) {
  m.def(
      "token_select(Tensor? scores, Tensor? rows, Tensor cu_seqlens, Tensor? mask, Tensor? keep_counts, int keep, "
      "float? threshold, int num_prefix_tokens, bool by_score, int capacity, bool return_dropped, "
      "int dropped_capacity) -> (Tensor rows, Tensor cu_seqlens, Tensor dropped_rows, Tensor dropped_cu_seqlens)");
  m.def(
      "halting_step(Tensor x, Tensor? rows, Tensor cu_seqlens, Tensor readout_rows, Tensor cumulative, Tensor "
      "remainder, Tensor ponder, Tensor counters, Tensor output, float gate_scale, float gate_center, float eps, bool "
      "last) -> (Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score, "
      "Tensor rows, Tensor cu_seqlens)");
  m.def("gather_rows(Tensor x, Tensor rows) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) x, Tensor rows, Tensor y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cuda, CUDA, m) {
  m.impl("token_select", TORCH_BOX(&mtvit_ops::token_select));
  m.impl("halting_step", TORCH_BOX(&mtvit_ops::halting_step));
  m.impl("gather_rows", TORCH_BOX(&mtvit_ops::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&mtvit_ops::scatter_rows_));
}
