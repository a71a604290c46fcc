"""Residual addition that writes the residual stream through a row list, functional and in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_float, check_last_stride, check_row_values, check_rows, check_tensor
from .._register import NATIVE_NAMESPACE, register_op
from ..reference import scatter_residual as reference


def scatter_residual(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """Add packed tokens to their rows of the residual stream: a new ``x`` with ``x[rows] += scale * y``.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64; a last stride of 1 is fastest.
        rows: rows to add to, (T,), int32, each in [0, R), every row at most once; -1 marks a dead entry, which adds
            nothing. None: all R rows.
        y: packed tokens, (T, D), dtype of ``x``.
        scale: LayerScale (D,), or a factor per token (T, 1), such as an image's DropPath factor; dtype of ``x`` or
            float32.

    Returns:
        (R, D), dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also rows outside [-1, R).

    Scaled and added in float32 (float64 for float64), rounded once. Gradients flow to x, y and scale. Deterministic. No
    device synchronisation. R, T or D may be 0.

    Equivalent PyTorch: ``x.index_add(0, rows, scale * y)``.
    """
    _check_residual(x, rows, y, scale)
    if rows is None and scale is None:
        return x + y
    return SCATTER_RESIDUAL(x, rows, y, scale)


def scatter_residual_(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """``scatter_residual`` written into ``x``, for inference; returns ``x``.

    Arguments and errors as there, but ``x`` has a last stride of 1 and rows that do not overlap, and RuntimeError where
    a gradient would be needed: the functional form has it.

    Equivalent PyTorch: ``x.index_add_(0, rows, scale * y)``.
    """
    _check_residual(x, rows, y, scale)
    _check_target(x)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or (scale is not None and scale.requires_grad)):
        raise RuntimeError("scatter_residual_ has no gradient, got tensors that require one: use scatter_residual")
    if rows is None and scale is None:
        return x.add_(y)
    SCATTER_RESIDUAL_INPLACE(x, rows, y, scale)
    return x


def _check_residual(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None) -> None:
    check_float("x", x, ("R", "D"))
    if rows is not None:
        check_rows("rows", rows, x)
    tokens = x.shape[0] if rows is None else rows.shape[0]
    check_tensor("y", y, (tokens, x.shape[1]), x.dtype, x)
    if scale is not None:
        shape = (x.shape[1],) if isinstance(scale, Tensor) and scale.dim() == 1 else (tokens, 1)
        check_tensor("scale", scale, shape, (x.dtype, torch.float32), x)


def _check_target(x: Tensor) -> None:
    check_last_stride("x", x)
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"x must have rows that do not overlap, got strides {tuple(x.stride())}")


def _value_checks(x: Tensor, rows: Tensor | None, *_: Any) -> None:
    if rows is not None:
        check_row_values("rows", rows, x.shape[0])


def _refuses(x: Tensor, *_: Any) -> str | None:
    if x.dtype == torch.float64:
        return "the kernels take no float64"
    if x.stride(1) != 1 and x.shape[1] > 1:
        return "the kernels write rows whose last stride is 1"
    return None


def _native(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    getattr(torch.ops, NATIVE_NAMESPACE).scatter_residual_.default(out, rows, y, scale)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, y, scale = inputs
    # y is only needed for the gradient of a scale
    ctx.save_for_backward(rows, y if scale is not None else y.new_empty(0, y.shape[1]), scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, y, scale = ctx.saved_tensors
    grad_y, grad_scale = SCATTER_RESIDUAL_BACKWARD(grad, rows, y, scale)
    return grad, None, grad_y, None if scale is None else grad_scale  # none for rows


SCATTER_RESIDUAL_BACKWARD = register_op(
    "scatter_residual_backward",
    "(Tensor grad, Tensor? rows, Tensor y, Tensor? scale) -> (Tensor, Tensor)",
    reference=reference.scatter_residual_backward,
    fake=lambda grad, rows, y, scale: (
        grad.new_empty(grad.shape[0] if rows is None else rows.shape[0], grad.shape[1]),
        grad.new_empty(0) if scale is None else torch.empty_like(scale),
    ),
    triton="scatter_residual",
)
SCATTER_RESIDUAL = register_op(
    "scatter_residual",
    "(Tensor x, Tensor? rows, Tensor y, Tensor? scale) -> Tensor",
    reference=reference.scatter_residual,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    value_checks=_value_checks,
    native=_native,
    refuses=_refuses,
    triton="scatter_residual",
    setup_context=_setup_context,
    backward=_backward,
)
SCATTER_RESIDUAL_INPLACE = register_op(
    "scatter_residual_",
    "(Tensor(a!) x, Tensor? rows, Tensor y, Tensor? scale) -> ()",
    reference=reference.scatter_residual_,
    fake=lambda *_: None,
    value_checks=_value_checks,
    native=True,
    refuses=_refuses,
    triton="scatter_residual",
    triton_refuses=_refuses,
)
