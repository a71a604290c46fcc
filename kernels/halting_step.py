"""halting_step: A-ViT's accumulators, the readout tokens' aggregation and the next row list.

Grid: one program an image steps its listed tokens and counts those that live on. A second launch has three kinds of
programs: one an image to write the next list (each adds up the counts of the images before its own, so there is no scan
between programs), one a tile of rows to carry over what is not listed, and one a readout token.

Reads channel 0 of the live tokens (a sector of 32 bytes each), the readout tokens and the state, and writes the state:
about 100 bytes a token. No atomics, and every place is written by one program: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LIST_TILE, batch_tile, on_device_of
from ._rows import fill_behind, is_alive, kept_before, put_offsets


@triton.jit
def halt(x, cumulative, scale, center, bar, LAST: tl.constexpr):
    """Score, what this layer adds, and as 0 or 1 whether the token has had enough or goes on; just enough: neither."""
    score = 1.0 / (1.0 + tl.exp(center - x * scale))
    step = tl.zeros_like(score) + 1.0 if LAST else score
    grown = cumulative + step
    return score, step, (grown > bar).to(tl.float32), (grown < bar).to(tl.float32)


@triton.jit
def halting_step_kernel(
    x_ptr,  # (R, D), channel 0
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    cumulative_ptr,  # (R,), as the next seven
    remainder_ptr,
    ponder_ptr,
    counters_ptr,
    new_cumulative_ptr,
    new_remainder_ptr,
    new_ponder_ptr,
    new_counters_ptr,
    score_ptr,
    place_ptr,  # (R,): the entry that names a row
    stays_ptr,  # (T,): whether an entry's token lives on
    counts_ptr,  # (B,)
    stride_xr,
    scale,
    center,
    bar,
    LAST: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    first, end = tl.load(cu_seqlens_ptr + image), tl.load(cu_seqlens_ptr + image + 1)
    kept = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        inside = entries < end
        rows, alive = entries, inside
        if HAS_ROWS:
            rows = tl.load(rows_ptr + entries, mask=inside, other=-1)
            alive = inside & (rows >= 0)
            tl.store(place_ptr + rows, entries, mask=alive)
        x = tl.load(x_ptr + rows.to(tl.int64) * stride_xr, mask=alive, other=0.0).to(tl.float32)
        cumulative = tl.load(cumulative_ptr + rows, mask=alive, other=0.0)
        remainder = tl.load(remainder_ptr + rows, mask=alive, other=0.0)
        ponder = tl.load(ponder_ptr + rows, mask=alive, other=0.0)
        counters = tl.load(counters_ptr + rows, mask=alive, other=0)
        score, step, reached, going = halt(x, cumulative, scale, center, bar, LAST)
        stays = going.to(tl.int32) * alive.to(tl.int32)
        tl.store(new_cumulative_ptr + rows, cumulative + step, mask=alive)
        tl.store(new_remainder_ptr + rows, remainder - step * going, mask=alive)
        tl.store(new_ponder_ptr + rows, ponder + (1.0 + remainder * reached), mask=alive)
        tl.store(new_counters_ptr + rows, counters + stays, mask=alive)
        tl.store(score_ptr + rows, score, mask=alive)
        tl.store(stays_ptr + entries, stays.to(tl.int8), mask=inside)
        kept += stays
    tl.store(counts_ptr + image, tl.sum(kept))


@triton.jit
def write_list(
    image,
    rows_ptr,
    cu_seqlens_ptr,
    stays_ptr,
    counts_ptr,
    out_ptr,
    out_cu_seqlens_ptr,
    num_images,
    num_tokens,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """An image's entries that live on, where the images before it leave off."""
    first, end = tl.load(cu_seqlens_ptr + image), tl.load(cu_seqlens_ptr + image + 1)
    before, total = kept_before(image, cu_seqlens_ptr, counts_ptr, 0, num_images, False, BLOCK_B)
    seen = before
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        inside = entries < end
        stays = tl.load(stays_ptr + entries, mask=inside, other=0).to(tl.int32)
        rows = entries
        if HAS_ROWS:
            rows = tl.load(rows_ptr + entries, mask=inside, other=-1)
        tl.store(out_ptr + seen + tl.cumsum(stays, 0) - stays, rows, mask=stays != 0)
        seen += tl.sum(stays)
    put_offsets(out_cu_seqlens_ptr, image, num_images, before, total)
    fill_behind(out_ptr, total, num_tokens, image, num_images, BLOCK)


