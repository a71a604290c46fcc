// varlen_attention_backward on the CPU: gradients of q, k, v and of the key bias, per head.
//
// Shapes as in varlen_attention.cpp; grad_out (Tq, H, dv), lse (Tq, H) float32; grad_bias (Tk, H) float32.
// Probabilities are computed anew from lse. A thread takes whole heads of whole images, so outputs are disjoint and
// sums have one order whatever the thread count. What no query or no key reaches has gradient 0.
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "attention.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

struct Item {
  int64_t image, head, cost;
};

Tensor zeros(const Tensor& like, int64_t tokens, int64_t heads, int64_t width) {
  return torch::stable::new_zeros(like, {tokens, heads, width});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& incoming, const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& /*out*/,
    const Tensor& log_sums, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double scale, std::optional<Tensor> key_bias) {
  const Tensor cu_q = cu_seqlens_vector("cu_seqlens_q", cu_seqlens_q);
  const Tensor cu_k = cu_seqlens_vector("cu_seqlens_k", cu_seqlens_k);
  check_attention(queries, keys, values, cu_q, cu_k);
  const int64_t total_q = queries.size(0), total_k = keys.size(0), heads = queries.size(1);
  check_dim("grad_out", incoming, 3, "(Tq, H, dv)");
  MTVIT_CHECK(incoming.size(0) == total_q && incoming.size(1) == heads && incoming.size(2) == values.size(2),
              "grad_out must have shape (", total_q, ", ", heads, ", ", values.size(2), "), got ", shape_of(incoming));
  MTVIT_CHECK(same_dtype(incoming, queries), "grad_out must have q's dtype");
  check_dim("lse", log_sums, 2, "(Tq, H)");
  MTVIT_CHECK(log_sums.size(0) == total_q && log_sums.size(1) == heads, "lse must have shape (", total_q, ", ", heads,
              "), got ", shape_of(log_sums));
  const auto *offsets_q = data<int32_t>(cu_q), *offsets_k = data<int32_t>(cu_k);
  const int64_t batch = cu_q.size(0) - 1;
  check_attention_offsets(offsets_q, offsets_k, batch, total_q, total_k, max_seqlen_q, max_seqlen_k);
  AttentionBackwardTask common{};
  common.dtype = check_dtype("q", queries);
  Tensor bias;  // kept alive as long as the tasks point into it
  int64_t bias_head = 0;
  if (key_bias) {
    check_key_bias(*key_bias, total_k, heads);
    bias = as_float32("key_bias", *key_bias);
    common.bias_stride = bias.dim() == 2 ? heads : 1;
    bias_head = bias.dim() == 2 ? 1 : 0;
  }
  const Tensor lse = as_float32("lse", log_sums);
  const Tensor grad = dense_last(incoming), q = dense_last(queries), k = dense_last(keys), v = dense_last(values);
  const View grads = view(grad), q_view = view(q), k_view = view(k), v_view = view(v);
  const int64_t d = q.size(2), dv = v.size(2);
  const auto element = static_cast<int64_t>(q.element_size());
  Tensor grad_q = zeros(q, total_q, heads, d), grad_k = zeros(k, total_k, heads, d),
         grad_v = zeros(v, total_k, heads, dv);
  Tensor grad_bias = torch::stable::new_zeros(q, {total_k, heads}, ScalarType::Float);
  common.d = d;
  common.dv = dv;
  common.scale = static_cast<float>(scale);
  common.grad_out_stride = grads.token;
  common.q_stride = q_view.token;
  common.k_stride = k_view.token;
  common.v_stride = v_view.token;
  common.lse_stride = common.grad_bias_stride = heads;
  common.grad_q_stride = common.grad_k_stride = heads * d;
  common.grad_v_stride = heads * dv;

  std::vector<Item> items;
  int64_t work = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t cost = (offsets_q[b + 1] - offsets_q[b]) * static_cast<int64_t>(offsets_k[b + 1] - offsets_k[b]);
    for (int64_t h = 0; h < heads && cost > 0; ++h) items.push_back({b, h, cost});
    work += cost * heads * (3 * d + 2 * dv);
  }
  // the longest first, so that no thread starts a long one when the others are done
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  const auto at = [element](const View& t, int64_t token, int64_t head) {
    return static_cast<const char*>(t.data) + (token * t.token + head * t.head) * element;
  };
  const Kernels& native = kernels();
  const auto run = [&](const Item& item) {
    const int64_t first_q = offsets_q[item.image], first_k = offsets_k[item.image], h = item.head;
    AttentionBackwardTask t = common;
    t.nq = offsets_q[item.image + 1] - first_q;
    t.nk = offsets_k[item.image + 1] - first_k;
    t.grad_out = at(grads, first_q, h);
    t.q = at(q_view, first_q, h);
    t.k = at(k_view, first_k, h);
    t.v = at(v_view, first_k, h);
    t.lse = data<float>(lse) + first_q * heads + h;
    t.bias = key_bias ? data<float>(bias) + first_k * common.bias_stride + h * bias_head : nullptr;
    t.grad_q = mutable_data<char>(grad_q) + (first_q * heads + h) * d * element;
    t.grad_k = mutable_data<char>(grad_k) + (first_k * heads + h) * d * element;
    t.grad_v = mutable_data<char>(grad_v) + (first_k * heads + h) * dv * element;
    t.grad_bias = mutable_data<float>(grad_bias) + first_k * heads + h;
    Buffer large;
    t.scratch = thread_scratch(backward_scratch_floats(t.nq, t.nk, d, dv), large);
    native.attention_backward(t);
  };
  constexpr int64_t kWorthThreads = 1 << 19;  // as for the forward
  const auto count = static_cast<int64_t>(items.size());
  const int64_t threads = work < kWorthThreads ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(items[static_cast<size_t>(i)]);
  });
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float scale, Tensor? key_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("varlen_attention_backward", TORCH_BOX(&mtvit_ops::varlen_attention_backward));
}
