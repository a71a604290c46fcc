"""gather_layer_norm: layer normalisation of the listed rows, packed, and its gradient.

Forward. Grid: one program for BLOCK_T list entries; the tile holds whole rows (BLOCK_D is D rounded up to a power of
two), so that mean and variance are two sums over registers and a row is read once and written once: 2 * D values a
token. Narrow rows come several at a time: enough bytes in flight, and the parameters are fetched once for all of them.

Backward. Grid: a fixed number of programs, each taking every so-many-th tile and keeping the column sums for the
parameters in registers; it writes one partial sum, and a second kernel adds those in order. No atomics: results depend
neither on timing nor on the device. 3 * D values a token, and R * D zeros for what is not listed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_VALUES, FORWARD_VALUES, SUM_COLUMNS, SUM_ROWS, on_device_of, partial_sums, whole_row_tile
from ._math import rounded


@triton.jit
def normalised(x, weight, bias, mask, eps, D: tl.constexpr):
    """Layer norm of the rows of a float32 tile that is 0 outside of the mask, their means and reciprocal deviations."""
    count = tl.full((x.shape[0],), D, tl.float32)
    mean = tl.div_rn(tl.sum(x, axis=1), count)  # exact for constant rows: eps would blow up a last bit
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.div_rn(tl.sum(centred * centred, axis=1), count) + eps)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :], mean, rstd


@triton.jit
def store_normed(out, mean, rstd, live, inside, entries, columns, out_ptr, mean_ptr, rstd_ptr, D: tl.constexpr):
    """Writes what ``normalised`` gave, packed; zeros for dead entries."""
    out = tl.where(live[:, None], out, 0.0)
    at = out_ptr + entries[:, None] * D + columns[None, :]
    tl.store(at, rounded(out, out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])
    tl.store(mean_ptr + entries, tl.where(live, mean, 0.0), mask=inside)
    tl.store(rstd_ptr + entries, tl.where(live, rstd, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def gather_layer_norm_kernel(
    x_ptr,  # (R, D)
    rows_ptr,  # (T,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (T, D)
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    stride_xr,
    stride_xd,
    stride_weight,
    stride_bias,
    num_tokens,
    eps,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    inside = entries < num_tokens
    live, rows = inside, entries
    if HAS_ROWS:
        rows = tl.load(rows_ptr + entries, mask=inside, other=-1).to(tl.int64)
        live = inside & (rows >= 0)
    mask = live[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xr + columns[None, :] * stride_xd, mask=mask, other=0.0)
    # before the sums: they wait for x, these need not
    weight = tl.load(weight_ptr + columns * stride_weight, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns * stride_bias, mask=columns < D, other=0.0).to(tl.float32)
    out, mean, rstd = normalised(x.to(tl.float32), weight, bias, mask, eps, D)
    store_normed(out, mean, rstd, live, inside, entries, columns, out_ptr, mean_ptr, rstd_ptr, D)


@triton.jit(do_not_specialize=["num_tokens", "tiles_each"])
def gather_layer_norm_backward_kernel(
    grad_ptr,  # (T, D)
    x_ptr,  # (R, D)
    rows_ptr,  # (T,)
    weight_ptr,  # (D,)
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    grad_x_ptr,  # (R, D)
    partial_ptr,  # (programs, 2, D): sums for weight and bias
    stride_gt,
    stride_gd,
    stride_xr,
    stride_xd,
    stride_weight,
    num_tokens,
    tiles_each,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns * stride_weight, mask=columns < D, other=0.0).to(tl.float32)
    # kept as tiles and added up at the end: a sum over rows in every turn would wait for all warps
    grad_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for turn in range(tiles_each):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        entries = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        live = entries < num_tokens
        rows = entries
        if HAS_ROWS:
            rows = tl.load(rows_ptr + entries, mask=live, other=-1).to(tl.int64)
            live = live & (rows >= 0)
        mask = live[:, None] & (columns < D)[None, :]
        grad = tl.load(grad_ptr + entries[:, None] * stride_gt + columns[None, :] * stride_gd, mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_xr + columns[None, :] * stride_xd, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + entries, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + entries, mask=live, other=0.0)
        grad = grad.to(tl.float32)
        x_hat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        grad_weight += grad * x_hat
        grad_bias += grad
        scaled = grad * weight[None, :]
        straight = tl.sum(scaled, axis=1) / D
        along = tl.sum(scaled * x_hat, axis=1) / D
        grad_x = (scaled - straight[:, None] - x_hat * along[:, None]) * rstd[:, None]
        at = grad_x_ptr + rows[:, None] * D + columns[None, :]
        tl.store(at, rounded(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + columns
    tl.store(at, tl.sum(grad_weight, axis=0), mask=columns < D)
    tl.store(at + D, tl.sum(grad_bias, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["num_partials"])
def column_sums_kernel(
    partial_ptr,  # (programs, 2, D)
    grad_weight_ptr,  # (D,)
    grad_bias_ptr,  # (D,)
    num_partials,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        mask = (partials < num_partials)[:, None] & (columns < D)[None, :]
        at = partial_ptr + partials.to(tl.int64)[:, None] * (2 * D) + columns[None, :]
        grad_weight += tl.load(at, mask=mask, other=0.0)
        grad_bias += tl.load(at + D, mask=mask, other=0.0)
    dtype = grad_weight_ptr.dtype.element_ty
    tl.store(grad_weight_ptr + columns, rounded(tl.sum(grad_weight, axis=0), dtype), mask=columns < D)
    tl.store(grad_bias_ptr + columns, rounded(tl.sum(grad_bias, axis=0), dtype), mask=columns < D)


def gather_layer_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = (x if rows is None else rows).shape[0], x.shape[1]
    out, (mean, rstd) = x.new_empty(tokens, columns), empty_statistics(x, tokens)
    if tokens == 0 or columns == 0:
        return out, mean, rstd
    block_t, block_d, warps = whole_row_tile(columns, FORWARD_VALUES)
    with on_device_of(x):
        gather_layer_norm_kernel[(triton.cdiv(tokens, block_t),)](
            x,
            rows if rows is None else rows.contiguous(),
            weight,
            bias,
            out,
            mean,
            rstd,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            bias.stride(0),
            tokens,
            eps,
            D=columns,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return out, mean, rstd


def empty_statistics(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Room for mean and reciprocal deviation of each entry; those of rows without columns are 0."""
    make = x.new_empty if x.shape[1] else x.new_zeros
    return make(tokens, dtype=torch.float32), make(tokens, dtype=torch.float32)


