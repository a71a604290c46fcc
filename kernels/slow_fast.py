"""slow_fast: one representative row an image, its increment handed back to the rows it stands for, and their gradients.

Grid of the sums and of the update: one program for an image and BLOCK_D columns, which takes the image's entries in
pieces of BLOCK_T: a list of any length needs no bound from the host. A listed row is read once (the update also writes
it): D values a token, 2 * D with the write. Sums run over an image's entries in the order they stand in, in float32,
and are folded once at the end: no atomics, and no result depends on another image.

The gradient of ``merge`` takes whole rows, one program an image, since the gradient of a weight is a product over all
columns: D values read and D written a token. With normalised weights it waits for the image's mean product, so the
products go through a scratch of one float a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import IMAGE_WARPS, image_column_tile, image_row_tile, on_device_of, roomy
from ._math import rounded

ONES, AS_THEY_ARE, NORMALIZED = 0, 1, 2  # how entries are weighted
TOTAL_BLOCK = tl.constexpr(256)  # weights that a step of their sum takes


@triton.jit
def total_weight(weights_ptr, stride, start, end):
    """Sum of the weights of the entries [start, end)."""
    parts = tl.zeros((TOTAL_BLOCK,), tl.float32)
    for first in range(start, end, TOTAL_BLOCK):
        entries = first + tl.arange(0, TOTAL_BLOCK)
        parts += tl.load(weights_ptr + entries * stride, mask=entries < end, other=0.0).to(tl.float32)
    return tl.sum(parts, axis=0)


@triton.jit
def divided(values, total):
    """``values / total``, 0 where the total is 0."""
    return tl.where(total == 0.0, 0.0, values / tl.where(total == 0.0, 1.0, total))


@triton.jit
def shares(weights_ptr, stride, entries, inside, total, WEIGHTS: tl.constexpr):
    """Weight of each entry in its image's sum; 0 for all where they sum to 0."""
    weights = tl.load(weights_ptr + entries * stride, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTS == 2:
        weights = divided(weights, total)
    return weights


@triton.jit
def listed_rows(rows_ptr, entries, inside, HAS_ROWS: tl.constexpr):
    """Rows of these entries, -1 for those that are dead or not ``inside``."""
    if HAS_ROWS:
        return tl.load(rows_ptr + entries, mask=inside, other=-1).to(tl.int64)
    else:
        return tl.where(inside, entries, -1)


@triton.jit
def sum_kernel(
    x_ptr,  # (R, D)
    weights_ptr,  # (T,), or None
    rows_ptr,  # (T,), or None
    offsets_ptr,  # (B + 1,)
    out_ptr,  # (B, D)
    stride_xr,
    stride_xd,
    stride_weights,
    D: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = (columns < D)[None, :]
    start, end = tl.load(offsets_ptr + image).to(tl.int64), tl.load(offsets_ptr + image + 1).to(tl.int64)
    total = 1.0
    if WEIGHTS == 2:
        total = total_weight(weights_ptr, stride_weights, start, end)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_T):
        entries = first + tl.arange(0, BLOCK_T)
        inside = entries < end
        rows = listed_rows(rows_ptr, entries, inside, HAS_ROWS)
        at = x_ptr + rows[:, None] * stride_xr + columns[None, :].to(tl.int64) * stride_xd
        x = tl.load(at, mask=(rows >= 0)[:, None] & wide, other=0.0).to(tl.float32)
        if WEIGHTS != 0:
            x *= shares(weights_ptr, stride_weights, entries, inside, total, WEIGHTS)[:, None]
        acc += x
    sums = rounded(tl.sum(acc, axis=0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * D + columns, sums, mask=columns < D)


@triton.jit
def merge_backward_kernel(
    grad_ptr,  # (B, D)
    x_ptr,  # (R, D)
    weights_ptr,  # (T,)
    rows_ptr,  # (T,), or None
    offsets_ptr,  # (B + 1,)
    grad_x_ptr,  # (R, D), zeros where nothing is listed
    grad_weights_ptr,  # (T,)
    products_ptr,  # (T,) float32, scratch: <grad, x> of each entry
    stride_gb,
    stride_gd,
    stride_xr,
    stride_xd,
    stride_weights,
    D: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets_ptr + image).to(tl.int64), tl.load(offsets_ptr + image + 1).to(tl.int64)
    total = 1.0
    if WEIGHTS == 2:
        total = total_weight(weights_ptr, stride_weights, start, end)
    means = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(start, end, BLOCK_T):
        entries = first + tl.arange(0, BLOCK_T)
        inside = entries < end
        rows = listed_rows(rows_ptr, entries, inside, HAS_ROWS)
        share = shares(weights_ptr, stride_weights, entries, inside, total, WEIGHTS)
        products = tl.zeros((BLOCK_T,), tl.float32)
        for left in range(0, D, BLOCK_D):
            columns = left + tl.arange(0, BLOCK_D).to(tl.int64)
            at = grad_ptr + image * stride_gb + columns * stride_gd
            grad = tl.load(at, mask=columns < D, other=0.0).to(tl.float32)[None, :]
            mask = (rows >= 0)[:, None] & (columns < D)[None, :]
            x = tl.load(x_ptr + rows[:, None] * stride_xr + columns[None, :] * stride_xd, mask=mask, other=0.0)
            products += tl.sum(x.to(tl.float32) * grad, axis=1)
            grad_x = rounded(share[:, None] * grad, grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + rows[:, None] * D + columns[None, :], grad_x, mask=mask)
        if WEIGHTS == 2:
            means += share * products
            tl.store(products_ptr + entries, products, mask=inside)
        else:
            grad_weights = rounded(products, grad_weights_ptr.dtype.element_ty)
            tl.store(grad_weights_ptr + entries, grad_weights, mask=inside)
    if WEIGHTS == 2:
        tl.debug_barrier()  # products that other threads of this program wrote
        mean = tl.sum(means, axis=0)
        for first in range(start, end, TOTAL_BLOCK):
            entries = first + tl.arange(0, TOTAL_BLOCK)
            inside = entries < end
            products = tl.load(products_ptr + entries, mask=inside, other=0.0)
            grad_weights = rounded(divided(products - mean, total), grad_weights_ptr.dtype.element_ty)
            tl.store(grad_weights_ptr + entries, grad_weights, mask=inside)


@triton.jit
def update_kernel(
    x_ptr,  # (R, D)
    rows_ptr,  # (T,), or None
    offsets_ptr,  # (B + 1,)
    increment_ptr,  # (B, D)
    stride_ib,
    stride_id,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = columns < D
    start, end = tl.load(offsets_ptr + image).to(tl.int64), tl.load(offsets_ptr + image + 1).to(tl.int64)
    step_at = increment_ptr + image * stride_ib + columns.to(tl.int64) * stride_id
    step = tl.load(step_at, mask=wide, other=0.0).to(tl.float32)[None, :]
    for first in range(start, end, BLOCK_T):
        entries = first + tl.arange(0, BLOCK_T)
        rows = listed_rows(rows_ptr, entries, entries < end, HAS_ROWS)
        mask = (rows >= 0)[:, None] & wide[None, :]
        at = x_ptr + rows[:, None] * D + columns[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, rounded(x + step, x_ptr.dtype.element_ty), mask=mask)


def slow_fast_merge(
    x: Tensor, weights: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, normalize: bool
) -> Tensor:
    return _sums(x, weights, rows, cu_seqlens, NORMALIZED if normalize else AS_THEY_ARE)


def slow_fast_merge_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    batch, columns = grad.shape
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    if batch == 0 or columns == 0 or weights.shape[0] == 0:
        return grad_x, grad_weights
    block_t, block_d = image_row_tile(columns)
    with on_device_of(grad):
        merge_backward_kernel[(batch,)](
            grad,
            x,
            weights,
            None if rows is None else rows.contiguous(),
            cu_seqlens.contiguous(),
            grad_x,
            grad_weights,
            weights.new_empty(weights.shape if normalize else (0,), dtype=torch.float32),
            grad.stride(0),
            grad.stride(1),
            x.stride(0),
            x.stride(1),
            weights.stride(0),
            D=columns,
            WEIGHTS=NORMALIZED if normalize else AS_THEY_ARE,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=IMAGE_WARPS,
            **roomy(grad.device, 128),
        )
    return grad_x, grad_weights


def slow_fast_update(x: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, increment: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    batch, columns = increment.shape
    if batch == 0 or out.numel() == 0:
        return out
    block_t, block_d = image_column_tile(columns)
    with on_device_of(x):
        update_kernel[(batch, triton.cdiv(columns, block_d))](
            out,
            None if rows is None else rows.contiguous(),
            cu_seqlens.contiguous(),
            increment,
            increment.stride(0),
            increment.stride(1),
            D=columns,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=IMAGE_WARPS,
        )
    return out


def slow_fast_update_backward(grad: Tensor, rows: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    return _sums(grad, None, rows, cu_seqlens, ONES)


def _sums(x: Tensor, weights: Tensor | None, rows: Tensor | None, cu_seqlens: Tensor, kind: int) -> Tensor:
    """Weighted sum of each image's listed rows, (B, D)."""
    batch, columns = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty(batch, columns)
    if out.numel() == 0:
        return out
    block_t, block_d = image_column_tile(columns)
    with on_device_of(x):
        sum_kernel[(batch, triton.cdiv(columns, block_d))](
            x,
            weights,
            None if rows is None else rows.contiguous(),
            cu_seqlens.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            0 if weights is None else weights.stride(0),
            D=columns,
            WEIGHTS=kind,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=IMAGE_WARPS,
        )
    return out
