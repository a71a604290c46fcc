// varlen_attention on the CPU: shapes, values, and who computes what; the arithmetic is in attention_tile.h.
//
// B images, image b with queries cu_seqlens_q[b] to [b + 1] and keys cu_seqlens_k[b] to [b + 1], H heads.
//   q (Tq, H, d), k (Tk, H, d), v (Tk, H, dv); out (Tq, H, dv), lse (Tq, H), scores (Tk, H) or (0, H)
// Any of B, H, d, dv, a length or the slack behind the last image may be 0. No keys: out 0, lse -inf.
// Threads write disjoint parts, in an order that changes no sum: the result depends on no thread count.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "attention.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

enum Scores : int64_t { kNone = 0, kClass = 1, kMean = 2 };

// Blocks [begin, end) of the queries of one head of one image.
struct Item {
  int32_t image, head;
  int32_t begin, end;
  int64_t cost;
};

struct Problem {
  View q, k, v;
  int64_t total_q, total_k;  // tokens
  const int32_t *cu_q, *cu_k;
  int64_t batch, heads, d, dv;
  Dtype dtype;
  size_t element;

  int64_t nq(int64_t image) const { return cu_q[image + 1] - cu_q[image]; }
  int64_t nk(int64_t image) const { return cu_k[image + 1] - cu_k[image]; }
};

bool is_whole(const Problem& p, const Item& item) {
  return item.begin == 0 && item.end == num_blocks(p.nq(item.image));
}

// Whole heads where there are enough of them; else queries are split so that each thread has about three items.
std::vector<Item> plan(const Problem& p, int64_t threads) {
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch; ++b) total += p.nq(b) * p.nk(b) * p.heads;
  const int64_t limit = threads > 1 ? std::max<int64_t>(total / (3 * threads), 1) : std::numeric_limits<int64_t>::max();
  std::vector<Item> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t cost = p.nq(b) * p.nk(b), blocks = num_blocks(p.nq(b));
    if (cost == 0) continue;
    const int64_t parts = std::min(blocks, cost / limit + (cost % limit != 0));
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t i = 0; i < parts; ++i) {
        const auto begin = static_cast<int32_t>(i * blocks / parts),
                   end = static_cast<int32_t>((i + 1) * blocks / parts);
        items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), begin, end, cost * (end - begin) / blocks});
      }
    }
  }
  // the longest first, so that no thread starts a long one when the others are done
  if (threads > 1) {
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  }
  return items;
}

struct Outputs {
  const Kernels* native;
  char* out;
  float *lse, *scores;
  const float* bias;
  int64_t bias_token, bias_head;  // strides
};

// Block sums (rows, row), in the order of the blocks, to column means in the first row.
void average(float* sums, int64_t rows, int64_t row, int64_t keys, int64_t queries) {
  const float share = 1.0f / static_cast<float>(queries);
  for (int64_t r = 1; r < rows; ++r) {
    for (int64_t j = 0; j < keys; ++j) sums[j] += sums[r * row + j];
  }
  for (int64_t j = 0; j < keys; ++j) sums[j] *= share;
}

// One number a token and head, head by head, until an image is done: beside each other in lse and scores, the heads of
// a token share a cache line, which two threads would take from each other with every store.
class ByHead {
 public:
  ByHead(const Problem& p, Scores mode, const std::vector<Item>& items)
      : p_(p), mode_(mode), images_(new Image[static_cast<size_t>(p.batch)]) {
    for (const Item& item : items) at(item.image).left.fetch_add(1, std::memory_order_relaxed);
    int64_t floats = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      Image& image = at(b);
      const bool split = image.left.load(std::memory_order_relaxed) > p.heads;
      image.begin = floats;
      image.score_rows = mode == kNone ? 0 : mode == kMean && split ? num_blocks(p.nq(b)) : 1;
      floats += p.heads * (lse_row(b) + image.score_rows * key_row(b));
    }
    memory_ = allocate(floats);
  }

  float* lse(int64_t image, int64_t head) const { return of(image) + head * lse_row(image); }
  // one row, or one a block of queries where a head is more than one item and wants column means
  float* scores(int64_t image, int64_t head) const {
    return of(image) + p_.heads * lse_row(image) + head * at(image).score_rows * key_row(image);
  }

  // To be called after each item: who does an image's last one writes its results.
  void done(const Item& item, const Outputs& o) {
    if (at(item.image).left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t b = item.image, nk = p_.nk(b);
    deal(lse(b, 0), lse_row(b), p_.nq(b), o.lse + p_.cu_q[b] * p_.heads);
    if (mode_ == kNone) return;
    if (!is_whole(p_, item) && mode_ == kMean) {
      for (int64_t h = 0; h < p_.heads; ++h) average(scores(b, h), at(b).score_rows, key_row(b), nk, p_.nq(b));
    }
    deal(scores(b, 0), at(b).score_rows * key_row(b), nk, o.scores + p_.cu_k[b] * p_.heads);
  }

  int64_t key_row(int64_t image) const { return round_up(p_.nk(image), kMaxWidth); }

 private:
  struct Image {
    std::atomic<int64_t> left{0};  // items to be done yet
    int64_t begin, score_rows;     // where its numbers begin, rows of scores a head
  };

  int64_t lse_row(int64_t image) const { return round_up(p_.nq(image), kMaxWidth); }
  Image& at(int64_t image) const { return images_[static_cast<size_t>(image)]; }
  float* of(int64_t image) const { return memory_.get() + at(image).begin; }

  // (H, tokens), `row` apart, to (tokens, H).
  void deal(const float* from, int64_t row, int64_t tokens, float* to) const {
    for (int64_t j = 0; j < tokens; ++j) {
      for (int64_t h = 0; h < p_.heads; ++h) *to++ = from[h * row + j];
    }
  }

  const Problem& p_;
  Scores mode_;
  Buffer memory_;
  std::unique_ptr<Image[]> images_;
};