def gather_layer_norm_backward(
    grad: Tensor, x: Tensor, rows: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = grad.shape
    if tokens == 0 or columns == 0:
        return x.new_zeros(x.shape), weight.new_zeros(columns), weight.new_zeros(columns)
    grad_x = x.new_empty(x.shape) if rows is None else x.new_zeros(x.shape)
    grad_weight, grad_bias = weight.new_empty(columns), weight.new_empty(columns)
    block_t, block_d, warps = whole_row_tile(columns, BACKWARD_VALUES)
    programs, tiles_each = partial_sums(triton.cdiv(tokens, block_t))
    partial = x.new_empty(programs, 2, columns, dtype=torch.float32)
    with on_device_of(x):
        gather_layer_norm_backward_kernel[(programs,)](
            grad,
            x,
            rows if rows is None else rows.contiguous(),
            weight,
            mean,
            rstd,
            grad_x,
            partial,
            grad.stride(0),
            grad.stride(1),
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            tokens,
            tiles_each,
            D=columns,
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=warps,
        )
        column_sums_kernel[(triton.cdiv(columns, SUM_COLUMNS),)](
            partial,
            grad_weight,
            grad_bias,
            programs,
            D=columns,
            BLOCK_P=SUM_ROWS,
            BLOCK_D=SUM_COLUMNS,
            num_warps=8,
        )
    return grad_x, grad_weight, grad_bias
