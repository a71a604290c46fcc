"""One layer of A-ViT's adaptive halting: the meaning of ``ops.halting_step``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import pick_rows, wide_dtype


def halting_step(
    x: Tensor,  # (R, D)
    rows: Tensor | None,  # (T,)
    cu_seqlens: Tensor,  # (B + 1,)
    readout_rows: Tensor,  # (P,)
    cumulative: Tensor,  # (R,)
    remainder: Tensor,  # (R,)
    ponder: Tensor,  # (R,)
    counters: Tensor,  # (R,) int32
    output: Tensor,  # (P, D)
    gate_scale: float,
    gate_center: float,
    eps: float,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    alive, score, step = _gate(x[:, 0], rows, cu_seqlens, gate_scale, gate_center, last)
    grown = cumulative + step
    reached = alive & (grown > 1 - eps)
    going = alive & (grown < 1 - eps)
    # a token that stays adds its score, one that stops adds what is left; exactly 1 - eps adds nothing
    share = remainder * reached + step * going
    output = output + pick_rows(share[:, None] * x.to(share.dtype), readout_rows).to(output.dtype)
    return (
        cumulative + step * alive,
        remainder - step * going,
        ponder + (alive + remainder * reached),
        counters + going.to(counters.dtype),
        output,
        score,
        *_next_rows(rows, cu_seqlens, going),
    )


def halting_step_backward(
    grad_cumulative: Tensor,
    grad_remainder: Tensor,
    grad_ponder: Tensor,
    grad_output: Tensor,
    grad_score: Tensor,
    channel: Tensor,  # (R,): x[:, 0]
    readout: Tensor,  # (P, D): x[readout_rows]
    rows: Tensor | None,
    cu_seqlens: Tensor,
    readout_rows: Tensor,
    cumulative: Tensor,
    remainder: Tensor,
    gate_scale: float,
    gate_center: float,
    eps: float,
    last: bool,
) -> tuple[Tensor, Tensor]:  # gradients of x and remainder; those of the other sums pass through
    alive, score, step = _gate(channel, rows, cu_seqlens, gate_scale, gate_center, last)
    grown = cumulative + step
    reached, going = alive & (grown > 1 - eps), alive & (grown < 1 - eps)
    share = remainder * reached + step * going
    # the readout rows' gradients, spread over all rows; rows that are not read out get zero
    places, grad_output = readout_rows.long(), grad_output.to(share.dtype)
    spread = share.new_zeros(len(share), readout.shape[1]).index_copy(0, places, grad_output)
    # what stands in rows that are not alive, NaN too, has no part in it
    grad_share = share.new_zeros(len(share)).index_copy(0, places, (grad_output * readout.to(share.dtype)).sum(dim=1))
    grad_share = grad_share.where(alive, 0.0)
    grad_step = alive * grad_cumulative + going * (grad_share - grad_remainder)
    if last:
        grad_step = torch.zeros_like(grad_step)
    grad_step = grad_step + grad_score
    grad_x = spread * share[:, None]
    grad_x[:, 0] += alive * grad_step * gate_scale * score * (1 - score)
    return grad_x.to(channel.dtype), grad_remainder + reached * (grad_ponder + grad_share)


def _gate(
    channel: Tensor, rows: Tensor | None, cu_seqlens: Tensor, gate_scale: float, gate_center: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all rows: which are alive, their scores (0 elsewhere), and what this layer adds (1 in the last)."""
    num_rows = channel.shape[0]
    if rows is None:
        alive = torch.arange(num_rows, device=channel.device) < cu_seqlens[-1]
    else:
        live = (torch.arange(rows.shape[0], device=rows.device) < cu_seqlens[-1]) & (rows >= 0)
        place = rows.where(live, num_rows).long()
        alive = torch.zeros(num_rows + 1, dtype=torch.bool, device=channel.device).index_fill(0, place, True)[:num_rows]
    score = torch.sigmoid(channel.to(wide_dtype(channel.dtype)) * gate_scale - gate_center)
    score = score.where(alive, 0.0)
    return alive, score, alive.to(score.dtype) if last else score


def _next_rows(rows: Tensor | None, cu_seqlens: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that stay, packed, -1 behind them, and their offsets."""
    if rows is None:
        rows = torch.arange(going.shape[0], dtype=torch.int32, device=going.device)
    live = torch.arange(rows.shape[0], device=rows.device) < cu_seqlens[-1]
    stays = pick_rows(going.long(), rows).bool() & (rows >= 0) & live
    before = torch.nn.functional.pad(torch.cumsum(stays, 0), (1, 0))  # (T + 1,)
    slot = before[:-1].where(stays, rows.shape[0])
    packed = rows.new_full((rows.shape[0] + 1,), -1).scatter(0, slot, rows)[:-1]
    return packed.clone(), before[cu_seqlens.long()].to(torch.int32)
