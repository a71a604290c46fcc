"""Residual addition through a row list: the meaning of ``ops.scatter_residual``."""

from __future__ import annotations

from torch import Tensor

from ._segments import pick_rows, put_rows, wide_dtype


def scatter_residual(
    x: Tensor,  # (R, D)
    rows: Tensor | None,  # (T,)
    y: Tensor,  # (T, D)
    scale: Tensor | None,  # (D,) or (T, 1)
) -> Tensor:  # (R, D)
    wide = wide_dtype(x.dtype)
    step = y.to(wide) if scale is None else y.to(wide) * scale.to(wide)
    if rows is not None:
        step = put_rows(step, rows, x.shape[0])
    return (x.to(wide) + step).to(x.dtype)


def scatter_residual_(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None) -> None:
    """The same, written into ``x``, and cheap where few rows are alive."""
    wide = wide_dtype(x.dtype)
    step = y.to(wide) if scale is None else y.to(wide) * scale.to(wide)
    if rows is None:
        x.copy_(x.to(wide) + step)
    elif x.device.type == "cpu":  # the CPU has nobody to wait for: it may look for dead entries
        live = rows >= 0
        if not bool(live.all()):
            rows, step = rows[live], step[live]
        x.index_copy_(0, rows.long(), (x.index_select(0, rows).to(wide) + step).to(x.dtype))
    else:
        x.copy_(x.to(wide) + put_rows(step, rows, x.shape[0]))


def scatter_residual_backward(
    grad: Tensor,  # (R, D)
    rows: Tensor | None,
    y: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # gradients of y and of scale (empty without one)
    wide = wide_dtype(y.dtype)
    grad_step = (grad if rows is None else pick_rows(grad, rows)).to(wide)  # (T, D), zeros for dead entries
    if scale is None:
        return grad_step.to(y.dtype, copy=True), grad_step.new_zeros(0, dtype=y.dtype)  # an op may not return its input
    over = 0 if scale.dim() == 1 else 1
    grad_y, grad_product = grad_step * scale.to(wide), grad_step * y.to(wide)
    if rows is not None:  # whatever stands in dead entries, NaN too, has no gradient
        dead = rows[:, None] < 0
        grad_y, grad_product = grad_y.masked_fill(dead, 0.0), grad_product.masked_fill(dead, 0.0)
    return grad_y.to(y.dtype), grad_product.sum(dim=over, keepdim=over == 1).to(scale.dtype)
