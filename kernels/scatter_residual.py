"""scatter_residual: ``x[rows] += scale * y``, in place or into a copy, and its gradient.

Grid: one program for a tile of BLOCK_T list entries and BLOCK_D columns. Reads y and the listed rows of x once, writes
those rows once: 3 * D values a token. Rows are different, so writes are disjoint and results do not depend on their
order. The gradient of a LayerScale is a column sum: one partial sum a tile of entries, added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import apart_from, on_device_of, row_tile
from ._math import rounded

NO_SCALE, COLUMN_SCALE, ROW_SCALE = 0, 1, 2  # none, (D,), (T, 1)


@triton.jit
def scaled(step, scale_ptr, stride_scale, entries, columns, live, D: tl.constexpr, SCALE: tl.constexpr):
    """A float32 tile of packed tokens, times the LayerScale or their factors."""
    if SCALE == 1:
        step *= tl.load(scale_ptr + columns * stride_scale, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if SCALE == 2:
        step *= tl.load(scale_ptr + entries * stride_scale, mask=live, other=0.0).to(tl.float32)[:, None]
    return step


@triton.jit
def scatter_residual_kernel(
    x_ptr,  # (R, D)
    rows_ptr,  # (T,)
    y_ptr,  # (T, D)
    scale_ptr,  # (D,) or (T, 1)
    stride_xr,
    stride_yt,
    stride_yd,
    stride_scale,
    num_tokens,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = entries < num_tokens
    rows = entries
    if HAS_ROWS:
        rows = tl.load(rows_ptr + entries, mask=live, other=-1).to(tl.int64)
        live = live & (rows >= 0)
    mask = live[:, None] & (columns < D)[None, :]
    step = tl.load(y_ptr + entries[:, None] * stride_yt + columns[None, :] * stride_yd, mask=mask, other=0.0)
    step = scaled(step.to(tl.float32), scale_ptr, stride_scale, entries, columns, live, D, SCALE)
    at = x_ptr + rows[:, None] * stride_xr + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, rounded(x + step, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scatter_residual_backward_kernel(
    grad_ptr,  # (R, D)
    rows_ptr,  # (T,)
    y_ptr,  # (T, D), read where there is a scale
    scale_ptr,  # (D,) or (T, 1)
    grad_y_ptr,  # (T, D)
    partial_ptr,  # COLUMN_SCALE: (tiles, D); ROW_SCALE: (T, tiles); float32
    stride_gr,
    stride_gd,
    stride_yt,
    stride_yd,
    stride_scale,
    num_tokens,
    num_tiles,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = entries < num_tokens
    live, rows = inside, entries
    if HAS_ROWS:
        rows = tl.load(rows_ptr + entries, mask=inside, other=-1).to(tl.int64)
        live = inside & (rows >= 0)
    wide = (columns < D)[None, :]
    mask = live[:, None] & wide
    grad = tl.load(grad_ptr + rows[:, None] * stride_gr + columns[None, :] * stride_gd, mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    grad_y = grad
    if SCALE != 0:
        y = tl.load(y_ptr + entries[:, None] * stride_yt + columns[None, :] * stride_yd, mask=mask, other=0.0)
        product = grad * y.to(tl.float32)
    if SCALE == 1:
        scale = tl.load(scale_ptr + columns * stride_scale, mask=columns < D, other=0.0).to(tl.float32)
        grad_y = grad * scale[None, :]
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(product, axis=0), mask=columns < D)
    if SCALE == 2:
        scale = tl.load(scale_ptr + entries * stride_scale, mask=live, other=0.0).to(tl.float32)
        grad_y = grad * scale[:, None]
        tl.store(partial_ptr + entries * num_tiles + tl.program_id(1), tl.sum(product, axis=1), mask=inside)
    at = grad_y_ptr + entries[:, None] * D + columns[None, :]
    # dead entries too: they get zeros
    tl.store(at, rounded(grad_y, grad_y_ptr.dtype.element_ty), mask=inside[:, None] & wide)


def scatter_residual_(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None) -> None:
    tokens, columns = y.shape
    if tokens == 0 or columns == 0:
        return
    y, scale = apart_from(x, y), apart_from(x, scale)
    block_t, block_d = row_tile(columns)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(columns, block_d))
    with on_device_of(x):
        scatter_residual_kernel[grid](
            x,
            rows if rows is None else rows.contiguous(),
            y,
            scale,
            x.stride(0),
            y.stride(0),
            y.stride(1),
            0 if scale is None else scale.stride(0),
            tokens,
            D=columns,
            SCALE=scale_kind(scale),
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
        )


def scatter_residual(x: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    scatter_residual_(out, rows, y, scale)
    return out


def scatter_residual_backward(
    grad: Tensor, rows: Tensor | None, y: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, columns = (grad if rows is None else rows).shape[0], grad.shape[1]
    kind = scale_kind(scale)
    grad_y = grad.new_empty(tokens, columns)
    if tokens == 0 or columns == 0:
        return grad_y, grad.new_zeros(0) if scale is None else torch.zeros_like(scale)
    block_t, block_d = row_tile(columns)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(columns, block_d))
    shape = {NO_SCALE: (0,), COLUMN_SCALE: (grid[0], columns), ROW_SCALE: (tokens, grid[1])}[kind]
    partial = grad.new_empty(shape, dtype=torch.float32)
    with on_device_of(grad):
        scatter_residual_backward_kernel[grid](
            grad,
            rows if rows is None else rows.contiguous(),
            y,
            scale,
            grad_y,
            partial,
            grad.stride(0),
            grad.stride(1),
            y.stride(0),
            y.stride(1),
            0 if scale is None else scale.stride(0),
            tokens,
            grid[1],
            D=columns,
            SCALE=kind,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
        )
    if scale is None:
        return grad_y, grad.new_empty(0)
    return grad_y, partial.sum(dim=0 if kind == COLUMN_SCALE else 1).reshape(scale.shape).to(scale.dtype)


def scale_kind(scale: Tensor | None) -> int:
    return NO_SCALE if scale is None else COLUMN_SCALE if scale.dim() == 1 else ROW_SCALE
