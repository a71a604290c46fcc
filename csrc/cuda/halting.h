// halting_step by many blocks: A-ViT's gate on the listed tokens, the next row list, the readout rows.
//
// Three passes, each a launch, since each needs all of the one before: copy_state (the rows that nobody lists keep what
// they have), gate_image (one block an image: the listed rows, which are all different), then pack_image and
// readout_row.
#pragma once
#include "block.h"
#include "kernels.h"

#include <math.h>

namespace mtvit_ops::cuda {

MTVIT_DEVICE void copy_state(const MtvitHalting& s, int64_t row) {
  s.new_cumulative[row] = s.cumulative[row];
  s.new_remainder[row] = s.remainder[row];
  s.new_ponder[row] = s.ponder[row];
  s.new_counters[row] = s.counters[row];
  s.score[row] = 0.0f;
  s.share[row] = 0.0f;
}

// One listed row; true if it lives on. The same operations in the same order as the reference, none contracted.
MTVIT_DEVICE bool gate_row(const MtvitHalting& s, int64_t row, float channel) {
  const float score = 1.0f / (1.0f + expf(-(channel * s.gate_scale - s.gate_center)));
  const float step = s.last ? 1.0f : score;
  const float grown = s.cumulative[row] + step, remainder = s.remainder[row];
  const bool reached = grown > s.bar, going = grown < s.bar;  // at the bar: neither, and no weight
  s.score[row] = score;
  s.share[row] = reached ? remainder : going ? step : 0.0f;
  s.new_cumulative[row] = grown;
  s.new_ponder[row] = s.ponder[row] + (reached ? 1.0f + remainder : 1.0f);
  if (going) {
    s.new_remainder[row] = remainder - step;
    s.new_counters[row] = s.counters[row] + 1;
  }
  return going;
}

// An image's rows that live on, at the head of its part of `going`, and their number. Load: x as float by element.
template <class Block, class Load>
MTVIT_DEVICE void gate_image(Block& block, const MtvitHalting& s, int64_t image, Load load) {
  const Span span = span_of(s.cu_seqlens, s.tokens, image);
  int before = 0;
  for (int start = 0; start < span.length; start += Block::threads) {
    const int index = start + block.thread;
    int row = -1;
    if (index < span.length) row = s.rows ? s.rows[span.first + index] : span.first + index;
    const bool going = row >= 0 && gate_row(s, row, load(row * s.x_stride));
    int total;
    const int rank = before + block.scan(going, total);
    if (going) s.going[span.first + rank] = row;
    before += total;
  }
  if (block.thread == 0) s.counts[image] = before;
}

// An image's part of the next list; scanned: next_cu is there already.
template <class Block>
MTVIT_DEVICE void pack_image(Block& block, const MtvitHalting& s, int64_t image, int64_t blocks, bool scanned) {
  const Kept all = scanned ? Kept{s.next_cu[image], s.next_cu[s.batch]}
                           : count_images(block, s.batch, image, [&](int64_t i) { return s.counts[i]; });
  fill_dead(block, image, blocks, s.next, all.total, s.tokens);
  if (image == 0 && block.thread == 0 && !scanned) s.next_cu[0] = 0;
  if (image >= s.batch) return;  // a batch of none
  const int first = span_of(s.cu_seqlens, s.tokens, image).first, count = s.counts[image];
  if (block.thread == 0 && !scanned) s.next_cu[image + 1] = all.before + count;
  for (int i = block.thread; i < count; i += Block::threads) s.next[all.before + i] = s.going[first + i];
}

template <class Block, class Load>
MTVIT_DEVICE void readout_row(Block& block, const MtvitHalting& s, int64_t place, Load load) {
  const int64_t row = s.readout[place];
  const float share = s.share[row];
  for (int64_t column = block.thread; column < s.dim; column += Block::threads) {
    const int64_t at = place * s.dim + column;
    s.new_output[at] = s.output[at] + share * load(row * s.x_stride + column);
  }
}

}  // namespace mtvit_ops::cuda
