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
  char* out;
  float *lse, *scores;  // null: nobody wants them
};

struct Options {
  float scale;
  Scores mode = kNone;
  const float* bias = nullptr;
  int64_t bias_token = 0, bias_head = 0;  // strides
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
  ByHead(const Problem& p, Scores mode, const Outputs& o, const std::vector<Item>& items) : p_(p), mode_(mode), o_(o) {
    if (o.lse == nullptr && mode == kNone) return;
    images_.reset(new Image[static_cast<size_t>(p.batch)]);
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

  float* lse(int64_t image, int64_t head) const {
    return o_.lse == nullptr ? nullptr : of(image) + head * lse_row(image);
  }
  // one row, or one a block of queries where a head is more than one item and wants column means
  float* scores(int64_t image, int64_t head) const {
    return of(image) + p_.heads * lse_row(image) + head * at(image).score_rows * key_row(image);
  }

  // To be called after each item: who does an image's last one writes its results.
  void done(const Item& item) {
    if (images_ == nullptr || at(item.image).left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t b = item.image, nk = p_.nk(b);
    if (o_.lse != nullptr) deal(lse(b, 0), lse_row(b), p_.nq(b), o_.lse + p_.cu_q[b] * p_.heads);
    if (mode_ == kNone) return;
    if (!is_whole(p_, item) && mode_ == kMean) {
      for (int64_t h = 0; h < p_.heads; ++h) average(scores(b, h), at(b).score_rows, key_row(b), nk, p_.nq(b));
    }
    deal(scores(b, 0), at(b).score_rows * key_row(b), nk, o_.scores + p_.cu_k[b] * p_.heads);
  }

  int64_t key_row(int64_t image) const { return round_up(p_.nk(image), kMaxWidth); }

 private:
  struct Image {
    std::atomic<int64_t> left{0};  // items to be done yet
    int64_t begin, score_rows;     // where its numbers begin, rows of scores a head
  };

  int64_t lse_row(int64_t image) const { return o_.lse == nullptr ? 0 : round_up(p_.nq(image), kMaxWidth); }
  Image& at(int64_t image) const { return images_[static_cast<size_t>(image)]; }
  float* of(int64_t image) const { return memory_.get() + at(image).begin; }

  // (H, tokens), `row` apart, to (tokens, H).
  void deal(const float* from, int64_t row, int64_t tokens, float* to) const {
    for (int64_t j = 0; j < tokens; ++j) {
      for (int64_t h = 0; h < p_.heads; ++h) *to++ = from[h * row + j];
    }
  }

  const Problem& p_;
  const Scores mode_;
  const Outputs& o_;
  Buffer memory_;
  std::unique_ptr<Image[]> images_;
};

void run(const Problem& p, const Outputs& o, const Options& given, const Item& item, ByHead& by_head) {
  const Scores mode = given.mode;
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
  t.bias = given.bias ? given.bias + first_k * given.bias_token + h * given.bias_head : nullptr;
  t.nq = p.nq(b);
  t.nk = p.nk(b);
  t.d = p.d;
  t.dv = p.dv;
  if (mode == kClass) t.class_row = by_head.scores(b, h);
  t.q_stride = p.q.token;
  t.k_stride = p.k.token;
  t.v_stride = p.v.token;
  t.out_stride = p.heads * p.dv;
  t.bias_stride = given.bias_token;
  t.block_begin = item.begin;
  t.block_end = item.end;
  t.scale = given.scale;
  Buffer large;
  const int64_t work = round_up(scratch_floats(t.nk, t.d, t.dv), kMaxWidth), blocks = num_blocks(t.nq);
  // a whole head's block sums stay in this thread's cache
  const bool own_sums = mode == kMean && is_whole(p, item);
  t.scratch = thread_scratch(work + (own_sums ? blocks * by_head.key_row(b) : 0), large);
  if (mode == kMean) t.block_sums = own_sums ? t.scratch + work : by_head.scores(b, h);
  kernels().attention(t);
  if (own_sums) {
    average(t.block_sums, blocks, by_head.key_row(b), t.nk, t.nq);
    std::copy(t.block_sums, t.block_sums + t.nk, by_head.scores(b, h));
  }
  by_head.done(item);
}

// What no item writes: images without a key or without a query, and the slack behind the last image.
void fill_rest(const Problem& p, const Outputs& o, Scores mode) {
  const auto no_keys = [&](int64_t begin, int64_t end) {
    const int64_t row = p.heads * p.dv * static_cast<int64_t>(p.element);
    std::fill(o.out + begin * row, o.out + end * row, 0);
    if (o.lse == nullptr) return;
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

// The work itself.
void attend(const Problem& p, const Outputs& o, const Options& given) {
  int64_t work = 0;  // multiplications
  for (int64_t b = 0; b < p.batch; ++b) work += p.nq(b) * p.nk(b) * p.heads * (p.d + p.dv);
  constexpr int64_t kWorthThreads = 1 << 19;  // under some 5 microseconds, waking a thread costs more than it does
  const int64_t threads = work < kWorthThreads ? 1 : torch::stable::get_num_threads();
  const std::vector<Item> items = plan(p, threads);
  const auto count = static_cast<int64_t>(items.size());
  ByHead by_head(p, given.mode, o, items);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      run(p, o, given, items[static_cast<size_t>(i)], by_head);
    }
  });
  fill_rest(p, o, given.mode);
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    std::optional<Tensor> key_bias, int64_t scores) {
  const Tensor cu_q = cu_seqlens_vector("cu_seqlens_q", cu_seqlens_q);
  const Tensor cu_k = cu_seqlens_vector("cu_seqlens_k", cu_seqlens_k);
  check_attention(queries, keys, values, cu_q, cu_k);
  const Tensor q = dense_last(queries), k = dense_last(keys), v = dense_last(values);
  const Problem p{
      view(q),          view(k),   view(v),   q.size(0), k.size(0),           data<int32_t>(cu_q), data<int32_t>(cu_k),
      cu_q.size(0) - 1, q.size(1), q.size(2), v.size(2), check_dtype("q", q), q.element_size()};
  check_attention_offsets(p.cu_q, p.cu_k, p.batch, p.total_q, p.total_k, max_seqlen_q, max_seqlen_k);
  check_scores(scores);
  Options given{static_cast<float>(scale), static_cast<Scores>(scores)};
  Tensor bias;  // kept alive as long as given.bias points into it
  if (key_bias) {
    check_key_bias(*key_bias, p.total_k, p.heads);
    bias = as_float32("key_bias", *key_bias);
    given.bias = data<float>(bias);
    given.bias_token = bias.dim() == 2 ? p.heads : 1;
    given.bias_head = bias.dim() == 2 ? 1 : 0;
  }
  Tensor out = empty_as(q, std::array{p.total_q, p.heads, p.dv}), lse = empty_float32(std::array{p.total_q, p.heads});
  Tensor received = empty_float32(std::array{given.mode == kNone ? 0 : p.total_k, p.heads});
  attend(p, {mutable_data<char>(out), mutable_data<float>(lse), mutable_data<float>(received)}, given);
  return {out, lse, received};
}

}  // namespace

void check_scores(int64_t scores) {
  MTVIT_CHECK(scores >= kNone && scores <= kMean, "scores must be 0, 1 or 2, got ", scores);
}

void packed_attention(const PackedQkv& qkv, double scale, int64_t scores, void* out, float* received) {
  const auto element = static_cast<int64_t>(element_size(qkv.dtype)), row = 3 * qkv.heads * qkv.d;
  const auto part = [&](int64_t index) {
    return View{static_cast<const char*>(qkv.data) + index * qkv.heads * qkv.d * element, row, qkv.d};
  };
  const Problem p{part(0),   part(1),   part(2), qkv.tokens, qkv.tokens, qkv.cu_seqlens,         qkv.cu_seqlens,
                  qkv.batch, qkv.heads, qkv.d,   qkv.d,      qkv.dtype,  element_size(qkv.dtype)};
  attend(p, {static_cast<char*>(out), nullptr, received}, {static_cast<float>(scale), static_cast<Scores>(scores)});
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
