// Blocks of one kind, as the operators that run several of them get their weights.
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "block.h"

namespace mtvit_ops {

// Weights are twelve tensors a block, weight and bias of norm1, qkv, proj, norm2, fc1 and fc2: to hand over and look at
// 144 tensors, on caches that have forgotten them, takes as long as a layer. With a layout (first, last, hidden) they
// are two, of which blocks [first, last) run:
//   panels, of x's dtype: qkv, proj, fc1 and fc2 of each block, as pack_run packs them
//   vectors, float32: of each block weight and bias of norm1, the biases of qkv and proj, weight and bias of norm2, the
//   biases of fc1 and fc2
class Blocks {
 public:
  // Refuses whatever a block would refuse but for its tokens, before the first one writes. `weights` must outlive it.
  Blocks(const Tensor& x, const std::optional<Tensor>& rows, const std::vector<Tensor>& weights, double eps,
         int64_t heads, double scale, bool panels, const std::vector<int64_t>& layout);

  size_t count() const { return count_; }

  void run(size_t i, const Tensor& x, const std::optional<Tensor>& rows, const Stream& stream, const Offsets& offsets,
           int64_t scores = 0, float* received = nullptr) const;

 private:
  AttentionWeights attention(size_t i) const;
  FeedForwardWeights feed_forward(size_t i) const;
  void lay_out(const Tensor& x, const std::vector<int64_t>& layout);

  const std::vector<Tensor>& weights_;
  const double eps_;
  const int64_t heads_;
  const double scale_;
  size_t count_;
  std::vector<std::pair<PanelAttention, PanelFeedForward>> panels_;
};

}  // namespace mtvit_ops