void run(const Problem& p, const Outputs& o, Scores mode, float scale, const Item& item, ByHead& by_head) {
  const int64_t b = item.image, h = item.head, first_q = p.cu_q[b], first_k = p.cu_k[b];
  const auto at = [&](const View& t, int64_t token) {
    return static_cast<const char*>(t.data) + (token * t.token + h * t.head) * static_cast<int64_t>(p.element);
  };
  AttentionTask t{};
  t.dtype = p.dtype;
  t.q = at(p.q, first_q);
  t.k = at(p.k, first_k);
  t.v = at(p.v, first_k);
  t.out = o.out + (first_q * p.heads + h) * p.dv * p.element;
  t.lse = by_head.lse(b, h);
  t.bias = o.bias ? o.bias + first_k * o.bias_token + h * o.bias_head : nullptr;
  t.nq = p.nq(b);
  t.nk = p.nk(b);
  t.d = p.d;
  t.dv = p.dv;
  if (mode == kClass) t.class_row = by_head.scores(b, h);
  t.q_stride = p.q.token;
  t.k_stride = p.k.token;
  t.v_stride = p.v.token;
  t.out_stride = p.heads * p.dv;
  t.bias_stride = o.bias_token;
  t.block_begin = item.begin;
  t.block_end = item.end;
  t.scale = scale;
  Buffer large;
  const int64_t work = round_up(scratch_floats(t.nk, t.d, t.dv), kMaxWidth), blocks = num_blocks(t.nq);
  // a whole head's block sums stay in this thread's cache
  const bool own_sums = mode == kMean && is_whole(p, item);
  t.scratch = thread_scratch(work + (own_sums ? blocks * by_head.key_row(b) : 0), large);
  if (mode == kMean) t.block_sums = own_sums ? t.scratch + work : by_head.scores(b, h);
  o.native->attention(t);
  if (own_sums) {
    average(t.block_sums, blocks, by_head.key_row(b), t.nk, t.nq);
    std::copy(t.block_sums, t.block_sums + t.nk, by_head.scores(b, h));
  }
  by_head.done(item, o);
}

// What no item writes: images without a key or without a query, and the slack behind the last image.
void fill_rest(const Problem& p, const Outputs& o, Scores mode) {
  const auto no_keys = [&](int64_t begin, int64_t end) {
    const int64_t row = p.heads * p.dv * static_cast<int64_t>(p.element);
    std::fill(o.out + begin * row, o.out + end * row, 0);
    std::fill(o.lse + begin * p.heads, o.lse + end * p.heads, -std::numeric_limits<float>::infinity());
  };
  const auto no_queries = [&](int64_t begin, int64_t end) {
    if (mode != kNone) std::fill(o.scores + begin * p.heads, o.scores + end * p.heads, 0.0f);
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.nk(b) == 0) no_keys(p.cu_q[b], p.cu_q[b + 1]);
    if (p.nq(b) == 0) no_queries(p.cu_k[b], p.cu_k[b + 1]);
  }
  no_keys(p.cu_q[p.batch], p.total_q);
  no_queries(p.cu_k[p.batch], p.total_k);
}

