"""scatter_residual_layer_norm: ``x[rows] += scale * y`` and the layer norm of those rows, packed.

Grid: one program for BLOCK_T list entries, tiles of whole rows as in gather_layer_norm. The sum is rounded, written
and, as rounded, normalised while it is in registers: 4 * D values a token in one launch, where the two ops move 5 * D
in two. Their own functions are used in the same tiles, so the results are theirs. Rows are different: writes are
disjoint, and results do not depend on their order. The functional form reads one array and writes another; only with a
list must the rest of the rows be copied first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FORWARD_VALUES, apart_from, on_device_of, whole_row_tile
from ._math import rounded
from .gather_layer_norm import empty_statistics, normalised, store_normed
from .scatter_residual import scale_kind, scaled


@triton.jit(do_not_specialize=["num_tokens"])
def scatter_residual_layer_norm_kernel(
    x_ptr,  # (R, D)
    rows_ptr,  # (T,)
    y_ptr,  # (T, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    scale_ptr,  # (D,) or (T, 1)
    new_ptr,  # (R, D): x itself, or another array
    out_ptr,  # (T, D)
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    stride_xr,
    stride_xd,
    stride_yt,
    stride_yd,
    stride_weight,
    stride_bias,
    stride_scale,
    stride_nr,
    num_tokens,
    eps,
    D: tl.constexpr,
    SCALE: tl.constexpr,
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
    step = tl.load(y_ptr + entries[:, None] * stride_yt + columns[None, :] * stride_yd, mask=mask, other=0.0)
    # before the sums: they wait for x, these need not
    weight = tl.load(weight_ptr + columns * stride_weight, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns * stride_bias, mask=columns < D, other=0.0).to(tl.float32)
    step = scaled(step.to(tl.float32), scale_ptr, stride_scale, entries, columns, live, D, SCALE)
    new = rounded(x.to(tl.float32) + step, new_ptr.dtype.element_ty)
    tl.store(new_ptr + rows[:, None] * stride_nr + columns[None, :], new, mask=mask)
    # the rounded sum: what a layer norm of its own would read
    out, mean, rstd = normalised(new.to(tl.float32), weight, bias, mask, eps, D)
    store_normed(out, mean, rstd, live, inside, entries, columns, out_ptr, mean_ptr, rstd_ptr, D)


def scatter_residual_layer_norm(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if rows is None:
        new = x.new_empty(x.shape)
        return new, *_launch(x, rows, y, weight, bias, eps, scale, new)
    new = x.clone(memory_format=torch.contiguous_format)
    return new, *_launch(new, rows, y, weight, bias, eps, scale, new)


def scatter_residual_layer_norm_(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> Tensor:
    y, scale = apart_from(x, y), apart_from(x, scale)
    return _launch(x, rows, y, weight, bias, eps, scale, x)[0]


def _launch(
    x: Tensor,
    rows: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    new: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = y.shape
    out, (mean, rstd) = x.new_empty(tokens, columns), empty_statistics(x, tokens)
    if tokens == 0 or columns == 0:
        return out, mean, rstd
    block_t, block_d, warps = whole_row_tile(columns, FORWARD_VALUES)
    with on_device_of(x):
        scatter_residual_layer_norm_kernel[(triton.cdiv(tokens, block_t),)](
            x,
            rows if rows is None else rows.contiguous(),
            y,
            weight,
            bias,
            scale,
            new,
            out,
            mean,
            rstd,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            weight.stride(0),
            bias.stride(0),
            0 if scale is None else scale.stride(0),
            new.stride(0),
            tokens,
            eps,
            D=columns,
            SCALE=scale_kind(scale),
            HAS_ROWS=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return out, mean, rstd
