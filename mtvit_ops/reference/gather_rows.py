"""Rows of the residual stream in list order: the meaning of ``ops.gather_rows``."""

from __future__ import annotations

from torch import Tensor

from ._segments import pick_rows, put_rows


def gather_rows(
    x: Tensor,  # (R, D)
    rows: Tensor,  # (T,)
) -> Tensor:  # (T, D)
    return pick_rows(x, rows)


def gather_rows_backward(
    grad: Tensor,  # (T, D)
    rows: Tensor,  # (T,)
    num_rows: int,
) -> Tensor:  # (R, D)
    return put_rows(grad, rows, num_rows)
