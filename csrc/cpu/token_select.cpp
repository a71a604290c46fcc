// token_select on the CPU: which entries of each image stay, in which order, and their rows.
//
// T entries, image b holding cu_seqlens[b] to [b + 1]; scores (T,), rows (T,) or none (entry i is row i).
// Exactly one rule: keep (one count), keep_counts (B,), threshold, mask (T,). The first num_prefix_tokens of each image
// always stay. Order of worth: higher score, then smaller position; NaN below -inf; -0 equals +0. Entries past
// cu_seqlens[B] are not read. Images are independent: threads write disjoint parts.
#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "sort_keys.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

struct Selection {
  const int32_t *cu, *rows, *keep_counts;  // rows and keep_counts may be null
  const bool* mask;
  int64_t batch, keep, num_prefix;
  std::optional<double> threshold;  // rounded to the dtype of the scores
  bool by_score, ranked;            // ranked: the rule is a count
  int32_t *out, *dropped;           // dropped may be null
  const int32_t *out_cu, *dropped_cu;

  int64_t length(int64_t b) const { return cu[b + 1] - cu[b]; }
  int64_t prefix(int64_t b) const { return std::min(num_prefix, length(b)); }
  int64_t wanted(int64_t b) const { return keep_counts ? keep_counts[b] : keep; }

  template <typename S>
  bool stays(const S* scores, int64_t entry) const {
    return mask ? mask[entry] : scores[entry] > static_cast<S>(*threshold);
  }
};

template <typename S>
int64_t count_kept(const Selection& s, const S* scores, int64_t b) {
  if (s.ranked) return s.wanted(b);
  int64_t kept = s.prefix(b);
  for (int64_t i = s.cu[b] + s.prefix(b); i < s.cu[b + 1]; ++i) kept += s.stays(scores, i);
  return kept;
}

template <typename S>
auto keys_of(const Selection& s, const S* scores, int64_t b) {
  std::vector<decltype(key_of(S{}, 0))> keys;
  keys.reserve(static_cast<size_t>(s.length(b)));
  for (int64_t i = s.prefix(b); i < s.length(b); ++i) {
    keys.push_back(key_of(scores[s.cu[b] + i], static_cast<int32_t>(i)));
  }
  return keys;
}

// Writes the rows of image b's entries: prefix, then kept, and dropped apart.
template <typename S>
void select_image(const Selection& s, const S* scores, int64_t b) {
  using Key = decltype(key_of(S{}, 0));
  const int64_t first = s.cu[b], length = s.length(b), prefix = s.prefix(b);
  const auto row = [&](int64_t place) { return s.rows ? s.rows[first + place] : static_cast<int32_t>(first + place); };
  int32_t* out = s.out + s.out_cu[b];
  int32_t* dropped = s.dropped ? s.dropped + s.dropped_cu[b] : nullptr;
  for (int64_t i = 0; i < prefix; ++i) *out++ = row(i);

  if (s.by_score && scores) {
    std::vector<Key> keys = keys_of(s, scores, b);
    auto middle = keys.begin();
    if (s.ranked) {
      middle += s.wanted(b) - prefix;
      if (middle != keys.end()) std::nth_element(keys.begin(), middle, keys.end());
    } else {
      const auto stays = [&](const Key& key) { return s.stays(scores, first + place_of(key)); };
      middle = std::partition(keys.begin(), keys.end(), stays);
    }
    std::sort(keys.begin(), middle);
    for (auto key = keys.begin(); key != middle; ++key) *out++ = row(place_of(*key));
    if (!dropped) return;
    std::sort(middle, keys.end());
    for (auto key = middle; key != keys.end(); ++key) *dropped++ = row(place_of(*key));
    return;
  }
  const auto write = [&](int64_t place, bool kept) {
    if (kept) {
      *out++ = row(place);
    } else if (dropped) {
      *dropped++ = row(place);
    }
  };
  const int64_t wanted = s.wanted(b) - prefix;  // of a count
  if (s.ranked && wanted > 0 && wanted < length - prefix) {
    const std::vector<Key> keys = keys_of(s, scores, b);
    std::vector<Key> ranked = keys;
    std::nth_element(ranked.begin(), ranked.begin() + (wanted - 1), ranked.end());
    const Key worst = ranked[wanted - 1];  // keys differ, so exactly `wanted` are not behind it
    for (int64_t i = prefix; i < length; ++i) write(i, keys[i - prefix] <= worst);
  } else {
    for (int64_t i = prefix; i < length; ++i) write(i, s.ranked ? wanted > 0 : s.stays(scores, first + i));
  }
}

void check_counts(const Selection& s) {
  for (int64_t b = 0; b < s.batch; ++b) {
    MTVIT_CHECK_VALUE(s.wanted(b) >= s.prefix(b) && s.wanted(b) <= s.length(b), "keep must lie in [", s.prefix(b), ", ",
                      s.length(b), "] for image ", b, " (its prefix, its length), got ", s.wanted(b));
  }
}

