// The two halves of a transformer block on the CPU, in place: what nn/block.py does with one operator each, in one
// call.
//   x (R, D), rows (T,) or none (T = R), cu_seqlens (B + 1,)
//   attention_half_:    x[rows] += proj(attention(qkv(layer_norm(x[rows]))))
//   feed_forward_half_: x[rows] += fc2(gelu(fc1(layer_norm(x[rows]))))
//   block_:             one after the other
// Nine operators dispatched from Python are serial time that a removed token does not shorten. All checks come before
// the first write. T may be 0. `panels` says whose linear layers these are: PyTorch's oneDNN kernel, or ours, whose
// weights pack_panels packs.
#include <optional>

#include "block.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

const Tensor* pointer(const std::optional<Tensor>& bias) {
  return bias ? &*bias : nullptr;
}

int64_t check_rows_of(const Tensor& x, const std::optional<Tensor>& rows) {
  check_dim("x", x, 2, "(R, D)");
  if (rows) check_dim("rows", *rows, 1, "(T,)");
  return rows ? rows->size(0) : x.size(0);
}

// Each half where there are weights of it; returns the scores.
Tensor run(const Tensor& x, const std::optional<Tensor>& rows, const Offsets* offsets,
           const std::optional<AttentionWeights>& attention, int64_t scores,
           const std::optional<FeedForwardWeights>& feed_forward, bool panels) {
  Tensor received;
  const Stream stream(x, rows);
  if (attention) received = empty_float32(std::array{scores ? stream.tokens : 0, attention->heads});
  auto* numbers = attention && scores ? mutable_data<float>(received) : nullptr;
  if (panels) {
    if (attention) PanelAttention(*attention).run(stream, *offsets, scores, numbers);
    if (feed_forward) PanelFeedForward(*feed_forward).run(stream);
  } else {
    if (attention) onednn_attention_half(x, rows, *offsets, *attention, scores, numbers);
    if (feed_forward) onednn_feed_forward_half(x, rows, *feed_forward);
  }
  return received;
}

Tensor attention_half_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
                       const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& qkv_weight,
                       std::optional<Tensor> qkv_bias, int64_t heads, double scale, int64_t scores,
                       const Tensor& proj_weight, std::optional<Tensor> proj_bias, bool panels) {
  const int64_t tokens = check_rows_of(x, rows);
  const AttentionWeights weights{
      {norm_weight, norm_bias, eps}, {qkv_weight, pointer(qkv_bias)}, heads, scale, {proj_weight, pointer(proj_bias)}};
  check_attention_half(x, tokens, weights, scores, panels);
  const Offsets offsets(cu_seqlens, max_seqlen, tokens);
  return run(x, rows, &offsets, weights, scores, std::nullopt, panels);
}

void feed_forward_half_(Tensor x, std::optional<Tensor> rows, const Tensor& norm_weight, const Tensor& norm_bias,
                        double eps, const Tensor& fc1_weight, std::optional<Tensor> fc1_bias, const Tensor& fc2_weight,
                        std::optional<Tensor> fc2_bias, bool panels) {
  const int64_t tokens = check_rows_of(x, rows);
  const FeedForwardWeights weights{
      {norm_weight, norm_bias, eps}, {fc1_weight, pointer(fc1_bias)}, {fc2_weight, pointer(fc2_bias)}};
  check_feed_forward_half(x, tokens, weights, panels);
  run(x, rows, nullptr, std::nullopt, 0, weights, panels);
}

Tensor block_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
              const Tensor& norm1_weight, const Tensor& norm1_bias, double norm1_eps, const Tensor& qkv_weight,
              std::optional<Tensor> qkv_bias, int64_t heads, double scale, int64_t scores, const Tensor& proj_weight,
              std::optional<Tensor> proj_bias, const Tensor& norm2_weight, const Tensor& norm2_bias, double norm2_eps,
              const Tensor& fc1_weight, std::optional<Tensor> fc1_bias, const Tensor& fc2_weight,
              std::optional<Tensor> fc2_bias, bool panels) {
  const int64_t tokens = check_rows_of(x, rows);
  const AttentionWeights attention{{norm1_weight, norm1_bias, norm1_eps},
                                   {qkv_weight, pointer(qkv_bias)},
                                   heads,
                                   scale,
                                   {proj_weight, pointer(proj_bias)}};
  const FeedForwardWeights feed_forward{
      {norm2_weight, norm2_bias, norm2_eps}, {fc1_weight, pointer(fc1_bias)}, {fc2_weight, pointer(fc2_bias)}};
  check_attention_half(x, tokens, attention, scores, panels);
  check_feed_forward_half(x, tokens, feed_forward, panels);
  const Offsets offsets(cu_seqlens, max_seqlen, tokens);
  return run(x, rows, &offsets, attention, scores, feed_forward, panels);
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "attention_half_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor norm_weight, "
      "Tensor norm_bias, float eps, Tensor qkv_weight, Tensor? qkv_bias, int heads, float scale, int scores, "
      "Tensor proj_weight, Tensor? proj_bias, bool panels=False) -> Tensor scores");
  m.def(
      "feed_forward_half_(Tensor(a!) x, Tensor? rows, Tensor norm_weight, Tensor norm_bias, float eps, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, bool panels=False) -> ()");
  m.def(
      "block_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor norm1_weight, Tensor norm1_bias, "
      "float norm1_eps, Tensor qkv_weight, Tensor? qkv_bias, int heads, float scale, int scores, Tensor proj_weight, "
      "Tensor? proj_bias, Tensor norm2_weight, Tensor norm2_bias, float norm2_eps, Tensor fc1_weight, "
      "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, bool panels=False) -> Tensor scores");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("attention_half_", TORCH_BOX(&mtvit_ops::attention_half_));
  m.impl("feed_forward_half_", TORCH_BOX(&mtvit_ops::feed_forward_half_));
  m.impl("block_", TORCH_BOX(&mtvit_ops::block_));
}

// packed weights are tensors of this kind
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("attention_half_", TORCH_BOX(&mtvit_ops::attention_half_));
  m.impl("feed_forward_half_", TORCH_BOX(&mtvit_ops::feed_forward_half_));
  m.impl("block_", TORCH_BOX(&mtvit_ops::block_));
}
