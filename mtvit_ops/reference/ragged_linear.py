"""Linear layers whose row count is on the device: the meaning of ``ops.ragged_linear``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._segments import wide_dtype
from .scatter_residual import scatter_residual
from .scatter_residual import scatter_residual_ as add_to_rows


def ragged_linear(
    a: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    cu_seqlens: Tensor,  # (B + 1,)
    gelu: bool,
) -> Tensor:  # (T, N), zeros behind the live rows
    live, y = _linear(a, weight, bias, cu_seqlens)
    if gelu:
        y = F.gelu(y)
    return y.where(live, 0.0).to(a.dtype)


def ragged_linear_backward(
    grad: Tensor,  # (T, N)
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of a, weight and bias (empty without one)
    live, y = _linear(a, weight, bias, cu_seqlens)
    grad_y = grad.where(live, 0.0).to(y.dtype)
    if gelu:
        grad_y = torch.ops.aten.gelu_backward(grad_y, y)
    grad_a, grad_weight = grad_y @ weight.to(y.dtype), grad_y.T @ a.where(live, 0.0).to(y.dtype)
    grad_bias = grad_y.new_zeros(0) if bias is None else grad_y.sum(dim=0)
    return grad_a.to(a.dtype), grad_weight.to(a.dtype), grad_bias.to(a.dtype)


def ragged_linear_residual(
    x: Tensor,  # (R, N)
    rows: Tensor | None,  # (T,)
    a: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    cu_seqlens: Tensor,
    scale: Tensor | None,  # (N,) or (T, 1)
) -> Tensor:  # (R, N)
    _, step = _linear(a, weight, bias, cu_seqlens)
    return scatter_residual(x, live_rows(rows, cu_seqlens, a.shape[0]), step, scale)


def ragged_linear_residual_(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None,
) -> None:
    """The same, written into ``x``."""
    _, step = _linear(a, weight, bias, cu_seqlens)
    add_to_rows(x, live_rows(rows, cu_seqlens, a.shape[0]), step, scale)


def live_rows(rows: Tensor | None, cu_seqlens: Tensor, num_entries: int) -> Tensor:
    """The row of each entry (T,), int32, -1 behind the live ones, whatever the list holds there."""
    entries = torch.arange(num_entries, dtype=torch.int32, device=cu_seqlens.device)
    return (entries if rows is None else rows).where(entries < cu_seqlens[-1], -1)


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are alive (T, 1), and the layer in the wide dtype, with the dead rows of ``a`` read as zeros."""
    live = torch.arange(a.shape[0], device=a.device)[:, None] < cu_seqlens[-1]
    wide = wide_dtype(a.dtype)
    return live, F.linear(a.where(live, 0.0).to(wide), weight.to(wide), None if bias is None else bias.to(wide))
