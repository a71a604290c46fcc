"""Slow-fast updates: one representative row per image, and its increment handed to the tokens it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    check_count,
    check_cu_seqlens,
    check_float,
    check_offset_values,
    check_row_values,
    check_rows,
    check_tensor,
)
from .._register import register_op
from ..reference import slow_fast as reference


def slow_fast_merge(
    x: Tensor,
    weights: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    normalize: bool = True,
) -> Tensor:
    """Weighted sum of each image's listed tokens: its representative.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64.
        weights: weight of each entry of ``rows``, (T,), dtype of ``x`` or float32.
        rows: the tokens to stand for (the dropped rows of ``token_select``), (T,), int32, each in [0, R), every row at
            most once, -1 for a dead entry; None: all rows, T = R.
        cu_seqlens: offsets of the images in ``rows``, (B + 1,), int32.
        max_seqlen: at least the longest image's number of entries.
        normalize: divide by the sum of the image's weights (Evo-ViT); False: take the weights as they are (EViT).

    Returns:
        (B, D), dtype of ``x``; 0 for an image without entries or whose weights sum to 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also bad offsets or rows.

    Summed in float32 (float64 for float64). Gradients flow to x and weights. Deterministic. No device synchronisation.

    Equivalent PyTorch, for each image: ``(w / w.sum())[None] @ x[rows]``.

    Source: Evo-ViT, arXiv 2108.01390.
    """
    check_float("x", x, ("R", "D"))
    tokens = _check_list(x, rows, cu_seqlens, max_seqlen)
    check_tensor("weights", weights, (tokens,), (x.dtype, torch.float32), x)
    return SLOW_FAST_MERGE(x, weights, rows, cu_seqlens, max_seqlen, bool(normalize))


def slow_fast_update(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, increment: Tensor) -> Tensor:
    """Add each image's increment to its listed tokens: a new ``x``.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64.
        rows: the tokens to update, (T,), int32, each in [0, R), every row at most once, -1 for a dead entry; None: all.
        cu_seqlens: offsets of the images in ``rows``, (B + 1,), int32.
        max_seqlen: at least the longest image's number of entries.
        increment: what the image's representative gained, (B, D), dtype of ``x``.

    Returns:
        (R, D), dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also bad offsets or rows.

    Gradients flow to x and increment. Deterministic. No device synchronisation.

    Equivalent PyTorch, for each image b: ``x[rows_b] += increment[b]``.

    Source: Evo-ViT, arXiv 2108.01390.
    """
    check_float("x", x, ("R", "D"))
    _check_list(x, rows, cu_seqlens, max_seqlen)
    check_tensor("increment", increment, (cu_seqlens.shape[0] - 1, x.shape[1]), x.dtype, x)
    return SLOW_FAST_UPDATE(x, rows, cu_seqlens, max_seqlen, increment)


def _check_list(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> int:
    if rows is not None:
        check_rows("rows", rows, x)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x)
    check_count("max_seqlen", max_seqlen)
    return x.shape[0] if rows is None else rows.shape[0]


def _check_values(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if rows is not None:
        check_row_values("rows", rows, x.shape[0])
    check_offset_values("cu_seqlens", cu_seqlens, x.shape[0] if rows is None else rows.shape[0], max_seqlen)


def _refuses(x: Tensor, *_: Any) -> str | None:
    return "the native kernel takes no float64" if x.dtype == torch.float64 else None


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, rows, cu_seqlens, max_seqlen, normalize = inputs
    ctx.save_for_backward(x, weights, rows, cu_seqlens)
    ctx.rest = max_seqlen, normalize


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weights = SLOW_FAST_MERGE_BACKWARD(grad, *ctx.saved_tensors, *ctx.rest)
    return grad_x, grad_weights, None, None, None, None  # none for rows, offsets, longest length and the switch


def _update_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, cu_seqlens, max_seqlen, _ = inputs
    ctx.save_for_backward(rows, cu_seqlens)
    ctx.max_seqlen = max_seqlen


def _update_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # none for rows, offsets and longest length; x passes its gradient through
    return grad, None, None, None, SLOW_FAST_UPDATE_BACKWARD(grad, *ctx.saved_tensors, ctx.max_seqlen)


_LIST = "Tensor? rows, Tensor cu_seqlens, SymInt max_seqlen"
SLOW_FAST_MERGE_BACKWARD = register_op(
    "slow_fast_merge_backward",
    f"(Tensor grad, Tensor x, Tensor weights, {_LIST}, bool normalize) -> (Tensor, Tensor)",
    reference=reference.slow_fast_merge_backward,
    fake=lambda grad, x, weights, *_: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weights),
    ),
    triton="slow_fast",
)
SLOW_FAST_MERGE = register_op(
    "slow_fast_merge",
    f"(Tensor x, Tensor weights, {_LIST}, bool normalize) -> Tensor",
    reference=reference.slow_fast_merge,
    fake=lambda x, weights, rows, cu_seqlens, *_: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]),
    value_checks=lambda x, weights, rows, cu_seqlens, max_seqlen, _: _check_values(x, rows, cu_seqlens, max_seqlen),
    native=True,
    refuses=_refuses,
    triton="slow_fast",
    setup_context=_merge_context,
    backward=_merge_backward,
)
SLOW_FAST_UPDATE_BACKWARD = register_op(
    "slow_fast_update_backward",
    f"(Tensor grad, {_LIST}) -> Tensor",
    reference=reference.slow_fast_update_backward,
    fake=lambda grad, rows, cu_seqlens, _: grad.new_empty(cu_seqlens.shape[0] - 1, grad.shape[1]),
    triton="slow_fast",
)
SLOW_FAST_UPDATE = register_op(
    "slow_fast_update",
    f"(Tensor x, {_LIST}, Tensor increment) -> Tensor",
    reference=reference.slow_fast_update,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    value_checks=lambda x, rows, cu_seqlens, max_seqlen, _: _check_values(x, rows, cu_seqlens, max_seqlen),
    native=True,
    refuses=_refuses,
    triton="slow_fast",
    setup_context=_update_context,
    backward=_update_backward,
)
