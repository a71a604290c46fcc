"""The gradient of halting_step.

Grid: one launch writes down where each row stands in the lists, and one program a tile of BLOCK_R rows does the rest.
Reads the state and its gradients, the readout tokens and theirs, channel 0 of the live tokens; writes the gradient of x
once, nearly all of it zeros: D values a token. No atomics: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LIST_TILE, on_device_of, roomy, row_tile
from ._math import rounded
from ._rows import is_alive, is_listed
from .halting_step import halt


@triton.jit
def halting_step_backward_index_kernel(
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    readout_ptr,  # (P,)
    place_ptr,  # (R,): the entry that names a row
    readout_place_ptr,  # (R,)
    num_images,
    num_readout,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_ROWS:
        rows = tl.load(rows_ptr + entries, mask=entries < tl.load(cu_seqlens_ptr + num_images), other=-1)
        tl.store(place_ptr + rows, entries, mask=rows >= 0)
    rows = tl.load(readout_ptr + entries, mask=entries < num_readout, other=-1)
    tl.store(readout_place_ptr + rows, entries, mask=rows >= 0)


@triton.jit
def halting_step_backward_kernel(
    grad_cumulative_ptr,  # (R,)
    grad_remainder_ptr,  # (R,)
    grad_ponder_ptr,  # (R,)
    grad_output_ptr,  # (P, D)
    grad_score_ptr,  # (R,)
    channel_ptr,  # (R,)
    x_ptr,  # (P, D): the readout tokens
    rows_ptr,  # (T,)
    cu_seqlens_ptr,  # (B + 1,)
    readout_ptr,  # (P,)
    cumulative_ptr,  # (R,)
    remainder_ptr,  # (R,)
    place_ptr,  # (R,)
    readout_place_ptr,  # (R,)
    grad_x_ptr,  # (R, D)
    new_grad_remainder_ptr,  # (R,)
    stride_gp,
    stride_gd,
    stride_xp,
    stride_xd,
    num_rows,
    num_images,
    num_readout,
    scale,
    center,
    bar,
    D: tl.constexpr,
    LAST: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    live = tl.load(cu_seqlens_ptr + num_images)
    alive = is_alive(rows, inside, rows_ptr, place_ptr, live, HAS_ROWS)
    is_read, place = is_listed(rows, inside, readout_ptr, readout_place_ptr, num_readout)
    x_at = x_ptr + place.to(tl.int64) * stride_xp
    grad_at = grad_output_ptr + place.to(tl.int64) * stride_gp
    cumulative = tl.load(cumulative_ptr + rows, mask=alive, other=0.0)
    remainder = tl.load(remainder_ptr + rows, mask=alive, other=0.0)
    channel = tl.load(channel_ptr + rows, mask=alive, other=0.0).to(tl.float32)
    score, step, reached, going = halt(channel, cumulative, scale, center, bar, LAST)
    share = tl.where(alive, remainder * reached + step * going, 0.0)

    grad_share = tl.zeros((BLOCK_R,), tl.float32)
    if tl.max(is_read.to(tl.int32)) > 0:  # in most tiles no row is read out
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            mask = (is_read & alive)[:, None] & (columns < D)[None, :]
            grad = tl.load(grad_at[:, None] + columns[None, :] * stride_gd, mask=mask, other=0.0)
            x = tl.load(x_at[:, None] + columns[None, :] * stride_xd, mask=mask, other=0.0)
            grad_share += tl.sum(grad * x.to(tl.float32), axis=1)

    grad_remainder = tl.load(grad_remainder_ptr + rows, mask=inside, other=0.0)
    grad_ponder = tl.load(grad_ponder_ptr + rows, mask=alive, other=0.0)
    passed = tl.where(alive, reached * (grad_ponder + grad_share), 0.0)
    tl.store(new_grad_remainder_ptr + rows, grad_remainder + passed, mask=inside)

    grad_step = tl.load(grad_score_ptr + rows, mask=alive, other=0.0)
    if not LAST:
        grad_cumulative = tl.load(grad_cumulative_ptr + rows, mask=alive, other=0.0)
        grad_step = grad_cumulative + going * (grad_share - grad_remainder) + grad_step
    grad_channel = tl.where(alive, grad_step * scale * score * (1 - score), 0.0)
    grad_x_at = grad_x_ptr + rows.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        wide = (columns < D)[None, :]
        grad = tl.load(grad_at[:, None] + columns[None, :] * stride_gd, mask=is_read[:, None] & wide, other=0.0)
        grad_x = grad * share[:, None] + tl.where((columns == 0)[None, :], grad_channel[:, None], 0.0)
        value = rounded(grad_x, grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_at[:, None] + columns[None, :], value, mask=inside[:, None] & wide)


def halting_step_backward(
    grad_cumulative: Tensor,
    grad_remainder: Tensor,
    grad_ponder: Tensor,
    grad_output: Tensor,
    grad_score: Tensor,
    channel: Tensor,
    readout: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    readout_rows: Tensor,
    cumulative: Tensor,
    remainder: Tensor,
    gate_scale: float,
    gate_center: float,
    eps: float,
    last: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, (num_readout, columns), batch = channel.shape[0], readout.shape, cu_seqlens.shape[0] - 1
    grad_x = readout.new_empty(num_rows, columns)
    if num_rows == 0:
        return grad_x, grad_remainder.clone(memory_format=torch.contiguous_format)
    grad_remainder, cumulative, remainder = (v.contiguous() for v in (grad_remainder, cumulative, remainder))
    new_grad_remainder = torch.empty_like(grad_remainder)
    rows = None if rows is None else rows.contiguous()
    cu_seqlens, readout_rows = cu_seqlens.contiguous(), readout_rows.contiguous()
    place, readout_place = cu_seqlens.new_empty(0 if rows is None else num_rows), cu_seqlens.new_empty(num_rows)
    listed = max(0 if rows is None else rows.shape[0], num_readout)
    block_r, block_d = row_tile(columns)
    with on_device_of(readout):
        if listed:
            halting_step_backward_index_kernel[(triton.cdiv(listed, LIST_TILE),)](
                rows,
                cu_seqlens,
                readout_rows,
                place,
                readout_place,
                batch,
                num_readout,
                HAS_ROWS=rows is not None,
                BLOCK=LIST_TILE,
                num_warps=4,
            )
        halting_step_backward_kernel[(triton.cdiv(num_rows, block_r),)](
            grad_cumulative.contiguous(),
            grad_remainder,
            grad_ponder.contiguous(),
            grad_output,
            grad_score.contiguous(),
            channel.contiguous(),
            readout,
            rows,
            cu_seqlens,
            readout_rows,
            cumulative,
            remainder,
            place,
            readout_place,
            grad_x,
            new_grad_remainder,
            grad_output.stride(0),
            grad_output.stride(1),
            readout.stride(0),
            readout.stride(1),
            num_rows,
            batch,
            num_readout,
            gate_scale,
            gate_center,
            1 - eps,
            D=columns,
            LAST=last,
            HAS_ROWS=rows is not None,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=4,
            **roomy(readout.device),
        )
    return grad_x, new_grad_remainder
