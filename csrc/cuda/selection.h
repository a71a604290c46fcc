// token_select by one block an image: which entries stay, in which order, and their rows.
//
// The order of worth is that of the reference: prefix, then falling scores (-0 equals +0), NaN last, equal scores by
// the smaller position. Scores are compared as whole numbers: a key's order is the scores' order reversed, and one sort
// of (key, position) by the key alone keeps equals in the order they stand in, if it is stable. Block::sort(n, key_of,
// visit) is such a sort of the places 0 to n - 1, n <= sort_limit: it calls visit(rank, place) once for each place, in
// any thread.
#pragma once
#include "block.h"
#include "kernels.h"

namespace mtvit_ops::cuda {

// Scores of a dtype, told by its bits: an unsigned type as wide, and how it writes infinity.
template <typename Bits_, Bits_ INFINITE>
struct Score {
  using Bits = Bits_;
  static constexpr Bits SIGN = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));

  // Smaller is better; all ones for NaN, and never 0.
  static MTVIT_DEVICE Bits key(Bits bits) {
    const Bits size = static_cast<Bits>(bits & ~SIGN);
    if (size > INFINITE) return static_cast<Bits>(~Bits{0});
    if (size == 0) return static_cast<Bits>(SIGN - 1);  // of both signs
    return bits & SIGN ? bits : static_cast<Bits>(SIGN - 1 - bits);
  }
};

struct Float32 : Score<uint32_t, 0x7f800000u> {};
struct BFloat16 : Score<uint16_t, 0x7f80u> {};
struct Float16 : Score<uint16_t, 0x7c00u> {};
struct Float64 : Score<uint64_t, 0x7ff0000000000000u> {};

// What is known of an image before its scores are looked at.
struct Images {
  const MtvitSelection& s;

  MTVIT_DEVICE explicit Images(const MtvitSelection& selection) : s(selection) {}

  MTVIT_DEVICE bool counted() const { return s.keep >= 0 || s.keep_counts; }
  MTVIT_DEVICE Span span(int64_t image) const { return span_of(s.cu_seqlens, s.tokens, image); }
  MTVIT_DEVICE int prefix(const Span& span) const {
    return static_cast<int>(s.num_prefix_tokens < span.length ? s.num_prefix_tokens : span.length);
  }

  // Entries that an image keeps; where mask or threshold rules, once count_kept has run.
  MTVIT_DEVICE int kept(int64_t image) const {
    if (!counted()) return s.counts[image];
    const int length = span(image).length;
    const int64_t wanted = s.keep_counts ? s.keep_counts[image] : s.keep;
    return static_cast<int>(wanted < 0 ? 0 : wanted < length ? wanted : length);
  }
};

template <class Score>
struct Rule : Images {
  using Bits = typename Score::Bits;
  Bits threshold_key;

  MTVIT_DEVICE explicit Rule(const MtvitSelection& selection)
      : Images(selection), threshold_key(Score::key(static_cast<Bits>(selection.threshold))) {}

  MTVIT_DEVICE Bits key(int64_t entry) const { return Score::key(static_cast<const Bits*>(s.scores)[entry]); }
  // by mask or threshold; NaN passes none
  MTVIT_DEVICE bool stays(int64_t entry) const { return s.mask ? s.mask[entry] != 0 : key(entry) < threshold_key; }
};

// counts[image], where mask or threshold rules.
template <class Score, class Block>
MTVIT_DEVICE void count_kept(Block& block, const MtvitSelection& s, int64_t image) {
  const Rule<Score> rule(s);
  const Span span = rule.span(image);
  const int prefix = rule.prefix(span);
  int kept = 0;
  for (int place = block.thread; place < span.length; place += Block::threads) {
    kept += place < prefix || rule.stays(span.first + place);
  }
  kept = block.sum(kept);
  if (block.thread == 0) s.counts[image] = kept;
}

// The sort of an image that is too long for a block's memory: right, and as slow as the square of its length.
template <class Block, class KeyOf, class Visit>
MTVIT_DEVICE void rank_by_counting(Block& block, int n, KeyOf key_of, Visit visit) {
  for (int place = block.thread; place < n; place += Block::threads) {
    const auto key = key_of(place);
    int rank = 0;
    for (int other = 0; other < n; ++other) {
      const auto its = key_of(other);
      rank += its < key || (its == key && other < place);
    }
    visit(rank, place);
  }
}

