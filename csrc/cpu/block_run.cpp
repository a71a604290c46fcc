// Several blocks on the CPU, in place, in one call: those of block.h one after the other, and A-ViT's halting
// step behind each. What Python does between two blocks is little, but it does it on caches that a block has filled
// with weights.
//   x (R, D), rows (T,) or none (T = R), cu_seqlens (B + 1,); weights: twelve tensors a block, see kParts
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

constexpr size_t kParts = 12;  // weight and bias of norm1, qkv, proj, norm2, fc1, fc2

// Blocks of one kind; refuses whatever one of them would refuse but for its tokens, before the first one writes.
class Blocks {
 public:
  Blocks(const Tensor& x, const std::optional<Tensor>& rows, const std::vector<Tensor>& weights, double eps,
         int64_t heads, double scale, bool panels)
      : weights_(weights), eps_(eps), heads_(heads), scale_(scale) {
    MTVIT_CHECK(weights.size() % kParts == 0, "weights must be ", kParts, " a block, got ", weights.size());
    check_dim("x", x, 2, "(R, D)");
    if (rows) check_dim("rows", *rows, 1, "(T,)");
    const int64_t tokens = rows ? rows->size(0) : x.size(0);
    for (size_t i = 0; i < count(); ++i) {
      check_attention_half(x, tokens, attention(i), 0, panels);
      check_feed_forward_half(x, tokens, feed_forward(i), panels);
    }
    if (!panels) return;
    panels_.reserve(count());
    for (size_t i = 0; i < count(); ++i) panels_.emplace_back(attention(i), feed_forward(i));
  }

  size_t count() const { return weights_.size() / kParts; }

  void run(size_t i, const Tensor& x, const std::optional<Tensor>& rows, const Stream& stream,
           const Offsets& offsets) const {
    if (!panels_.empty()) {
      panels_[i].first.run(stream, offsets);
      panels_[i].second.run(stream);
    } else {
      onednn_attention_half(x, rows, offsets, attention(i), 0, nullptr);
      onednn_feed_forward_half(x, rows, feed_forward(i));
    }
  }

 private:
  AttentionWeights attention(size_t i) const {
    const Tensor* w = &weights_[i * kParts];
    return {{w[0], w[1], eps_}, {w[2], &w[3]}, heads_, scale_, {w[4], &w[5]}};
  }

  FeedForwardWeights feed_forward(size_t i) const {
    const Tensor* w = &weights_[i * kParts];
    return {{w[6], w[7], eps_}, {w[8], &w[9]}, {w[10], &w[11]}};
  }

  const std::vector<Tensor>& weights_;
  const double eps_;
  const int64_t heads_;
  const double scale_;
  std::vector<std::pair<PanelAttention, PanelFeedForward>> panels_;
};

void blocks_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
             const std::vector<Tensor>& weights, double eps, int64_t heads, double scale, bool panels) {
  const Blocks blocks(x, rows, weights, eps, heads, scale, panels);
  const Stream stream(x, rows);
  const Offsets offsets(cu_seqlens, max_seqlen, stream.tokens);
  for (size_t i = 0; i < blocks.count(); ++i) blocks.run(i, x, rows, stream, offsets);
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

Halted halting_blocks_(Tensor x, const Tensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& weights,
                       double eps, int64_t heads, double scale, bool panels, const Tensor& readout_rows,
                       const Tensor& cumulative, const Tensor& remainder, const Tensor& ponder, const Tensor& counters,
                       const Tensor& output, double gate_scale, double gate_center, double halt_eps) {
  const Blocks blocks(x, std::nullopt, weights, eps, heads, scale, panels);
  check_halting(x, readout_rows, cumulative, remainder, ponder, counters, output);
  MTVIT_CHECK(blocks.count() > 0, "weights must be those of at least one block");
  Halted step{cumulative, remainder, ponder, counters, output, cumulative, readout_rows, cu_seqlens};
  std::optional<Tensor> rows;
  for (size_t i = 0; i < blocks.count(); ++i) {
    const Stream stream(x, rows);
    const Offsets offsets(std::get<7>(step), max_seqlen, stream.tokens);
    blocks.run(i, x, rows, stream, offsets);
    step =
        halting_step(x, rows, offsets.kept, readout_rows, std::get<0>(step), std::get<1>(step), std::get<2>(step),
                     std::get<3>(step), std::get<4>(step), gate_scale, gate_center, halt_eps, i + 1 == blocks.count());
    const Tensor& cu = std::get<7>(step);
    const auto* ends = data<int32_t>(cu);
    const int64_t batch = cu.size(0) - 1;
    max_seqlen = check_cu_seqlens("cu_seqlens", ends, batch, x.size(0));
    rows = std::get<6>(step) = head_of(std::get<6>(step), ends[batch]);
  }
  return step;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "blocks_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels) -> ()");
  m.def(
      "halting_blocks_(Tensor(a!) x, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels, Tensor readout_rows, Tensor cumulative, Tensor remainder, Tensor ponder, "
      "Tensor counters, Tensor output, float gate_scale, float gate_center, float halt_eps) -> "
      "(Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score, Tensor rows, "
      "Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}

// packed weights are tensors of this kind
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}