@triton.jit
def carry_over(
    rows,
    num_rows,
    rows_ptr,
    place_ptr,
    live,
    cumulative_ptr,
    remainder_ptr,
    ponder_ptr,
    counters_ptr,
    new_cumulative_ptr,
    new_remainder_ptr,
    new_ponder_ptr,
    new_counters_ptr,
    score_ptr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state of rows that are not listed, and their score of 0."""
    inside = rows < num_rows
    rest = inside & (is_alive(rows, inside, rows_ptr, place_ptr, live, HAS_ROWS) == 0)
    tl.store(new_cumulative_ptr + rows, tl.load(cumulative_ptr + rows, mask=rest, other=0.0), mask=rest)
    tl.store(new_remainder_ptr + rows, tl.load(remainder_ptr + rows, mask=rest, other=0.0), mask=rest)
    tl.store(new_ponder_ptr + rows, tl.load(ponder_ptr + rows, mask=rest, other=0.0), mask=rest)
    tl.store(new_counters_ptr + rows, tl.load(counters_ptr + rows, mask=rest, other=0), mask=rest)
    tl.store(score_ptr + rows, tl.zeros((BLOCK,), tl.float32), mask=rest)


@triton.jit
def read_out(
    place,
    row,
    alive,
    x_ptr,
    cumulative_ptr,
    remainder_ptr,
    output_ptr,
    new_output_ptr,
    stride_xr,
    stride_xd,
    scale,
    center,
    bar,
    D: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One readout token into the output, with the share that this layer has in it."""
    at = x_ptr + row.to(tl.int64) * stride_xr
    cumulative = tl.load(cumulative_ptr + row, mask=alive, other=0.0)
    remainder = tl.load(remainder_ptr + row, mask=alive, other=0.0)
    channel = tl.load(at, mask=alive, other=0.0).to(tl.float32)
    _, step, reached, going = halt(channel, cumulative, scale, center, bar, LAST)
    share = remainder * reached + step * going
    out_at = place.to(tl.int64) * D
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        # a token that has halted is not read: anything may stand there
        x = tl.load(at + columns * stride_xd, mask=inside & alive, other=0.0).to(tl.float32)
        output = tl.load(output_ptr + out_at + columns, mask=inside, other=0.0)
        tl.store(new_output_ptr + out_at + columns, output + share * x, mask=inside)


@triton.jit
def halting_step_finish_kernel(
    x_ptr,  # (R, D)
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    readout_ptr,  # (P,)
    cumulative_ptr,  # (R,), as the next seven
    remainder_ptr,
    ponder_ptr,
    counters_ptr,
    new_cumulative_ptr,
    new_remainder_ptr,
    new_ponder_ptr,
    new_counters_ptr,
    score_ptr,
    output_ptr,  # (P, D)
    new_output_ptr,  # (P, D)
    place_ptr,  # (R,)
    stays_ptr,  # (T,)
    counts_ptr,  # (B,)
    out_ptr,  # (T,)
    out_cu_seqlens_ptr,  # (B + 1,)
    stride_xr,
    stride_xd,
    num_rows,
    num_tokens,
    num_images,
    num_tiles,
    scale,
    center,
    bar,
    D: tl.constexpr,
    LAST: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_images:
        write_list(
            program,
            rows_ptr,
            cu_seqlens_ptr,
            stays_ptr,
            counts_ptr,
            out_ptr,
            out_cu_seqlens_ptr,
            num_images,
            num_tokens,
            HAS_ROWS,
            BLOCK,
            BLOCK_B,
        )
    else:
        live = tl.load(cu_seqlens_ptr + num_images)
        if program < num_images + num_tiles:
            carry_over(
                (program - num_images) * BLOCK + tl.arange(0, BLOCK),
                num_rows,
                rows_ptr,
                place_ptr,
                live,
                cumulative_ptr,
                remainder_ptr,
                ponder_ptr,
                counters_ptr,
                new_cumulative_ptr,
                new_remainder_ptr,
                new_ponder_ptr,
                new_counters_ptr,
                score_ptr,
                HAS_ROWS,
                BLOCK,
            )
        else:
            place = program - num_images - num_tiles
            row = tl.load(readout_ptr + place)
            read_out(
                place,
                row,
                is_alive(row, row >= 0, rows_ptr, place_ptr, live, HAS_ROWS),
                x_ptr,
                cumulative_ptr,
                remainder_ptr,
                output_ptr,
                new_output_ptr,
                stride_xr,
                stride_xd,
                scale,
                center,
                bar,
                D,
                LAST,
                BLOCK,
            )


def halting_step(
    x: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    readout_rows: Tensor,
    cumulative: Tensor,
    remainder: Tensor,
    ponder: Tensor,
    counters: Tensor,
    output: Tensor,
    gate_scale: float,
    gate_center: float,
    eps: float,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (num_rows, columns), num_readout, batch = x.shape, readout_rows.shape[0], cu_seqlens.shape[0] - 1
    tokens = num_rows if rows is None else rows.shape[0]
    cu_seqlens, readout_rows, output = cu_seqlens.contiguous(), readout_rows.contiguous(), output.contiguous()
    old = tuple(value.contiguous() for value in (cumulative, remainder, ponder, counters))
    if tokens == 0 or batch == 0:
        new = (*(value.clone() for value in (*old, output)), torch.zeros_like(old[0]))
        return *new, cu_seqlens.new_full((tokens,), -1), torch.zeros_like(cu_seqlens)
    rows = None if rows is None else rows.contiguous()
    new = tuple(torch.empty_like(value) for value in (*old, old[0]))
    new_output, next_offsets = torch.empty_like(output), torch.empty_like(cu_seqlens)
    next_rows, counts = cu_seqlens.new_empty(tokens), cu_seqlens.new_empty(batch)
    place = cu_seqlens.new_empty(0 if rows is None else num_rows)
    stays = torch.empty(tokens, dtype=torch.int8, device=x.device)
    gate = gate_scale, gate_center, 1 - eps
    flags = {"LAST": last, "HAS_ROWS": rows is not None, "BLOCK": LIST_TILE, "num_warps": 4}
    tiles = triton.cdiv(num_rows, LIST_TILE)
    with on_device_of(x):
        halting_step_kernel[(batch,)](
            x, rows, cu_seqlens, *old, *new, place, stays, counts, x.stride(0), *gate, **flags
        )
        halting_step_finish_kernel[(batch + tiles + num_readout,)](
            x,
            rows,
            cu_seqlens,
            readout_rows,
            *old,
            *new,
            output,
            new_output,
            place,
            stays,
            counts,
            next_rows,
            next_offsets,
            x.stride(0),
            x.stride(1),
            num_rows,
            tokens,
            batch,
            tiles,
            *gate,
            D=columns,
            BLOCK_B=batch_tile(batch),
            **flags,
        )
    return *new[:4], new_output, new[4], next_rows, next_offsets
