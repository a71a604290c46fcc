"""Layer normalisation read through a row list: the meaning of ``ops.gather_layer_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import pick_rows, put_rows, wide_dtype


def gather_layer_norm(
    x: Tensor,  # (R, D)
    rows: Tensor | None,  # (T,)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, D), mean (T,), reciprocal standard deviation (T,)
    wide = wide_dtype(x.dtype)
    picked = (x if rows is None else pick_rows(x, rows)).to(wide)
    out, mean, rstd = torch.native_layer_norm(picked, x.shape[1:], weight.to(wide), bias.to(wide), eps)
    out, mean, rstd = out.to(x.dtype), mean[:, 0], rstd[:, 0]
    if rows is None:
        return out, mean, rstd
    live = rows >= 0
    return out.where(live[:, None], 0.0), mean.where(live, 0.0), rstd.where(live, 0.0)


def gather_layer_norm_backward(
    grad: Tensor,  # (T, D)
    x: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of x, weight and bias
    wide = wide_dtype(x.dtype)
    picked = (x if rows is None else pick_rows(x, rows)).to(wide)
    grad = grad.to(wide) if rows is None else grad.to(wide).where(rows[:, None] >= 0, 0.0)
    normalised = (picked - mean[:, None].to(wide)) * rstd[:, None].to(wide)
    scaled = grad * weight.to(wide)
    along = (scaled * normalised).mean(dim=1, keepdim=True)
    grad_picked = (scaled - scaled.mean(dim=1, keepdim=True) - normalised * along) * rstd[:, None].to(wide)
    grad_x = grad_picked if rows is None else put_rows(grad_picked, rows, x.shape[0])
    return grad_x.to(x.dtype), (grad * normalised).sum(dim=0).to(weight.dtype), grad.sum(dim=0).to(weight.dtype)