// The work itself, into `out` (Tq, H, dv).
Attended attend(const Problem& p, Tensor out, double scale, const std::optional<Tensor>& key_bias, int64_t scores) {
  MTVIT_CHECK(scores >= kNone && scores <= kMean, "scores must be 0, 1 or 2, got ", scores);
  const auto mode = static_cast<Scores>(scores);
  Outputs o{};
  o.native = &kernels();
  Tensor bias;  // kept alive as long as o.bias points into it
  if (key_bias) {
    check_key_bias(*key_bias, p.total_k, p.heads);
    bias = as_float32("key_bias", *key_bias);
    o.bias = data<float>(bias);
    o.bias_token = bias.dim() == 2 ? p.heads : 1;
    o.bias_head = bias.dim() == 2 ? 1 : 0;
  }
  Tensor lse = empty_float32(std::array{p.total_q, p.heads});
  Tensor token_scores = empty_float32(std::array{mode == kNone ? 0 : p.total_k, p.heads});
  o.out = mutable_data<char>(out);
  o.lse = mutable_data<float>(lse);
  o.scores = mutable_data<float>(token_scores);
  int64_t work = 0;  // multiplications
  for (int64_t b = 0; b < p.batch; ++b) work += p.nq(b) * p.nk(b) * p.heads * (p.d + p.dv);
  constexpr int64_t kWorthThreads = 1 << 19;  // under some 5 microseconds, waking a thread costs more than it does
  const int64_t threads = work < kWorthThreads ? 1 : torch::stable::get_num_threads();
  const std::vector<Item> items = plan(p, threads);
  const auto count = static_cast<int64_t>(items.size());
  ByHead by_head(p, mode, items);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      run(p, o, mode, static_cast<float>(scale), items[static_cast<size_t>(i)], by_head);
    }
  });
  fill_rest(p, o, mode);
  return {out, lse, token_scores};
}

Attended varlen_attention(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& cu_seqlens_q,
                          const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                          std::optional<Tensor> key_bias, int64_t scores) {
  const Tensor cu_q = cu_seqlens_vector("cu_seqlens_q", cu_seqlens_q);
  const Tensor cu_k = cu_seqlens_vector("cu_seqlens_k", cu_seqlens_k);
  check_attention(queries, keys, values, cu_q, cu_k);
  const Tensor q = dense_last(queries), k = dense_last(keys), v = dense_last(values);
  const Problem p{
      view(q),          view(k),   view(v),   q.size(0), k.size(0),           data<int32_t>(cu_q), data<int32_t>(cu_k),
      cu_q.size(0) - 1, q.size(1), q.size(2), v.size(2), check_dtype("q", q), q.element_size()};
  check_attention_offsets(p.cu_q, p.cu_k, p.batch, p.total_q, p.total_k, max_seqlen_q, max_seqlen_k);
  return attend(p, empty_as(q, std::array{p.total_q, p.heads, p.dv}), scale, key_bias, scores);
}

}  // namespace

Attended packed_attention(const Tensor& qkv, int64_t heads, const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                          int64_t scores) {
  const Tensor cu = cu_seqlens_vector("cu_seqlens", cu_seqlens);
  check_dim("qkv", qkv, 2, "(T, 3 * H * d)");
  const int64_t width = qkv.size(1) / 3;
  MTVIT_CHECK(heads > 0 && width * 3 == qkv.size(1) && width % heads == 0, "qkv must have shape (T, 3 * ", heads,
              " * d), got ", shape_of(qkv));
  MTVIT_CHECK(qkv.is_contiguous(), "qkv must be contiguous");
  const int64_t d = width / heads;
  const auto element = static_cast<int64_t>(qkv.element_size());
  const auto part = [&](int64_t index) { return View{data<char>(qkv) + index * width * element, qkv.size(1), d}; };
  const auto* offsets = data<int32_t>(cu);
  const Problem p{part(0),           part(1),        part(2), qkv.size(0), qkv.size(0), offsets,
                  offsets,           cu.size(0) - 1, heads,   d,           d,           check_dtype("qkv", qkv),
                  qkv.element_size()};
  const int64_t longest = check_cu_seqlens("cu_seqlens", offsets, p.batch, p.total_q);
  MTVIT_CHECK_VALUE(max_seqlen >= longest, "max_seqlen must be at least ", longest, ", got ", max_seqlen);
  return attend(p, kept_as(Place::attended, qkv, std::array{p.total_q, heads, d}), scale, std::nullopt, scores);
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, float scale, Tensor? key_bias, int scores) -> (Tensor out, Tensor lse, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&mtvit_ops::varlen_attention));
}