template <typename S>
std::tuple<Tensor, Tensor, Tensor, Tensor> select(Selection& s, const S* scores, int64_t capacity, bool return_dropped,
                                                  int64_t dropped_capacity) {
  constexpr int64_t kImages = 8;  // a thread's least share: an image takes microseconds
  std::vector<int64_t> counts(static_cast<size_t>(s.batch));
  torch::stable::parallel_for(0, s.batch, kImages, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) counts[b] = count_kept(s, scores, b);
  });
  int64_t kept = 0;
  for (const int64_t count : counts) kept += count;
  const int64_t num_dropped = s.cu[s.batch] - kept;
  MTVIT_CHECK_VALUE(kept <= capacity, "capacity must be at least ", kept, ", got ", capacity);
  MTVIT_CHECK_VALUE(!return_dropped || num_dropped <= dropped_capacity, "dropped_capacity must be at least ",
                    num_dropped, ", got ", dropped_capacity);

  Tensor out = empty_int32(std::array{capacity}), out_cu = empty_int32(std::array{s.batch + 1});
  Tensor dropped = empty_int32(std::array{return_dropped ? dropped_capacity : 0});
  Tensor dropped_cu = empty_int32(std::array{s.batch + 1});
  auto* ends = mutable_data<int32_t>(out_cu);
  auto* dropped_ends = mutable_data<int32_t>(dropped_cu);
  ends[0] = 0;
  std::fill_n(dropped_ends, s.batch + 1, 0);
  for (int64_t b = 0; b < s.batch; ++b) {
    ends[b + 1] = ends[b] + static_cast<int32_t>(counts[b]);
    if (return_dropped) dropped_ends[b + 1] = dropped_ends[b] + static_cast<int32_t>(s.length(b) - counts[b]);
  }
  s.out = mutable_data<int32_t>(out);
  s.out_cu = ends;
  s.dropped = return_dropped ? mutable_data<int32_t>(dropped) : nullptr;
  s.dropped_cu = dropped_ends;
  torch::stable::parallel_for(0, s.batch, kImages, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) select_image(s, scores, b);
  });
  std::fill(s.out + kept, s.out + capacity, -1);
  if (return_dropped) std::fill(s.dropped + num_dropped, s.dropped + dropped_capacity, -1);
  return {out, out_cu, dropped, dropped_cu};
}

// What `scores > threshold` compares with in PyTorch: the number in the scores' dtype.
double threshold_in(ScalarType type, double threshold, const Tensor& like) {
  if (type == ScalarType::Double) return threshold;
  if (type == ScalarType::Float) return static_cast<float>(threshold);
  Tensor number = torch::stable::new_empty(like, {1}, ScalarType::Double);
  *mutable_data<double>(number) = threshold;
  return *data<float>(torch::stable::to(torch::stable::to(number, type), ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_select(std::optional<Tensor> scores, std::optional<Tensor> rows,
                                                        const Tensor& cu_seqlens, std::optional<Tensor> mask,
                                                        std::optional<Tensor> keep_counts, int64_t keep,
                                                        std::optional<double> threshold, int64_t num_prefix_tokens,
                                                        bool by_score, int64_t capacity, bool return_dropped,
                                                        int64_t dropped_capacity) {
  const int rules = (keep >= 0) + keep_counts.has_value() + threshold.has_value() + mask.has_value();
  MTVIT_CHECK(rules == 1, "exactly one of keep, keep_counts, threshold and mask must be given, got ", rules);
  MTVIT_CHECK(scores || mask, "scores must be given unless mask is");
  MTVIT_CHECK(num_prefix_tokens >= 0, "num_prefix_tokens must be at least 0, got ", num_prefix_tokens);
  MTVIT_CHECK(capacity >= 0, "capacity must be at least 0, got ", capacity);
  MTVIT_CHECK(!return_dropped || dropped_capacity >= 0, "dropped_capacity must be at least 0, got ", dropped_capacity);
  const Tensor cu = cu_seqlens_vector("cu_seqlens", cu_seqlens);
  if (scores) check_dim("scores", *scores, 1, "(T,)");
  const int64_t entries = scores ? scores->size(0) : (check_dim("mask", *mask, 1, "(T,)"), mask->size(0));

  Selection s{};
  s.cu = data<int32_t>(cu);
  s.batch = cu.size(0) - 1;
  s.keep = keep;
  s.num_prefix = num_prefix_tokens;
  s.by_score = by_score;
  s.ranked = keep >= 0 || keep_counts;
  Tensor list, counts, flags, values;
  if (rows) {
    check_length("rows", *rows, entries);
    list = int32_vector("rows", *rows);
    s.rows = data<int32_t>(list);
  }
  if (keep_counts) {
    check_length("keep_counts", *keep_counts, s.batch);
    counts = int32_vector("keep_counts", *keep_counts);
    s.keep_counts = data<int32_t>(counts);
  }
  if (mask) {
    check_length("mask", *mask, entries);
    MTVIT_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    flags = as_contiguous(*mask);
    s.mask = data<bool>(flags);
  }
  check_cu_seqlens("cu_seqlens", s.cu, s.batch, entries);
  if (s.ranked) check_counts(s);
  if (scores && scores->scalar_type() == ScalarType::Double) {
    s.threshold = threshold;
    values = as_contiguous(*scores);
    return select(s, data<double>(values), capacity, return_dropped, dropped_capacity);
  }
  if (scores) {
    values = as_float32("scores", *scores);
    if (threshold) s.threshold = threshold_in(scores->scalar_type(), *threshold, values);
  }
  return select(s, scores ? data<float>(values) : nullptr, capacity, return_dropped, dropped_capacity);
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "token_select(Tensor? scores, Tensor? rows, Tensor cu_seqlens, Tensor? mask, Tensor? keep_counts, int keep, "
      "float? threshold, int num_prefix_tokens, bool by_score, int capacity, bool return_dropped, "
      "int dropped_capacity) -> (Tensor rows, Tensor cu_seqlens, Tensor dropped_rows, Tensor dropped_cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("token_select", TORCH_BOX(&mtvit_ops::token_select));
}
