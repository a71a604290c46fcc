// Several blocks on the CPU, in place, in one call: those of block.h one after the other, and A-ViT's halting step or
// Evo-ViT's scores behind each. What Python does between two blocks is little, but it does it on caches that a block
// has filled with weights.
//   x (R, D), rows (T,) or none (T = R), cu_seqlens (B + 1,); weights and layout: see blocks.h
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "evo_vit.h"
#include "halting.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

void blocks_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
             const std::vector<Tensor>& weights, double eps, int64_t heads, double scale, bool panels,
             const std::vector<int64_t>& layout) {
  const Blocks blocks(x, rows, weights, eps, heads, scale, panels, layout);
  const Stream stream(x, rows);
  const Offsets offsets(cu_seqlens, max_seqlen, stream.tokens);
  for (size_t i = 0; i < blocks.count(); ++i) blocks.run(i, x, rows, stream, offsets);
}

// The same, and Evo-ViT's scores (R,) behind each block whose tradeoff is not negative.
Tensor scored_blocks_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
                      const std::vector<Tensor>& weights, double eps, int64_t heads, double scale, bool panels,
                      const std::vector<int64_t>& layout, const Tensor& score, const std::vector<double>& tradeoffs) {
  const Blocks blocks(x, rows, weights, eps, heads, scale, panels, layout);
  const Stream stream(x, rows);
  const Offsets offsets(cu_seqlens, max_seqlen, stream.tokens);
  check_length("score", score, stream.num_rows);
  MTVIT_CHECK(is_float32(score), "score must be float32");
  MTVIT_CHECK(tradeoffs.size() == blocks.count(), "tradeoffs must be one a block, got ", tradeoffs.size(), " for ",
              blocks.count());
  Tensor evolved = copy_of<1>(score);
  std::vector<float> received(blocks.count() > 0 ? static_cast<size_t>(stream.tokens * heads) : 0);
  for (size_t i = 0; i < blocks.count(); ++i) {
    constexpr int64_t kClass = 1;
    const bool scored = tradeoffs[i] >= 0.0;
    blocks.run(i, x, rows, stream, offsets, scored ? kClass : 0, scored ? received.data() : nullptr);
    if (!scored) continue;
    evolve(received.data(), stream.tokens, heads, stream.rows, tradeoffs[i], mutable_data<float>(evolved));
  }
  return evolved;
}

// The first `count` entries of a contiguous list, seen as a list.
Tensor head_of(const Tensor& list, int64_t count) {
  const std::array<int64_t, 1> sizes{count}, strides{1};
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(list.get(), &offset));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(list.get(), 1, sizes.data(), strides.data(), offset, &out));
  return Tensor(out);
}

