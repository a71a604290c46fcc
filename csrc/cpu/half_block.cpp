// The two halves of a transformer block on the CPU, in place: what nn/block.py does with one operator each, in one
// call.
//   x (R, D), rows (T,) or none (T = R), cu_seqlens (B + 1,)
//   attention_half_:    x[rows] += proj(attention(qkv(layer_norm(x[rows]))))
//   feed_forward_half_: x[rows] += fc2(gelu(fc1(layer_norm(x[rows]))))
//   block_:             one after the other
// Nine operators dispatched from Python are serial time that a removed token does not shorten. Each step here is the
// operator itself with its checks. T may be 0. `panels` says whose linear layers these are: PyTorch's oneDNN kernel,
// whose weights mkldnn::_reorder_linear_weight packs, or ours, whose weights pack_panels packs and which take the layer
// norm and the residual along.
#include <optional>
#include <tuple>

#include "../checks.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

// linear(layer_norm(x[rows]))
Tensor read(bool panels, const Tensor& x, const std::optional<Tensor>& rows, const Tensor& norm_weight,
            const Tensor& norm_bias, double eps, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu,
            Place place) {
  if (panels) return panel_linear_of_norm(x, rows, norm_weight, norm_bias, eps, weight, bias, gelu, place);
  return onednn_linear(layer_norm_rows(x, rows, norm_weight, norm_bias, eps), weight, bias, gelu);
}

// x[rows] += linear(a)
void write(bool panels, Tensor x, const std::optional<Tensor>& rows, const Tensor& a, const Tensor& weight,
           const std::optional<Tensor>& bias) {
  if (panels) return panel_linear_residual_(x, rows, a, weight, bias);
  scatter_residual_(x, rows, onednn_linear(a, weight, bias), std::nullopt);
}

Tensor attention_half_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
                       const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& qkv_weight,
                       std::optional<Tensor> qkv_bias, int64_t heads, double scale, int64_t scores,
                       const Tensor& proj_weight, std::optional<Tensor> proj_bias, bool panels) {
  const Tensor qkv = read(panels, x, rows, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, false, Place::qkv);
  const auto [out, lse, received] = packed_attention(qkv, heads, cu_seqlens, max_seqlen, scale, scores);
  const Tensor flat = as_matrix(out, out.size(1) * out.size(2));
  write(panels, x, rows, flat, proj_weight, proj_bias);
  return received;
}

void feed_forward_half_(Tensor x, std::optional<Tensor> rows, const Tensor& norm_weight, const Tensor& norm_bias,
                        double eps, const Tensor& fc1_weight, std::optional<Tensor> fc1_bias, const Tensor& fc2_weight,
                        std::optional<Tensor> fc2_bias, bool panels) {
  const Tensor hidden = read(panels, x, rows, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, true, Place::hidden);
  write(panels, x, rows, hidden, fc2_weight, fc2_bias);
}

// The same of weight and bias of a linear layer behind `features` numbers; returns out_features.
int64_t check_layer(bool panels, int64_t tokens, int64_t features, ScalarType dtype, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  if (panels) return check_panels(features, dtype, weight, bias);
  check_linear(tokens, features, dtype, weight, bias);
  return weight.size(0);
}

}  // namespace

void check_block(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& norm1_weight,
                 const Tensor& norm1_bias, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                 int64_t heads, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias,
                 const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& fc1_weight,
                 const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias,
                 bool panels) {
  check_dim("x", x, 2, "(R, D)");
  if (rows) check_dim("rows", *rows, 1, "(T,)");
  const int64_t tokens = rows ? rows->size(0) : x.size(0), d = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_layer_norm(x, norm1_weight, norm1_bias);
  const int64_t width = check_layer(panels, tokens, d, dtype, qkv_weight, qkv_bias);
  MTVIT_CHECK(heads > 0 && width % 3 == 0 && width / 3 % heads == 0, "the first weight must have shape (3 * ", heads,
              " * d, ", d, "), got ", width, " rows");
  MTVIT_CHECK(check_layer(panels, tokens, width / 3, dtype, proj_weight, proj_bias) == d,
              "the attention's last weight must have shape (", d, ", ", width / 3, "), got ", shape_of(proj_weight));
  check_layer_norm(x, norm2_weight, norm2_bias);
  const int64_t hidden = check_layer(panels, tokens, d, dtype, fc1_weight, fc1_bias);
  MTVIT_CHECK(check_layer(panels, tokens, hidden, dtype, fc2_weight, fc2_bias) == d,
              "the last weight must have shape (", d, ", ", hidden, "), got ", shape_of(fc2_weight));
}

// Refuses before it writes.
Tensor block_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
              const Tensor& norm1_weight, const Tensor& norm1_bias, double norm1_eps, const Tensor& qkv_weight,
              std::optional<Tensor> qkv_bias, int64_t heads, double scale, int64_t scores, const Tensor& proj_weight,
              std::optional<Tensor> proj_bias, const Tensor& norm2_weight, const Tensor& norm2_bias, double norm2_eps,
              const Tensor& fc1_weight, std::optional<Tensor> fc1_bias, const Tensor& fc2_weight,
              std::optional<Tensor> fc2_bias, bool panels) {
  check_block(x, rows, norm1_weight, norm1_bias, qkv_weight, qkv_bias, heads, proj_weight, proj_bias, norm2_weight,
              norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, panels);
  const Tensor received = attention_half_(x, rows, cu_seqlens, max_seqlen, norm1_weight, norm1_bias, norm1_eps,
                                          qkv_weight, qkv_bias, heads, scale, scores, proj_weight, proj_bias, panels);
  feed_forward_half_(x, rows, norm2_weight, norm2_bias, norm2_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, panels);
  return received;
}

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
