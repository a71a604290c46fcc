// The two halves of a transformer block on the CPU, and what they ask of their weights.
#include "block.h"

namespace mtvit_ops {
namespace {

std::optional<Tensor> optional(const Tensor* bias) {
  return bias ? std::optional<Tensor>(*bias) : std::nullopt;
}

// Weight and bias of a linear layer behind `features` numbers; returns out_features.
int64_t check_layer(const Tensor& x, int64_t tokens, int64_t features, const LayerWeights& layer, bool panels) {
  const std::optional<Tensor> bias = optional(layer.bias);
  if (panels) return check_panels(features, x, layer.weight, bias);
  check_linear(tokens, features, x, layer.weight, bias);
  return layer.weight.size(0);
}

Tensor onednn_read(const Tensor& x, const std::optional<Tensor>& rows, const NormWeights& norm,
                   const LayerWeights& layer, bool gelu) {
  const Tensor normed = layer_norm_rows(x, rows, norm.weight, norm.bias, norm.eps);
  return onednn_linear(normed, layer.weight, optional(layer.bias), gelu);
}

void onednn_write(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& a, const LayerWeights& layer) {
  scatter_residual_(x, rows, onednn_linear(a, layer.weight, optional(layer.bias)), std::nullopt);
}

}  // namespace

Offsets::Offsets(const Tensor& cu_seqlens, int64_t max_seqlen, int64_t tokens)
    : kept(cu_seqlens_vector("cu_seqlens", cu_seqlens)), data(mtvit_ops::data<int32_t>(kept)), batch(kept.size(0) - 1) {
  const int64_t longest = check_cu_seqlens("cu_seqlens", data, batch, tokens);
  MTVIT_CHECK_VALUE(max_seqlen >= longest, "max_seqlen must be at least ", longest, ", got ", max_seqlen);
}

void check_attention_half(const Tensor& x, int64_t tokens, const AttentionWeights& w, int64_t scores, bool panels) {
  const int64_t d = x.size(1);
  check_layer_norm(x, w.norm.weight, w.norm.bias);
  const int64_t width = check_layer(x, tokens, d, w.qkv, panels);
  MTVIT_CHECK(w.heads > 0 && width % 3 == 0 && width / 3 % w.heads == 0, "the first weight must have shape (3 * ",
              w.heads, " * d, ", d, "), got ", width, " rows");
  check_scores(scores);
  MTVIT_CHECK(check_layer(x, tokens, width / 3, w.proj, panels) == d, "the attention's last weight must have shape (",
              d, ", ", width / 3, "), got ", shape_of(w.proj.weight));
}

void check_feed_forward_half(const Tensor& x, int64_t tokens, const FeedForwardWeights& w, bool panels) {
  const int64_t d = x.size(1);
  check_layer_norm(x, w.norm.weight, w.norm.bias);
  const int64_t hidden = check_layer(x, tokens, d, w.fc1, panels);
  MTVIT_CHECK(check_layer(x, tokens, hidden, w.fc2, panels) == d, "the last weight must have shape (", d, ", ", hidden,
              "), got ", shape_of(w.fc2.weight));
}

PanelAttention::PanelAttention(PanelNorm norm, PanelLayer qkv, PanelLayer proj, int64_t heads, double scale)
    : norm_(std::move(norm)),
      qkv_(std::move(qkv)),
      proj_(std::move(proj)),
      heads_(heads),
      d_(qkv_.n / 3 / heads),
      scale_(scale) {}

PanelAttention::PanelAttention(const AttentionWeights& w)
    : PanelAttention(PanelNorm(w.norm.weight, w.norm.bias, w.norm.eps), PanelLayer(w.qkv.weight, w.qkv.bias),
                     PanelLayer(w.proj.weight, w.proj.bias), w.heads, w.scale) {}

void PanelAttention::run(const Stream& stream, const Offsets& offsets, int64_t scores, float* received) const {
  Buffer large_qkv, large_out;
  void* qkv = kept_memory(Place::qkv, stream.bytes(qkv_.n), large_qkv);
  void* out = kept_memory(Place::attended, stream.bytes(proj_.k), large_out);
  linear_of_norm(stream, norm_, qkv_, false, qkv);
  const PackedQkv packed{stream.dtype, qkv, stream.tokens, heads_, d_, offsets.data, offsets.batch};
  packed_attention(packed, scale_, scores, out, received);
  linear_residual(stream, out, proj_);
}

PanelFeedForward::PanelFeedForward(const FeedForwardWeights& w)
    : PanelFeedForward(PanelNorm(w.norm.weight, w.norm.bias, w.norm.eps), PanelLayer(w.fc1.weight, w.fc1.bias),
                       PanelLayer(w.fc2.weight, w.fc2.bias)) {}

void PanelFeedForward::run(const Stream& stream) const {
  Buffer large;
  void* hidden = kept_memory(Place::hidden, stream.bytes(fc1_.n), large);
  linear_of_norm(stream, norm_, fc1_, true, hidden);
  linear_residual(stream, hidden, fc2_);
}

void onednn_attention_half(const Tensor& x, const std::optional<Tensor>& rows, const Offsets& offsets,
                           const AttentionWeights& w, int64_t scores, float* received) {
  const Tensor qkv = as_contiguous(onednn_read(x, rows, w.norm, w.qkv, false));
  const int64_t tokens = qkv.size(0), width = qkv.size(1) / 3;
  const Dtype dtype = check_dtype("x", x);
  Buffer large;
  void* out = kept_memory(Place::attended, tokens * width * static_cast<int64_t>(element_size(dtype)), large);
  const PackedQkv packed{dtype, qkv.data_ptr(), tokens, w.heads, width / w.heads, offsets.data, offsets.batch};
  packed_attention(packed, w.scale, scores, out, received);
  onednn_write(x, rows, tensor_of(out, x, std::array{tokens, width}), w.proj);
}

void onednn_feed_forward_half(const Tensor& x, const std::optional<Tensor>& rows, const FeedForwardWeights& w) {
  onednn_write(x, rows, onednn_read(x, rows, w.norm, w.fc1, true), w.fc2);
}

}  // namespace mtvit_ops
