"""Residual addition and the next layer norm of the same rows: the meaning of ``ops.scatter_residual_layer_norm``."""

from __future__ import annotations

from torch import Tensor

from .gather_layer_norm import gather_layer_norm
from .scatter_residual import scatter_residual, scatter_residual_


def scatter_residual_layer_norm(
    x: Tensor,  # (R, D)
    rows: Tensor | None,  # (T,)
    y: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    scale: Tensor | None,  # (D,) or (T, 1)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R, D), (T, D), mean (T,), reciprocal standard deviation (T,)
    new = scatter_residual(x, rows, y, scale)
    return new, *gather_layer_norm(new, rows, weight, bias, eps)


def scatter_residual_layer_norm_(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> Tensor:  # (T, D)
    """The same, the sum written into ``x``."""
    scatter_residual_(x, rows, y, scale)
    return gather_layer_norm(x, rows, weight, bias, eps)[0]
