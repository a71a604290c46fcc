"""Layer normalisation that reads the residual stream through a row list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_float, check_real, check_row_values, check_rows, check_tensor
from .._register import register_op
from ..reference import gather_layer_norm as reference


def gather_layer_norm(x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the rows named by ``rows`` and pack them.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64; a last stride other than 1
            costs a copy.
        rows: rows to read, (T,), int32, each in [0, R), every row at most once; -1 marks a dead entry, whose output is
            0. None: all R rows.
        weight, bias: affine parameters, (D,), dtype of ``x`` or float32.
        eps: added to the variance, in (0, 1].

    Returns:
        (T, D) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also rows outside [-1, R).

    Statistics are kept in float32 (float64 for float64). Gradients flow to x, weight and bias. Deterministic. No device
    synchronisation. R, T or D may be 0.

    Equivalent PyTorch: ``F.layer_norm(x[rows], (D,), weight, bias, eps)``.
    """
    check_float("x", x, ("R", "D"))
    if rows is not None:
        check_rows("rows", rows, x)
    _check_affine(x, weight, bias, eps)
    if rows is None and weight.dtype == x.dtype:  # nothing to gather: PyTorch's own kernels, forward and backward
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)
    return GATHER_LAYER_NORM(x, rows, weight, bias, eps)[0]


def _check_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_tensor("weight", weight, (x.shape[1],), (x.dtype, torch.float32), x)
    check_tensor("bias", bias, (x.shape[1],), weight.dtype, x)
    check_real("eps", eps, 0.0, 1.0, open_low=True)


def _fake(x: Tensor, rows: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0] if rows is None else rows.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(tokens, x.shape[1]), x.new_empty(tokens, dtype=wide), x.new_empty(tokens, dtype=wide)


def _value_checks(x: Tensor, rows: Tensor | None, *_: Any) -> None:
    if rows is not None:
        check_row_values("rows", rows, x.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, rows, weight, _, _ = inputs
    ctx.save_for_backward(x, rows, weight, output[1], output[2])


def _backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = GATHER_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weight, grad_bias, None  # none for rows and eps


GATHER_LAYER_NORM_BACKWARD = register_op(
    "gather_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? rows, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    reference=reference.gather_layer_norm_backward,
    fake=lambda grad, x, rows, weight, *_: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
    triton="gather_layer_norm",
)
GATHER_LAYER_NORM = register_op(
    "gather_layer_norm",
    "(Tensor x, Tensor? rows, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.gather_layer_norm,
    fake=_fake,
    value_checks=_value_checks,
    native=True,
    refuses=lambda x, *_: "the native kernel takes no float64" if x.dtype == torch.float64 else None,
    triton="gather_layer_norm",
    setup_context=_setup_context,
    backward=_backward,
)