// One image's part of the results; `blocks` blocks share what no image writes. scanned: out_cu is there already.
template <class Score, class Block>
MTVIT_DEVICE void select_image(Block& block, const MtvitSelection& s, int64_t image, int64_t blocks, bool scanned) {
  const Rule<Score> rule(s);
  const Kept all = scanned ? Kept{s.out_cu[image], s.out_cu[s.batch]}
                           : count_images(block, s.batch, image, [&](int64_t i) { return rule.kept(i); });
  fill_dead(block, image, blocks, s.out, all.total, s.capacity);
  if (s.return_dropped) {
    const int live = offset_of(s.cu_seqlens, s.tokens, s.batch);
    fill_dead(block, image, blocks, s.dropped, live - all.total, s.dropped_capacity);
  }
  if (image == 0 && block.thread == 0) {
    s.dropped_cu[0] = 0;
    if (!scanned) s.out_cu[0] = 0;
  }
  if (image >= s.batch) return;  // a batch of none

  const Span span = rule.span(image);
  const int wanted = rule.kept(image), prefix = rule.prefix(span), tail = span.length - prefix;
  const int dropped_before = span.first - all.before;
  if (block.thread == 0) {
    if (!scanned) s.out_cu[image + 1] = all.before + wanted;
    s.dropped_cu[image + 1] = s.return_dropped ? dropped_before + span.length - wanted : 0;
  }
  const auto write = [&](bool stays, int place, int slot) {
    if (!stays && !s.return_dropped) return;
    slot += stays ? all.before : dropped_before;
    int32_t* out = stays ? s.out : s.dropped;
    const int entry = span.first + place;
    if (slot >= 0 && slot < (stays ? s.capacity : s.dropped_capacity)) out[slot] = s.rows ? s.rows[entry] : entry;
  };
  const bool in_shared = tail <= Block::sort_limit;
  const auto mark = [&](int place) {
    return in_shared ? static_cast<int>(block.marks[place]) : s.marks[span.first + place];
  };
  const auto set_mark = [&](int place, int value) {
    if (in_shared) {
      block.marks[place] = static_cast<uint16_t>(value);
    } else {
      s.marks[span.first + place] = value;
    }
  };

  const bool counted = rule.counted(), by_score = s.by_score && s.scores;
  const bool direct = by_score && !s.mask;  // ranks are slots: those above a threshold are the best, too
  const bool cut = counted && wanted > prefix && wanted < span.length;  // somewhere in the tail
  const auto write_ranked = [&](int rank, int place) {
    write(rank < wanted, place, rank < wanted ? rank : rank - wanted);
  };
  if (by_score || cut) {
    const auto key_of = [&](int place) { return rule.key(span.first + prefix + place); };
    const auto visit = [&](int rank, int place) {
      if (direct) {
        write_ranked(prefix + rank, prefix + place);
      } else if (by_score) {
        set_mark(rank, place);
      } else {
        set_mark(place, prefix + rank < wanted);
      }
    };
    if (in_shared) {
      block.sort(tail, key_of, visit);
    } else {
      rank_by_counting(block, tail, key_of, visit);
    }
    block.sync();  // for the marks
  }
  if (direct) {
    for (int place = block.thread; place < prefix; place += Block::threads) write_ranked(place, place);
    return;
  }
  const auto stays = [&](int place) {
    if (place < prefix) return !counted || place < wanted;
    if (cut) return mark(place - prefix) != 0;
    return counted ? wanted > prefix : rule.stays(span.first + place);
  };
  int before = 0;
  for (int start = 0; start < span.length; start += Block::threads) {
    const int index = start + block.thread;
    const bool inside = index < span.length;
    const int place = by_score && inside && index >= prefix ? prefix + mark(index - prefix) : index;
    const bool chosen = inside && stays(place);
    int total;
    const int rank = before + block.scan(chosen, total);
    if (inside) write(chosen, place, chosen ? rank : index - rank);
    before += total;
  }
}

}  // namespace mtvit_ops::cuda
