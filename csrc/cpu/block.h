// A transformer block on the CPU, in place: its weights as operators get them, and its two halves.
#pragma once
#include <optional>
#include <utility>

#include "ops.h"
#include "panel_layers.h"

namespace mtvit_ops {

// Where the images of a stream begin, (batch + 1,).
struct Offsets {
  Tensor kept;
  const int32_t* data;
  int64_t batch;

  // Refuses what does not fit the stream's tokens and the bound.
  Offsets(const Tensor& cu_seqlens, int64_t max_seqlen, int64_t tokens);
};

struct NormWeights {
  const Tensor &weight, &bias;
  double eps;
};

struct LayerWeights {
  const Tensor& weight;
  const Tensor* bias;  // null: none
};

struct AttentionWeights {
  NormWeights norm;
  LayerWeights qkv;
  int64_t heads;
  double scale;
  LayerWeights proj;
};

struct FeedForwardWeights {
  NormWeights norm;
  LayerWeights fc1, fc2;
};

// Whatever the halves would refuse of their weights, `panels` as below.
void check_attention_half(const Tensor& x, int64_t tokens, const AttentionWeights& weights, int64_t scores,
                          bool panels);
void check_feed_forward_half(const Tensor& x, int64_t tokens, const FeedForwardWeights& weights, bool panels);

// The halves by our own linear kernel: takes the layer norm and the residual along.
class PanelAttention {
 public:
  explicit PanelAttention(const AttentionWeights& weights);
  PanelAttention(PanelNorm norm, PanelLayer qkv, PanelLayer proj, int64_t heads, double scale);

  // x[rows] += proj(attention(qkv(layer_norm(x[rows])))); received (T, H) where scores asks for them.
  void run(const Stream& stream, const Offsets& offsets, int64_t scores = 0, float* received = nullptr) const;

 private:
  PanelNorm norm_;
  PanelLayer qkv_, proj_;
  int64_t heads_, d_;
  double scale_;
};

class PanelFeedForward {
 public:
  explicit PanelFeedForward(const FeedForwardWeights& weights);
  PanelFeedForward(PanelNorm norm, PanelLayer fc1, PanelLayer fc2)
      : norm_(std::move(norm)), fc1_(std::move(fc1)), fc2_(std::move(fc2)) {}

  // x[rows] += fc2(gelu(fc1(layer_norm(x[rows])))).
  void run(const Stream& stream) const;

 private:
  PanelNorm norm_;
  PanelLayer fc1_, fc2_;
};

// The same by PyTorch's oneDNN kernel, whose weights mkldnn::_reorder_linear_weight packs.
void onednn_attention_half(const Tensor& x, const std::optional<Tensor>& rows, const Offsets& offsets,
                           const AttentionWeights& weights, int64_t scores, float* received);
void onednn_feed_forward_half(const Tensor& x, const std::optional<Tensor>& rows, const FeedForwardWeights& weights);

}  // namespace mtvit_ops
