#include "blocks.h"

namespace mtvit_ops {
namespace {

constexpr size_t kParts = 12;  // tensors a block without a layout

}  // namespace

Blocks::Blocks(const Tensor& x, const std::optional<Tensor>& rows, const std::vector<Tensor>& weights, double eps,
               int64_t heads, double scale, bool panels, const std::vector<int64_t>& layout)
    : weights_(weights), eps_(eps), heads_(heads), scale_(scale), count_(weights.size() / kParts) {
  check_dim("x", x, 2, "(R, D)");
  if (rows) check_dim("rows", *rows, 1, "(T,)");
  if (!layout.empty()) {
    MTVIT_CHECK(panels, "layout is for weights in panels");
    lay_out(x, layout);
    return;
  }
  MTVIT_CHECK(weights.size() % kParts == 0, "weights must be ", kParts, " a block, got ", weights.size());
  const int64_t tokens = rows ? rows->size(0) : x.size(0);
  for (size_t i = 0; i < count(); ++i) {
    check_attention_half(x, tokens, attention(i), 0, panels);
    check_feed_forward_half(x, tokens, feed_forward(i), panels);
  }
  if (!panels) return;
  panels_.reserve(count());
  for (size_t i = 0; i < count(); ++i) panels_.emplace_back(attention(i), feed_forward(i));
}

void Blocks::lay_out(const Tensor& x, const std::vector<int64_t>& layout) {
  MTVIT_CHECK(layout.size() == 3, "layout must be (first, last, hidden), got ", layout.size(), " numbers");
  MTVIT_CHECK(weights_.size() == 2, "weights must be two with a layout, got ", weights_.size());
  const int64_t first = layout[0], last = layout[1], hidden = layout[2], d = x.size(1);
  const int64_t columns = kernels().panel_columns;
  constexpr int64_t kWidest = 1 << 20;  // no product of sizes overflows
  MTVIT_CHECK(d <= kWidest && hidden >= 0 && hidden <= kWidest && d % columns == 0 && hidden % columns == 0,
              "x's width and hidden must be multiples of ", columns, " up to ", kWidest, ", got ", d, " and ", hidden);
  MTVIT_CHECK(heads_ > 0 && d % heads_ == 0, "heads must divide x's width ", d, ", got ", heads_);
  MTVIT_CHECK(first >= 0 && first <= last, "layout must begin with a range of blocks, got ", first, " and ", last);
  const Tensor &panels = weights_[0], &vectors = weights_[1];
  for (const Tensor& t : {panels, vectors}) {
    check_dim("weights", t, 1, "(N,)");
    MTVIT_CHECK(t.is_contiguous(), "weights must be contiguous");
  }
  MTVIT_CHECK(same_dtype(panels, x) && is_float32(vectors), "weights must be of x's dtype and of float32");
  const int64_t of_panels = 4 * d * d + 2 * d * hidden, of_vectors = 9 * d + hidden;
  MTVIT_CHECK(last <= kWidest && panels.numel() >= last * of_panels && vectors.numel() >= last * of_vectors,
              "weights must hold ", of_panels, " and ", of_vectors, " numbers for each of ", last, " blocks, got ",
              panels.numel(), " and ", vectors.numel());

  const auto element = static_cast<int64_t>(element_size(check_dtype("x", x)));
  const char* panel = data<char>(panels) + first * of_panels * element;
  const float* vector = data<float>(vectors) + first * of_vectors;
  const auto next_vector = [&](int64_t size) {
    const Vector taken(vector, size);
    vector += size;
    return taken;
  };
  const auto next_norm = [&] {
    Vector weight = next_vector(d);
    return PanelNorm(std::move(weight), next_vector(d), eps_);
  };
  const auto next_layer = [&](int64_t n, int64_t k) {
    const char* taken = panel;
    panel += n * k * element;
    return PanelLayer(taken, n, k, next_vector(n));
  };
  count_ = static_cast<size_t>(last - first);
  panels_.reserve(count_);
  for (size_t i = 0; i < count_; ++i) {
    PanelNorm norm1 = next_norm();
    PanelLayer qkv = next_layer(3 * d, d), proj = next_layer(d, d);
    PanelNorm norm2 = next_norm();
    PanelLayer fc1 = next_layer(hidden, d), fc2 = next_layer(d, hidden);
    panels_.emplace_back(PanelAttention(std::move(norm1), std::move(qkv), std::move(proj), heads_, scale_),
                         PanelFeedForward(std::move(norm2), std::move(fc1), std::move(fc2)));
  }
}

void Blocks::run(size_t i, const Tensor& x, const std::optional<Tensor>& rows, const Stream& stream,
                 const Offsets& offsets, int64_t scores, float* received) const {
  if (!panels_.empty()) {
    panels_[i].first.run(stream, offsets, scores, received);
    panels_[i].second.run(stream);
  } else {
    onednn_attention_half(x, rows, offsets, attention(i), scores, received);
    onednn_feed_forward_half(x, rows, feed_forward(i));
  }
}

AttentionWeights Blocks::attention(size_t i) const {
  const Tensor* w = &weights_[i * kParts];
  return {{w[0], w[1], eps_}, {w[2], &w[3]}, heads_, scale_, {w[4], &w[5]}};
}

FeedForwardWeights Blocks::feed_forward(size_t i) const {
  const Tensor* w = &weights_[i * kParts];
  return {{w[6], w[7], eps_}, {w[8], &w[9]}, {w[10], &w[11]}};
}

}  // namespace mtvit_ops
