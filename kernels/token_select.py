"""token_select: which entries of each image stay, and the row lists of those and of the others.

Grid: one program an image. A count is known beforehand, so one launch does all; a threshold or a mask is counted in a
launch before. Each program adds up the counts of the images before its own (B integers from the cache), so there is no
scan between programs, and fills its share of what lies behind the live entries.

In ascending order the place of the cut is searched bit by bit on integer keys that order as the scores do: at most as
many counts over registers as a score has bits, and none once exactly the wanted number is above. Then one prefix sum.
In score order the place is the low bits of the key: few entries are ranked by comparing all pairs, many by sorting.
Images that may be longer than one tile, as where the host knows no bound, are read again in pieces for each count, or
compared pair by pair.

Reads a score and a row, writes a row: 12 bytes a token. Integers only, no atomics: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import COMPARED, batch_tile, image_tile, on_device_of, ranking_tile, selection_options
from ._math import rounded
from ._rows import fill_behind, kept_before, kept_counts, put_offsets

COUNT, THRESHOLD, MASK = 0, 1, 2  # the rule
SHORT_PLACE_BITS = 12  # of a place within one tile: with half scores a key still fits 32 bits
LONG_PLACE_BITS = 30
# numbers that change from stage to stage: one binary for all
NOT_SPECIALIZED = ["count", "num_prefix", "capacity", "dropped_capacity"]


@triton.jit
def sort_key(score):
    """A uint32 that is larger for larger scores, equal for both zeros, and 0 for NaN."""
    if score.dtype == tl.float32:
        bits = score.to(tl.uint32, bitcast=True)
        sign: tl.constexpr = 0x80000000
        infinity: tl.constexpr = 0x7F800000
    else:
        bits = score.to(tl.uint16, bitcast=True).to(tl.uint32)
        sign: tl.constexpr = 0x8000
        infinity: tl.constexpr = 0x7F80 if score.dtype == tl.bfloat16 else 0x7C00
    size = bits & (sign - 1)
    key = tl.where(bits >= sign, sign - size, sign + size)
    return tl.where(size > infinity, 0, key).to(tl.uint32)


@triton.jit
def threshold_key(threshold, dtype: tl.constexpr):
    """The key of a number, rounded to the scores' dtype as PyTorch does."""
    return sort_key(rounded(tl.full((), threshold, tl.float32), dtype))


@triton.jit
def load_keys(scores_ptr, stride_scores, first, places, length, num_prefix):
    """Keys of an image's entries: the largest for its prefix, 0 past its end."""
    inside = places < length
    score = tl.load(scores_ptr + (first + places).to(tl.int64) * stride_scores, mask=inside, other=0.0)
    top: tl.constexpr = 0xFFFFFFFF if scores_ptr.dtype.element_ty == tl.float32 else 0xFFFF
    key = tl.where(places < num_prefix, top, sort_key(score))
    return tl.where(inside, key, 0).to(tl.uint32)


@triton.jit
def load_flags(mask_ptr, stride_mask, first, places, length, num_prefix):
    """Which of an image's entries a mask keeps."""
    inside = places < length
    flag = tl.load(mask_ptr + (first + places).to(tl.int64) * stride_mask, mask=inside, other=0) != 0
    return inside & (flag | (places < num_prefix))


