"""Helpers for row lists: where entries go in the next one, what stands behind them, and which rows are listed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_counts(images, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT: tl.constexpr):
    """Entries that images keep, 0 past the last image: ONE_COUNT for all or one each, never more than there are."""
    inside = images < num_images
    first = tl.load(cu_seqlens_ptr + images, mask=inside, other=0)
    length = tl.load(cu_seqlens_ptr + images + 1, mask=inside, other=0) - first
    wanted = count
    if not ONE_COUNT:
        wanted = tl.load(counts_ptr + images, mask=inside, other=0)
    return tl.maximum(tl.minimum(wanted, length), 0)


@triton.jit
def kept_before(
    image,
    cu_seqlens_ptr,
    counts_ptr,
    count,
    num_images,
    ONE_COUNT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Entries kept by the images before this one, and by all: each program adds up for itself, instead of a scan."""
    before = tl.zeros((BLOCK_B,), tl.int32)
    everywhere = tl.zeros((BLOCK_B,), tl.int32)
    for start in range(0, num_images, BLOCK_B):
        images = start + tl.arange(0, BLOCK_B)
        kept = kept_counts(images, cu_seqlens_ptr, counts_ptr, count, num_images, ONE_COUNT)
        before += tl.where(images < image, kept, 0)
        everywhere += kept
    return tl.sum(before), tl.sum(everywhere)


@triton.jit
def put_offsets(cu_seqlens_ptr, image, num_images, before, total):
    """This image's start in the next list, and from the last image the end of all."""
    tl.store(cu_seqlens_ptr + image, before)
    tl.store(cu_seqlens_ptr + num_images, total, mask=image == num_images - 1)


@triton.jit
def fill_behind(list_ptr, live, capacity, program, num_programs, BLOCK: tl.constexpr):
    """This program's share of the -1 behind the live entries."""
    for start in range(live + program * BLOCK, capacity, num_programs * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(list_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=at < capacity)


@triton.jit
def is_listed(rows, inside, list_ptr, place_ptr, length):
    """Whether a list of ``length`` entries names these rows, and where.

    ``place_ptr`` (R,) says for listed rows which entry names them. It is never cleared and may hold anything for the
    others: an entry counts if the list confirms it.
    """
    place = tl.load(place_ptr + rows, mask=inside, other=-1)
    inside = inside & (place >= 0) & (place < length)
    return inside & (tl.load(list_ptr + place, mask=inside, other=-1) == rows), place


@triton.jit
def is_alive(rows, inside, rows_ptr, place_ptr, live, HAS_ROWS: tl.constexpr):
    """Whether these rows stand among the live entries."""
    if HAS_ROWS:
        alive, _ = is_listed(rows, inside, rows_ptr, place_ptr, live)
    else:
        alive = inside & (rows < live)
    return alive
