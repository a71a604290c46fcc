"""A-ViT's halting: one layer's accumulators, aggregation and next row list."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import (
    check_cu_seqlens,
    check_float,
    check_offset_values,
    check_real,
    check_row_values,
    check_rows,
    check_tensor,
)
from .._register import register_op
from ..reference import halting_step as reference


class HaltingState(NamedTuple):
    """What every token has gathered so far, one entry a row of the residual stream."""

    cumulative: Tensor  # (R,) float32, sum of scores
    remainder: Tensor  # (R,) float32, 1 minus the scores spent
    ponder: Tensor  # (R,) float32, layers lived plus what was left when halting
    counters: Tensor  # (R,) int32, layers lived
    output: Tensor  # (P, D), weighted sum of each readout token over layers


class HaltingStep(NamedTuple):
    """One layer's outcome."""

    state: HaltingState
    scores: Tensor  # (R,) this layer's halting scores, 0 where a token was not alive
    rows: Tensor  # (T,) int32, -1 behind the live entries
    cu_seqlens: Tensor  # (B + 1,) int32


def initial_halting_state(x: Tensor, readout_rows: Tensor) -> HaltingState:
    """The state before the first layer: nothing gathered, everything left, one layer to be lived.

    Args:
        x: residual stream, (R, D), any float dtype.
        readout_rows: rows whose tokens are aggregated over layers (class tokens), (P,), int32.

    Returns:
        HaltingState on the device of ``x``, its floats in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; the values of rows are not looked at.

    No gradient: only the shape of ``x`` matters. No device synchronisation. R, P or D may be 0.
    """
    check_float("x", x, ("R", "D"))
    check_rows("readout_rows", readout_rows, x, "P")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    zeros = x.new_zeros(x.shape[0], dtype=wide)
    return HaltingState(
        cumulative=zeros,
        remainder=torch.ones_like(zeros),
        ponder=zeros.clone(),
        counters=torch.ones_like(zeros, dtype=torch.int32),
        output=x.new_zeros(readout_rows.shape[0], x.shape[1], dtype=wide),
    )


def halting_step(
    x: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    readout_rows: Tensor,
    state: HaltingState,
    *,
    gate_scale: float,
    gate_center: float,
    eps: float = 0.01,
    last: bool = False,
) -> HaltingStep:
    """Score the live tokens after a layer, let those that have had enough halt, and aggregate the readout tokens.

    The score of a token is ``sigmoid(gate_scale * x[row, 0] - gate_center)``, in float32. A token halts when its scores
    add up to ``1 - eps`` or more; until then each layer's readout enters the output with its score, and the layer in
    which it halts with the remainder, so that the weights of a token sum to 1.

    Args:
        x: residual stream after the layer, (R, D), float32, bfloat16, float16 or float64, D >= 1.
        rows: live rows, (T,), int32, each in [0, R), every row at most once, -1 for a dead entry; None: all R rows.
        cu_seqlens: offsets of the images in ``rows``, (B + 1,), int32.
        readout_rows: rows to aggregate, (P,), int32, each in [0, R), every row at most once, halted or not.
        state: from ``initial_halting_state`` or the step before.
        gate_scale, gate_center: the gate, each in [-1e9, 1e9].
        eps: in (0, 1].
        last: the last layer, in which every live token halts.

    Returns:
        HaltingStep(state, scores, rows, cu_seqlens); the live count is ``cu_seqlens[-1]``, on the device.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also bad offsets or rows.

    A sum of exactly ``1 - eps`` halts with weight 0, as in the authors' code. Gradients flow to x and the state's
    floats through scores, remainder, ponder and output; which token halts is a constant. Deterministic. No device
    synchronisation. Images may be empty.

    Equivalent PyTorch: see ``mtvit_ops.reference.halting_step``.

    Source: A-ViT, arXiv 2112.07658.
    """
    check_float("x", x, ("R", "D"))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_rows, dim = x.shape
    if dim < 1:
        raise ValueError(f"x must have a channel for the gate, got shape {tuple(x.shape)}")
    if rows is not None:
        check_rows("rows", rows, x)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x)
    check_rows("readout_rows", readout_rows, x, "P")
    if not isinstance(state, HaltingState):
        raise TypeError(f"state must be a HaltingState, got {type(state).__name__}")
    for name in ("cumulative", "remainder", "ponder"):
        check_tensor(f"state.{name}", getattr(state, name), (num_rows,), wide, x)
    check_tensor("state.counters", state.counters, (num_rows,), torch.int32, x)
    check_tensor("state.output", state.output, (readout_rows.shape[0], dim), wide, x)
    check_real("gate_scale", gate_scale, -1e9, 1e9)
    check_real("gate_center", gate_center, -1e9, 1e9)
    check_real("eps", eps, 0.0, 1.0, open_low=True)
    *sums, score, next_rows, next_offsets = HALTING_STEP(
        x, rows, cu_seqlens, readout_rows, *state, float(gate_scale), float(gate_center), float(eps), bool(last)
    )
    return HaltingStep(HaltingState(*sums), score, next_rows, next_offsets)


