"""Where a program of a packed batch stands, and loads and stores of one image's tokens."""

from __future__ import annotations

import triton
import triton.language as tl

OFFSETS_AT_ONCE = tl.constexpr(256)  # two a thread of 4 warps; a larger batch takes more rounds


@triton.jit
def find_span(work, cu_ptr, batch, spans, SPAN: tl.constexpr, FLAT: tl.constexpr):
    """Image of a work item, and which of the image's spans of SPAN tokens it is.

    Dense: every image has ``spans`` items. FLAT: image i has the items from ``cu[i] // SPAN + i`` on, which is enough
    for its tokens wherever they start, needs no sum over the images before it, and wastes at most one item an image.
    """
    if FLAT:
        before = 0
        for start in range(0, batch, OFFSETS_AT_ONCE):
            images = start + tl.arange(0, OFFSETS_AT_ONCE)
            first = tl.load(cu_ptr + images, mask=images < batch, other=0) // SPAN + images
            before += tl.sum(((first <= work) & (images < batch)).to(tl.int32))
        image = before - 1
        place = work - (tl.load(cu_ptr + image) // SPAN + image)
    else:
        image = work // spans
        place = work % spans
    return image, place


@triton.jit
def span_of(cu_ptr, image):
    """First token of an image, int64, and its length."""
    start = tl.load(cu_ptr + image)
    return start.to(tl.int64), tl.load(cu_ptr + image + 1) - start


@triton.jit
def load_rows(ptr, rows, stride_t, stride_d, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK_D) of an image's tokens, zeros past its end; MASKED: not all rows are known to lie in it."""
    columns = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride_t + columns[None, :] * stride_d
    if MASKED and D < BLOCK_D:
        return tl.load(at, mask=(rows < num_rows)[:, None] & (columns < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(rows < num_rows)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def fill_behind(ptr, cu_ptr, batch, num_rows, value, WIDTH: tl.constexpr):
    """``value`` in the rows past the last offset of a contiguous (num_rows, WIDTH), shared out among the programs."""
    step = tl.num_programs(0).to(tl.int64) * 1024
    first = tl.load(cu_ptr + batch).to(tl.int64) * WIDTH + tl.program_id(0).to(tl.int64) * 1024
    for start in range(first, num_rows.to(tl.int64) * WIDTH, step):
        at = start + tl.arange(0, 1024)
        tl.store(ptr + at, tl.full((1024,), value, ptr.dtype.element_ty), mask=at < num_rows.to(tl.int64) * WIDTH)