// All blocks on all tokens; the class tokens are what is read out.
Halted halting_blocks_(Tensor x, const Tensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& weights,
                       double eps, int64_t heads, double scale, bool panels, const std::vector<int64_t>& layout,
                       double gate_scale, double gate_center, double halt_eps) {
  const Blocks blocks(x, std::nullopt, weights, eps, heads, scale, panels, layout);
  MTVIT_CHECK(blocks.count() > 0, "weights must be those of at least one block");
  MTVIT_CHECK(x.size(1) >= 1, "x must have at least one channel, got ", shape_of(x));
  Stream stream(x, std::nullopt);
  Offsets offsets(cu_seqlens, max_seqlen, stream.tokens);
  const int64_t num_rows = stream.num_rows, batch = offsets.batch;
  check_rows(offsets.data, batch, num_rows, "cu_seqlens", 0);

  HaltingTask t{};
  t.dtype = stream.dtype;
  t.x = stream.x;
  t.num_rows = num_rows;
  t.d = stream.width;
  t.x_stride = stream.stride;
  t.batch = t.num_readout = batch;
  t.readout_rows = offsets.data;
  t.gate_scale = static_cast<float>(gate_scale);
  t.gate_center = static_cast<float>(gate_center);
  t.bar = static_cast<float>(1.0 - halt_eps);
  const auto filled = [](const Tensor& tensor, auto value) {
    auto* memory = mutable_data<decltype(value)>(tensor);
    std::fill_n(memory, tensor.numel(), value);
    return memory;
  };
  const Tensor cumulative = empty_float32(std::array{num_rows}), remainder = empty_float32(std::array{num_rows}),
               ponder = empty_float32(std::array{num_rows}), counters = empty_int32(std::array{num_rows}),
               output = empty_float32(std::array{batch, stream.width}), score = empty_float32(std::array{num_rows});
  t.cumulative = filled(cumulative, 0.0f);
  t.remainder = filled(remainder, 1.0f);
  t.ponder = filled(ponder, 0.0f);
  t.counters = filled(counters, int32_t{1});
  t.output = filled(output, 0.0f);
  t.score = mutable_data<float>(score);
  // a step reads one list and writes the other
  const std::array<Tensor, 2> lists{empty_int32(std::array{num_rows}), empty_int32(std::array{num_rows})},
      ends{empty_int32(std::array{batch + 1}), empty_int32(std::array{batch + 1})};
  std::optional<Tensor> rows;
  for (size_t i = 0; i < blocks.count(); ++i) {
    blocks.run(i, x, rows, stream, offsets);
    t.rows = stream.rows;
    t.cu_seqlens = offsets.data;
    t.count = stream.tokens;
    t.next_rows = mutable_data<int32_t>(lists[i % 2]);
    t.next_cu_seqlens = mutable_data<int32_t>(ends[i % 2]);
    halt(t, i + 1 == blocks.count());
    stream.rows = t.next_rows;
    stream.tokens = t.next_cu_seqlens[batch];
    offsets.data = t.next_cu_seqlens;
    if (!panels) rows = head_of(lists[i % 2], stream.tokens);
  }
  const size_t last = (blocks.count() + 1) % 2;
  return {cumulative, remainder, ponder, counters, output, score, head_of(lists[last], stream.tokens), ends[last]};
}

// Weights (N, K), N a multiple of a panel's columns, one behind the other as pack_panels packs each: what Blocks reads
// with a layout. In memory of large pages where the system has them: weights come from far, and each page costs a walk.
Tensor pack_run(const std::vector<Tensor>& weights) {
  MTVIT_CHECK(!weights.empty(), "weights must hold at least one, got none");
  const int64_t columns = kernels().panel_columns;
  int64_t total = 0;
  for (const Tensor& weight : weights) {
    check_dim("weights", weight, 2, "(N, K)");
    check_dtype("weights", weight);
    MTVIT_CHECK(same_dtype(weight, weights[0]), "weights must have one dtype");
    MTVIT_CHECK(weight.size(0) % columns == 0, "weights must have a multiple of ", columns, " rows, got ",
                shape_of(weight));
    total += weight.numel();
  }
  const auto element = static_cast<int64_t>(weights[0].element_size());
  Tensor panels = empty_on_large_pages(weights[0], total);
  char* to = mutable_data<char>(panels);
  for (const Tensor& weight : weights) {
    Panels::pack(weight, to);
    to += weight.numel() * element;
  }
  return panels;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("pack_run(Tensor[] weights) -> Tensor");
  m.def(
      "blocks_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels, int[] layout) -> ()");
  m.def(
      "scored_blocks_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, "
      "int heads, float scale, bool panels, int[] layout, Tensor score, float[] tradeoffs) -> Tensor score");
  m.def(
      "halting_blocks_(Tensor(a!) x, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels, int[] layout, float gate_scale, float gate_center, float halt_eps) -> "
      "(Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score, Tensor rows, "
      "Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("pack_run", TORCH_BOX(&mtvit_ops::pack_run));
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("scored_blocks_", TORCH_BOX(&mtvit_ops::scored_blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}

// packed weights are tensors of this kind
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("scored_blocks_", TORCH_BOX(&mtvit_ops::scored_blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}
