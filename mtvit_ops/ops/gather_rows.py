"""Rows of the residual stream in list order: what ``RaggedTokens.packed`` copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_float, check_row_values, check_rows
from .._register import CUDA_NAMESPACE, register_op
from ..reference import gather_rows as reference


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copy the listed rows into a packed batch.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64.
        rows: (T,), int32, each in [0, R), every row at most once, -1 for a dead entry.

    Returns:
        (T, D), dtype of ``x``, in list order; dead entries are 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also rows out of range.

    Gradient flows to ``x``, and is 0 in rows that nobody lists. Deterministic. No device synchronisation. R, T or D may
    be 0.

    Equivalent PyTorch: ``x[rows]``, where no entry is dead.
    """
    check_float("x", x, ("R", "D"))
    check_rows("rows", rows, x)
    return GATHER_ROWS(x, rows)


def _value_checks(x: Tensor, rows: Tensor) -> None:
    check_row_values("rows", rows, x.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.num_rows = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return GATHER_ROWS_BACKWARD(grad, *ctx.saved_tensors, ctx.num_rows), None  # none for rows


def _put_on_cuda(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    grad_x = grad.new_zeros(num_rows, grad.shape[1])
    getattr(torch.ops, CUDA_NAMESPACE).scatter_rows_.default(grad_x, rows, grad)
    return grad_x


GATHER_ROWS_BACKWARD = register_op(
    "gather_rows_backward",
    "(Tensor grad, Tensor rows, SymInt num_rows) -> Tensor",
    reference=reference.gather_rows_backward,
    fake=lambda grad, rows, num_rows: grad.new_empty(num_rows, grad.shape[1]),
    cuda=_put_on_cuda,
)
GATHER_ROWS = register_op(
    "gather_rows",
    "(Tensor x, Tensor rows) -> Tensor",
    reference=reference.gather_rows,
    fake=lambda x, rows: x.new_empty(rows.shape[0], x.shape[1]),
    value_checks=_value_checks,
    cuda=True,
    setup_context=_setup_context,
    backward=_backward,
)
