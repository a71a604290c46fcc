"""ragged_linear: a matrix product whose row count is read on the device, with what follows it taken along.

Grid: as many programs as the device holds at once, or tiles at capacity if those are fewer; each walks over the tiles
with the number of programs as its stride. The count is read once. Tiles of live rows come first, GROUP_T rows of tiles
at a time, so that programs running together share rows of a and of the weight in L2; then tiles of dead rows, which
cost one store of zeros (nothing where the result is added to a residual stream). A program for which no tile is left
ends.

Bytes: a and the weight once from memory, the result once; with a residual 2 * N values of x a token instead. GELU and
residual read the float32 accumulator, so nothing is written that is read again. Each result is summed by one program in
one order, and listed rows are different: no atomics, same bits every time. Rows past the count are never loaded: a tile
that the count cuts reads its last live row instead, which needs no mask in the inner loop. With ``tma``, factors and
result move through descriptors made on the device, which end at the count; off until it is measured to be faster.

Gradients: the GELU's is an epilogue of the same product, the one of a is the same product with the weight turned; the
one of the weight is PyTorch's, over rows with zeros behind the count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    LinearTile,
    apart_from,
    descriptors_fit,
    dot_precision,
    linear_programs,
    linear_tile,
    on_device_of,
    with_scratch,
)
from ._math import dot, rounded

PART_VALUES = 32 * 32  # accumulators of a warp that an epilogue works on at once: 32 a thread
GROUP_T = 8  # rows of tiles that share the weight: 8 * 128 rows of a stay in L2 beside it
PLAIN, GELU, GELU_GRADIENT = 0, 1, 2


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)).permute(0, 2, 1))


@triton.jit
def gelu(h):
    return 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def gelu_gradient(h):
    density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
    return 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476)) + h * density


# sizes of a batch, whose divisors are worth no other binary
@triton.jit(do_not_specialize=["last", "capacity"])
def ragged_linear_kernel(
    a_ptr,  # (T, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    cu_seqlens_ptr,  # (B + 1,)
    out_ptr,  # (T, N), or x (R, N) with RESIDUAL
    grad_ptr,  # (T, N), for the GELU's gradient
    rows_ptr,  # (T,), with RESIDUAL
    scale_ptr,  # (N,) or (T, 1), with RESIDUAL
    stride_at,
    stride_ak,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_or,
    stride_gt,
    stride_gn,
    stride_scale,
    last,  # place of the count in cu_seqlens
    capacity,  # T
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    PART_N: tl.constexpr = BLOCK_N // PARTS
    count = tl.minimum(tl.load(cu_seqlens_ptr + last), capacity)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_t = tl.cdiv(count, BLOCK_T)
    live_tiles = tiles_t * tiles_n
    first, programs = tl.program_id(0), tl.num_programs(0)
    if TMA:
        # reads past the count are zeros; a descriptor has no room for a count of 0, and is not read then
        a_tiles = tl.make_tensor_descriptor(
            a_ptr, shape=[tl.maximum(count, 1), K], strides=[stride_at, 1], block_shape=[BLOCK_T, BLOCK_K]
        )
        weight_tiles = tl.make_tensor_descriptor(
            weight_ptr, shape=[N, K], strides=[stride_wn, 1], block_shape=[BLOCK_N, BLOCK_K]
        )
        if not RESIDUAL:
            out_tiles = tl.make_tensor_descriptor(
                out_ptr, shape=[capacity, N], strides=[stride_or, 1], block_shape=[BLOCK_T, PART_N]
            )
    for tile in range(first, live_tiles, programs):
        group = tile // (GROUP_T * tiles_n)
        group_size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
        place = tile % (GROUP_T * tiles_n)
        start_t = (group * GROUP_T + place % group_size) * BLOCK_T
        start_n = place // group_size * BLOCK_N
        entries = start_t + tl.arange(0, BLOCK_T)
        columns = start_n + tl.arange(0, BLOCK_N)
        a_rows = a_ptr + tl.minimum(entries, count - 1).to(tl.int64)[:, None] * stride_at
        near = columns if EVEN_N else tl.minimum(columns, N - 1)
        weight_rows = weight_ptr + near.to(tl.int64)[:, None] * stride_wn
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for start_k in range(0, K, BLOCK_K):
            if TMA:
                a = a_tiles.load([start_t, start_k])
                weight = weight_tiles.load([start_n, start_k])
            else:
                depth = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
                if EVEN_K:
                    a = tl.load(a_rows + depth * stride_ak)
                    weight = tl.load(weight_rows + depth * stride_wk)
                else:
                    a = tl.load(a_rows + depth * stride_ak, mask=depth < K, other=0.0)
                    weight = tl.load(weight_rows + depth * stride_wk, mask=depth < K, other=0.0)
            acc = dot(a, weight.T, acc, PRECISION)

        # finished in parts, whose values and addresses fit in registers beside the accumulators
        parts = (acc,)
        if PARTS == 2:
            parts = halves(acc)
        if PARTS == 4:
            low, high = halves(acc)
            parts = halves(low) + halves(high)
        live = entries < count
        for part in tl.static_range(PARTS):
            out = parts[part]
            columns = start_n + part * PART_N + tl.arange(0, PART_N)
            inside = columns < N
            if HAS_BIAS:
                out += tl.load(bias_ptr + columns * stride_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
            if ACTIVATION == 1:
                out = gelu(out)
            if ACTIVATION == 2:
                at = grad_ptr + entries.to(tl.int64)[:, None] * stride_gt + columns.to(tl.int64)[None, :] * stride_gn
                grad = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
                out = gelu_gradient(out) * grad
            if RESIDUAL:
                rows, listed = entries.to(tl.int64), live
                if HAS_ROWS:
                    rows = tl.load(rows_ptr + entries, mask=live, other=-1).to(tl.int64)
                    listed = rows >= 0
                if SCALE == 1:
                    scale = tl.load(scale_ptr + columns * stride_scale, mask=inside, other=0.0)
                    out *= scale.to(tl.float32)[None, :]
                if SCALE == 2:
                    scale = tl.load(scale_ptr + entries.to(tl.int64) * stride_scale, mask=listed, other=0.0)
                    out *= scale.to(tl.float32)[:, None]
                at = out_ptr + rows[:, None] * stride_or + columns[None, :]
                mask = listed[:, None] & inside[None, :]
                x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                tl.store(at, rounded(x + out, out_ptr.dtype.element_ty), mask=mask)
            else:
                # a tile that the count cuts: zeros below it
                out = rounded(tl.where(live[:, None], out, 0.0), out_ptr.dtype.element_ty)
                if TMA:
                    out_tiles.store([start_t, start_n + part * PART_N], out)
                else:
                    at = out_ptr + entries.to(tl.int64)[:, None] * stride_or + columns[None, :]
                    tl.store(at, out, mask=(entries < capacity)[:, None] & inside[None, :])

    if not RESIDUAL:
        # the programs that were given no last live tile go on with the first dead ones
        dead_start = first + tl.cdiv(tl.maximum(live_tiles - first, 0), programs) * programs
        zeros = tl.zeros((BLOCK_T, BLOCK_N), dtype=out_ptr.dtype.element_ty)
        for tile in range(dead_start, tl.cdiv(capacity, BLOCK_T) * tiles_n, programs):
            entries = tile // tiles_n * BLOCK_T + tl.arange(0, BLOCK_T)
            columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            at = out_ptr + entries.to(tl.int64)[:, None] * stride_or + columns[None, :]
            tl.store(at, zeros, mask=(entries < capacity)[:, None] & (columns < N)[None, :])


def ragged_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    gelu: bool,
    *,
    tile: LinearTile | None = None,
    tma: bool = False,
) -> Tensor:
    out = a.new_empty(a.shape[0], weight.shape[0])
    _run(out, a, weight, bias, cu_seqlens, activation=GELU if gelu else PLAIN, tile=tile, tma=tma)
    return out


def ragged_linear_residual_(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None,
    *,
    tile: LinearTile | None = None,
    tma: bool = False,
) -> None:
    a, bias, scale = apart_from(x, a), apart_from(x, bias), apart_from(x, scale)
    _run(x, a, weight, bias, cu_seqlens, residual=True, rows=rows, scale=scale, tile=tile, tma=tma)


def ragged_linear_residual(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None,
) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    ragged_linear_residual_(out, rows, a, weight, bias, cu_seqlens, scale)
    return out


def ragged_linear_backward(
    grad: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    live = torch.arange(a.shape[0], device=a.device)[:, None] < cu_seqlens[-1]
    if gelu:
        grad_y = a.new_empty(grad.shape)
        _run(grad_y, a, weight, bias, cu_seqlens, activation=GELU_GRADIENT, grad=grad)
    else:
        grad_y = grad.where(live, 0.0)
    if grad.shape[1] == 0:
        grad_a = a.new_zeros(a.shape)
    else:  # a copy of the weight is small beside the product, whose loads run along K
        grad_a = ragged_linear(grad_y, weight.T.contiguous(), None, cu_seqlens, False)
    grad_weight = grad_y.T @ a.where(live, 0.0)
    grad_bias = a.new_empty(0) if bias is None else grad_y.sum(dim=0, dtype=torch.float32).to(bias.dtype)
    return grad_a, grad_weight, grad_bias


def _run(
    out: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: int = PLAIN,
    grad: Tensor | None = None,
    residual: bool = False,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    tile: LinearTile | None = None,
    tma: bool = False,
) -> None:
    (tokens, depth), columns = a.shape, weight.shape[0]
    if tokens == 0 or columns == 0:
        return
    tile = tile or linear_tile(tokens, columns, depth, a)
    tma = tma and descriptors_fit(a, weight, *(() if residual else (out,)))
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(columns, tile.columns)
    roomy = activation == GELU_GRADIENT or out.element_size() > 2  # epilogues that would spill
    with on_device_of(a):
        run = ragged_linear_kernel[(min(linear_programs(tile, a), tiles),)]
        (with_scratch(run) if tma else run)(
            a,
            weight,
            bias,
            cu_seqlens,
            out,
            grad,
            None if rows is None else rows.contiguous(),
            scale,
            a.stride(0),
            a.stride(1),
            weight.stride(0),
            weight.stride(1),
            0 if bias is None else bias.stride(0),
            out.stride(0),
            0 if grad is None else grad.stride(0),
            0 if grad is None else grad.stride(1),
            0 if scale is None else scale.stride(0),
            (cu_seqlens.shape[0] - 1) * cu_seqlens.stride(0),
            tokens,
            N=columns,
            K=depth,
            ACTIVATION=activation,
            RESIDUAL=residual,
            SCALE=0 if scale is None else 1 if scale.dim() == 1 else 2,
            HAS_ROWS=rows is not None,
            HAS_BIAS=bias is not None,
            TMA=tma,
            PRECISION=dot_precision(),
            GROUP_T=GROUP_T,
            BLOCK_T=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            PARTS=max(1, tile.rows * tile.columns // (tile.warps * PART_VALUES)),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **({} if roomy or tile.registers is None else {"maxnreg": tile.registers}),
        )