def _fake(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, readout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    cumulative = rest[0]
    tokens = x.shape[0] if rows is None else rows.shape[0]
    return (
        *(torch.empty_like(value) for value in rest[:5]),
        torch.empty_like(cumulative),
        cu_seqlens.new_empty(tokens),
        torch.empty_like(cu_seqlens),
    )


def _value_checks(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, readout_rows: Tensor, *_: Any) -> None:
    if rows is not None:
        check_row_values("rows", rows, x.shape[0])
    check_row_values("readout_rows", readout_rows, x.shape[0], lowest=0)
    check_offset_values("cu_seqlens", cu_seqlens, x.shape[0] if rows is None else rows.shape[0])


def _refuses(x: Tensor, *_: Any) -> str | None:
    return "the native kernel takes no float64" if x.dtype == torch.float64 else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, rows, cu_seqlens, readout_rows, cumulative, remainder, _, _, _, scale, center, eps, last = inputs
    # not x: the gate's channel and the rows that are read out are all that the gradient asks for
    read = x[:, 0].clone(), x.index_select(0, readout_rows)
    ctx.save_for_backward(*read, rows, cu_seqlens, readout_rows, cumulative, remainder)
    ctx.gate = scale, center, eps, last


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_cumulative, grad_remainder, grad_ponder, _, grad_output, grad_score, _, _ = grads
    grad_x, grad_remainder = HALTING_STEP_BACKWARD(
        grad_cumulative, grad_remainder, grad_ponder, grad_output, grad_score, *ctx.saved_tensors, *ctx.gate
    )
    # none for rows, offsets, readout rows, counters and the gate's four numbers
    sums = grad_cumulative, grad_remainder, grad_ponder, None, grad_output
    return grad_x, None, None, None, *sums, None, None, None, None


HALTING_STEP_BACKWARD = register_op(
    "halting_step_backward",
    "(Tensor grad_cumulative, Tensor grad_remainder, Tensor grad_ponder, Tensor grad_output, Tensor grad_score,"
    " Tensor channel, Tensor readout, Tensor? rows, Tensor cu_seqlens, Tensor readout_rows, Tensor cumulative,"
    " Tensor remainder, float gate_scale, float gate_center, float eps, bool last) -> (Tensor, Tensor)",
    reference=reference.halting_step_backward,
    fake=lambda grad_cumulative, grad_remainder, grad_ponder, grad_output, grad_score, channel, readout, *_: (
        readout.new_empty(channel.shape[0], readout.shape[1]),
        torch.empty_like(grad_remainder),
    ),
    triton="halting_step_backward",
)
HALTING_STEP = register_op(
    "halting_step",
    "(Tensor x, Tensor? rows, Tensor cu_seqlens, Tensor readout_rows, Tensor cumulative, Tensor remainder,"
    " Tensor ponder, Tensor counters, Tensor output, float gate_scale, float gate_center, float eps, bool last)"
    " -> (Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score,"
    " Tensor rows, Tensor cu_seqlens)",
    reference=reference.halting_step,
    fake=_fake,
    value_checks=_value_checks,
    native=True,
    refuses=_refuses,
    cuda=True,
    cuda_refuses=_refuses,
    triton="halting_step",
    setup_context=_setup_context,
    backward=_backward,
)
