// Layer norms and linear layers of panel_layers.h. The work is a list of (block of rows, panel of the weight); each
// thread takes a run of it and writes what nobody else writes. Where there are rows enough, a run is whole blocks: a
// thread then finds in its own caches what it wrote in the layer before, and normalises each row once. With fewer rows
// the way of all weights to all threads would cost more. Sums do not depend on the blocks, so that results depend on no
// thread count.
#include "panel_layers.h"

#include <algorithm>

namespace mtvit_ops {
namespace {

constexpr int64_t kWorthThreads = 1 << 19;  // multiplications, some 20 microseconds: fewer wake no other thread
constexpr int64_t kOwnRows = 24;            // from so many on a thread keeps to rows of its own: see below
constexpr int64_t kTokensAWeight = 8;       // that are multiplied while the weights for one come from memory

int64_t num_panels(int64_t n) {
  return (n + kernels().panel_columns - 1) / kernels().panel_columns;
}

LinearTask task_of(const Stream& stream, const PanelLayer& layer, const Panels& panels) {
  LinearTask t{};
  t.dtype = t.out_dtype = stream.dtype;
  t.k = layer.k;
  t.n = layer.n;
  t.panels = panels.data;
  return t;
}

// Memory for the float32 copies of a step's vectors.
float* room_for(int64_t floats, Buffer& large) {
  return static_cast<float*>(kept_memory(Place::vectors, floats * 4, large));
}

}  // namespace

Vector::Vector(const char* name, const Tensor& given) : size_(given.numel()), dtype_(check_dtype(name, given)) {
  if (!given.is_contiguous()) packed_ = as_contiguous(given);
  data_ = (packed_ ? *packed_ : given).data_ptr();
}

const float* Vector::floats(float*& scratch) const {
  if (data_ == nullptr || dtype_ == Dtype::f32) return static_cast<const float*>(data_);
  float* copy = scratch;
  kernels().to_float32(dtype_, data_, copy, size_);
  scratch += round_up(size_, kMaxWidth);
  return copy;
}

PanelNorm::PanelNorm(const Tensor& weight, const Tensor& bias, double eps)
    : weight("norm_weight", weight), bias("norm_bias", bias), eps(static_cast<float>(eps)) {}

PanelLayer::PanelLayer(const Tensor& weight, const Tensor* bias) : k(weight.size(1)) {
  if (weight.dim() == 3) {
    panels = weight.data_ptr();
    n = weight.size(0) * kernels().panel_columns;
  } else {
    plain = &weight;
    n = weight.size(0);
  }
  if (bias != nullptr) this->bias = Vector("bias", *bias);
}

Stream::Stream(const Tensor& given, const std::optional<Tensor>& listed, bool written)
    : dtype(check_dtype("x", given)),
      x(mutable_data<char>(given)),
      num_rows(given.size(0)),
      width(given.size(1)),
      stride(given.stride(0)),
      tokens(num_rows) {
  MTVIT_CHECK(width <= 1 || given.stride(1) == 1, "x must be contiguous in its last dimension");
  MTVIT_CHECK(!written || num_rows <= 1 || stride >= width, "rows of x must not overlap");
  if (!listed) return;
  list = int32_vector("rows", *listed);
  tokens = list.size(0);
  rows = data<int32_t>(list);
  check_rows(rows, tokens, num_rows);
}

Panels::Panels(const PanelLayer& layer) : data(layer.panels) {
  if (layer.plain == nullptr) return;
  const Tensor& weight = *layer.plain;
  const auto element = static_cast<int64_t>(weight.element_size());
  copy_ = allocate((num_panels(layer.n) * layer.k * kernels().panel_columns * element + 3) / 4);
  data = copy_.get();
  pack(weight, copy_.get());
}

void Panels::pack(const Tensor& weight, void* panels) {
  const Tensor w = dense_rows(weight);
  const Kernels& native = kernels();
  const int64_t n = w.size(0), k = w.size(1);
  const Dtype dtype = check_dtype("weight", w);
  torch::stable::parallel_for(0, num_panels(n), row_grain(k * native.panel_columns), [&](int64_t begin, int64_t end) {
    native.pack_weight(dtype, w.data_ptr(), w.stride(0), n, k, panels, begin, end);
  });
}

void run_linear(const LinearTask& t, int64_t tokens) {
  const int64_t panels = num_panels(t.n);
  if (tokens == 0 || panels == 0) return;
  const Kernels& native = kernels();
  // the left factor of a block stays in the L2 cache: 256 KiB, but enough rows to pay for a panel's way there
  const int64_t fitting = std::clamp<int64_t>(65536 / std::max<int64_t>(t.k, 1), 4 * kMaxRows, kLinearRows);
  int64_t blocks = (tokens + fitting - 1) / fitting;
  const int64_t threads = torch::stable::get_num_threads();
  if (tokens >= threads * kOwnRows) blocks = round_up(blocks, threads);
  const int64_t most = (tokens + blocks - 1) / blocks;
  const bool copies = t.norm_weight != nullptr || t.dtype != Dtype::f32;
  const int64_t unit = most * native.panel_columns * std::max<int64_t>(t.k, 1);
  const int64_t work = std::max(tokens, kTokensAWeight) * t.n * t.k;
  const int64_t grain = work < kWorthThreads ? blocks * panels : std::max<int64_t>(32768 / unit, 1);
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    Buffer large;
    float* scratch = thread_scratch(linear_scratch_floats(most, copies ? t.k : 0), large);
    while (begin < end) {
      const int64_t block = begin / panels, first = begin % panels, last = std::min(panels, first + end - begin);
      const int64_t row = block * tokens / blocks, count = (block + 1) * tokens / blocks - row;
      native.linear(t, row, count, first, last, scratch);
      begin += last - first;
    }
  });
}

void linear_of_norm(const Stream& stream, const PanelNorm& norm, const PanelLayer& layer, bool gelu, void* out) {
  const Panels panels(layer);
  Buffer large;
  float* room = room_for(2 * round_up(layer.k, kMaxWidth) + round_up(layer.n, kMaxWidth), large);
  LinearTask t = task_of(stream, layer, panels);
  t.a = stream.x;
  t.a_stride = stream.stride;
  t.a_rows = stream.rows;
  t.norm_weight = norm.weight.floats(room);
  t.norm_bias = norm.bias.floats(room);
  t.eps = norm.eps;
  t.bias = layer.bias.floats(room);
  t.gelu = gelu;
  t.out = out;
  t.out_stride = layer.n;
  run_linear(t, stream.tokens);
}

void linear_residual(const Stream& stream, const void* a, const PanelLayer& layer) {
  const Panels panels(layer);
  Buffer large;
  float* room = room_for(round_up(layer.n, kMaxWidth), large);
  LinearTask t = task_of(stream, layer, panels);
  t.a = a;
  t.a_stride = layer.k;
  t.bias = layer.bias.floats(room);
  t.out = stream.x;
  t.out_stride = stream.stride;
  t.rows = stream.rows;
  t.residual = t.rounds = true;
  run_linear(t, stream.tokens);
}

}  // namespace mtvit_ops