@triton.jit
def count_above(
    bar, tile, scores_ptr, stride_scores, first, length, num_prefix, ONE_TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys of an image are larger than ``bar``."""
    if ONE_TILE:
        found = (tile > bar).to(tl.int32)
    else:
        found = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, length, BLOCK):
            places = start + tl.arange(0, BLOCK)
            found += (load_keys(scores_ptr, stride_scores, first, places, length, num_prefix) > bar).to(tl.int32)
    return tl.sum(found)


@triton.jit
def finish(
    out_ptr,
    out_cu_seqlens_ptr,
    dropped_ptr,
    dropped_cu_seqlens_ptr,
    cu_seqlens_ptr,
    before,
    total,
    capacity,
    dropped_capacity,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets of both lists, and -1 behind their live entries."""
    image, num_images = tl.program_id(0), tl.num_programs(0)
    put_offsets(out_cu_seqlens_ptr, image, num_images, before, total)
    fill_behind(out_ptr, total, capacity, image, num_images, BLOCK)
    if DROPPED:
        others = tl.load(cu_seqlens_ptr + num_images) - total
        put_offsets(dropped_cu_seqlens_ptr, image, num_images, tl.load(cu_seqlens_ptr + image) - before, others)
        fill_behind(dropped_ptr, others, dropped_capacity, image, num_images, BLOCK)
    else:
        put_offsets(dropped_cu_seqlens_ptr, image, num_images, 0, 0)


@triton.jit(do_not_specialize=["num_prefix"])
def token_select_count_kernel(
    scores_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    mask_ptr,  # (T,)
    counts_ptr,  # (B,)
    stride_scores,
    stride_mask,
    threshold,
    num_prefix,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + image)
    length = tl.load(cu_seqlens_ptr + image + 1) - first
    kept = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        if RULE == 1:
            bar = threshold_key(threshold, scores_ptr.dtype.element_ty)
            stays = load_keys(scores_ptr, stride_scores, first, places, length, num_prefix) > bar
        else:
            stays = load_flags(mask_ptr, stride_mask, first, places, length, num_prefix)
        kept += stays.to(tl.int32)
    tl.store(counts_ptr + image, tl.sum(kept))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def token_select_kernel(
    scores_ptr,  # (T,), read unless the rule is a mask
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    mask_ptr,  # (T,)
    counts_ptr,  # (B,), read unless ONE_COUNT
    out_ptr,  # (capacity,)
    out_cu_seqlens_ptr,  # (B + 1,)
    dropped_ptr,  # (dropped_capacity,)
    dropped_cu_seqlens_ptr,  # (B + 1,)
    stride_scores,
    stride_rows,
    stride_mask,
    count,
    threshold,
    num_prefix,
    capacity,
    dropped_capacity,
    RULE: tl.constexpr,
    ONE_COUNT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DROPPED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    image, num_images = tl.program_id(0), tl.num_programs(0)
    first = tl.load(cu_seqlens_ptr + image)
    length = tl.load(cu_seqlens_ptr + image + 1) - first
    before, total = kept_before(image, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT, BLOCK_B)

    tile = tl.zeros((BLOCK,), tl.uint32)
    bar = tl.full((), 0, tl.uint32)
    ties = 0  # of the keys equal to the bar, how many stay
    if RULE == 0:
        if ONE_TILE:
            tile = load_keys(scores_ptr, stride_scores, first, tl.arange(0, BLOCK), length, num_prefix)
        wanted = kept_counts(image, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT)
        # the largest bar that `wanted` keys reach, from its highest bit down
        bit = tl.full((), 0x80000000 if scores_ptr.dtype.element_ty == tl.float32 else 0x8000, tl.uint32)
        reached = length
        while (bit != 0) & (reached != wanted):
            tried = bar | bit
            found = count_above(tried - 1, tile, scores_ptr, stride_scores, first, length, num_prefix, ONE_TILE, BLOCK)
            bar = tl.where(found >= wanted, tried, bar)
            reached = tl.where(found >= wanted, found, reached)
            bit = bit >> 1
        ties = wanted - count_above(bar, tile, scores_ptr, stride_scores, first, length, num_prefix, ONE_TILE, BLOCK)
    if RULE == 1:
        bar = threshold_key(threshold, scores_ptr.dtype.element_ty)

    above_seen, equal_seen = 0, 0
    for start in range(0, BLOCK if ONE_TILE else length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < length
        equal = tl.zeros((BLOCK,), tl.int1)
        if RULE == 2:
            above = load_flags(mask_ptr, stride_mask, first, places, length, num_prefix)
        else:
            key = tile
            if RULE == 1 or not ONE_TILE:
                key = load_keys(scores_ptr, stride_scores, first, places, length, num_prefix)
            above = key > bar
            if RULE == 0:
                equal = inside & (key == bar)
        # two prefix sums in one: a tile has fewer than 2**15 entries
        both = above.to(tl.int32) * 65536 + equal.to(tl.int32)
        sums = tl.cumsum(both, 0) - both
        equal_before = equal_seen + (sums & 65535)
        stays = above | (equal & (equal_before < ties))
        slot = before + above_seen + (sums >> 16) + tl.minimum(equal_before, ties)
        row = first + places
        if HAS_ROWS:
            row = tl.load(rows_ptr + row.to(tl.int64) * stride_rows, mask=inside, other=-1)
        tl.store(out_ptr + slot, row, mask=stays & (slot < capacity))
        if DROPPED:
            slot = first + places - slot
            tl.store(dropped_ptr + slot, row, mask=inside & (stays == 0) & (slot < dropped_capacity))
        above_seen += tl.sum(above.to(tl.int32))
        equal_seen += tl.sum(equal.to(tl.int32))
    finish(
        out_ptr,
        out_cu_seqlens_ptr,
        dropped_ptr,
        dropped_cu_seqlens_ptr,
        cu_seqlens_ptr,
        before,
        total,
        capacity,
        dropped_capacity,
        DROPPED,
        BLOCK,
    )


@triton.jit
def worst_last(
    scores_ptr,
    mask_ptr,
    stride_scores,
    stride_mask,
    first,
    places,
    length,
    num_prefix,
    RULE: tl.constexpr,
    PLACE_BITS: tl.constexpr,
):
    """Integers that sort as the lists do in score order, no two equal: the lowest bits are the place."""
    key = load_keys(scores_ptr, stride_scores, first, places, length, num_prefix)
    half: tl.constexpr = scores_ptr.dtype.element_ty != tl.float32
    rank = (0xFFFF if half else 0xFFFFFFFF) - key.to(tl.int64)
    behind = places >= length
    if RULE == 2:
        behind = behind | (load_flags(mask_ptr, stride_mask, first, places, length, num_prefix) == 0)
    rank = tl.where(behind, rank + (0x10000 if half else 0x100000000), rank)
    sorts = (rank << PLACE_BITS) | places
    return sorts.to(tl.int32) if half and PLACE_BITS <= 14 else sorts


@triton.jit
def sort(x, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Rising order by a bitonic network in a loop: tl.sort unrolls it, which takes a minute to compile for 4,096."""
    place = tl.arange(0, BLOCK)
    for level in range(BITS):
        for step in range(level + 1):
            distance = 1 << (level - step)
            partner = tl.gather(x, place ^ distance, 0)
            keeps_smaller = ((place & distance) == 0) == ((place & (2 << level)) == 0)
            x = tl.where((partner < x) == keeps_smaller, partner, x)
    return x


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def token_select_by_score_kernel(
    scores_ptr,  # (T,)
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    mask_ptr,  # (T,)
    counts_ptr,  # (B,), read unless ONE_COUNT
    out_ptr,  # (capacity,)
    out_cu_seqlens_ptr,  # (B + 1,)
    dropped_ptr,  # (dropped_capacity,)
    dropped_cu_seqlens_ptr,  # (B + 1,)
    stride_scores,
    stride_rows,
    stride_mask,
    count,
    num_prefix,
    capacity,
    dropped_capacity,
    RULE: tl.constexpr,
    ONE_COUNT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DROPPED: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    PLACE_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
):
    image, num_images = tl.program_id(0), tl.num_programs(0)
    first = tl.load(cu_seqlens_ptr + image)
    length = tl.load(cu_seqlens_ptr + image + 1) - first
    before, total = kept_before(image, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT, BLOCK_B)
    wanted = kept_counts(image, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT)
    for start in range(0, BLOCK if SORT else length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        sorts = worst_last(
            scores_ptr, mask_ptr, stride_scores, stride_mask, first, places, length, num_prefix, RULE, PLACE_BITS
        )
        if SORT:
            position = places
            places = (sort(sorts, BLOCK, BLOCK_BITS) & ((1 << PLACE_BITS) - 1)).to(tl.int32)
        else:
            position = tl.zeros((BLOCK,), tl.int32)
            for other in range(0, length, BLOCK_OTHERS):
                others = worst_last(
                    scores_ptr,
                    mask_ptr,
                    stride_scores,
                    stride_mask,
                    first,
                    other + tl.arange(0, BLOCK_OTHERS),
                    length,
                    num_prefix,
                    RULE,
                    PLACE_BITS,
                )
                position += tl.sum((others[None, :] < sorts[:, None]).to(tl.int32), axis=1)
        inside = places < length
        row = first + places
        if HAS_ROWS:
            row = tl.load(rows_ptr + row.to(tl.int64) * stride_rows, mask=inside, other=-1)
        slot = before + position
        tl.store(out_ptr + slot, row, mask=inside & (position < wanted) & (slot < capacity))
        if DROPPED:
            slot = first - before + position - wanted
            tl.store(dropped_ptr + slot, row, mask=inside & (position >= wanted) & (slot < dropped_capacity))
    finish(
        out_ptr,
        out_cu_seqlens_ptr,
        dropped_ptr,
        dropped_cu_seqlens_ptr,
        cu_seqlens_ptr,
        before,
        total,
        capacity,
        dropped_capacity,
        DROPPED,
        BLOCK,
    )


def token_select(
    scores: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    keep_counts: Tensor | None,
    keep: int,
    threshold: float | None,
    num_prefix_tokens: int,
    by_score: bool,
    capacity: int,
    return_dropped: bool,
    dropped_capacity: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = mask if scores is None else scores
    assert given is not None
    tokens, batch = given.shape[0], cu_seqlens.shape[0] - 1
    sizes = capacity, dropped_capacity if return_dropped else 0
    if tokens == 0 or batch == 0:
        out, dropped = (cu_seqlens.new_full((size,), -1) for size in sizes)
        return out, torch.zeros_like(cu_seqlens), dropped, torch.zeros_like(cu_seqlens)
    out, dropped = (cu_seqlens.new_empty(size) for size in sizes)
    out_offsets, dropped_offsets = cu_seqlens.new_empty(batch + 1), cu_seqlens.new_empty(batch + 1)
    cu_seqlens = cu_seqlens.contiguous()
    rule = MASK if mask is not None else COUNT if threshold is None else THRESHOLD
    by_score = by_score and scores is not None  # a mask alone orders nothing
    longest = min(max_seqlen, tokens)
    stride_scores = 0 if scores is None else scores.stride(0)
    stride_rows = 0 if rows is None else rows.stride(0)
    stride_mask = 0 if mask is None else mask.stride(0)
    bar = 0.0 if threshold is None else threshold
    counts = None if keep_counts is None else keep_counts.contiguous()
    with on_device_of(given):
        if rule != COUNT:
            counts = cu_seqlens.new_empty(batch)
            _, block, warps = image_tile(longest)
            token_select_count_kernel[(batch,)](
                scores,
                cu_seqlens,
                mask,
                counts,
                stride_scores,
                stride_mask,
                bar,
                num_prefix_tokens,
                RULE=rule,
                BLOCK=block,
                num_warps=warps,
            )
        lists = rows, cu_seqlens, mask, counts, out, out_offsets, dropped, dropped_offsets
        strides = stride_scores, stride_rows, stride_mask
        flags = {
            "RULE": rule,
            "ONE_COUNT": counts is None,
            "HAS_ROWS": rows is not None,
            "DROPPED": return_dropped,
            "BLOCK_B": batch_tile(batch),
        }
        if by_score:
            sort, block, warps = ranking_tile(longest)
            token_select_by_score_kernel[(batch,)](
                scores,
                *lists,
                *strides,
                keep,
                num_prefix_tokens,
                *sizes,
                **flags,
                SORT=sort,
                BLOCK=block,
                BLOCK_OTHERS=COMPARED,
                PLACE_BITS=SHORT_PLACE_BITS if longest <= 1 << SHORT_PLACE_BITS else LONG_PLACE_BITS,
                BLOCK_BITS=block.bit_length() - 1,
                num_warps=warps,
                **selection_options(block, warps, given.device),
            )
        else:
            one_tile, block, warps = image_tile(longest)
            token_select_kernel[(batch,)](
                scores,
                *lists,
                *strides,
                keep,
                bar,
                num_prefix_tokens,
                *sizes,
                **flags,
                ONE_TILE=one_tile,
                BLOCK=block,
                num_warps=warps,
                **selection_options(block, warps, given.device),
            )
    return out, out_offsets, dropped, dropped_offsets
