"""Gradients of ragged_patch_embed, without atomics.

Tables: one program for a place in a table and BLOCK_D columns adds that place's rows, image after image: D values read
a token. The gradients of prefix and biases are sums of the tables'. Weights: a tail's patches in a fixed number of
spans, each a product into a partial of its own, added in order. Images, where they are asked for: the product of the
gradient and the weights, written to the pixels; where patches overlap, one launch for each set of patches that do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    IMAGE_WARPS,
    PATCH_STAGES,
    PATCH_WARPS,
    dot_precision,
    generation,
    image_column_tile,
    on_device_of,
    patch_columns,
    patch_tile,
    roomy,
    weight_spans,
)
from ._math import dot, rounded
from .ragged_patch_embed import Plan, flat_weight, geometry, locate, make_plan, pixel_mask, pixel_offsets


@triton.jit
def tables_backward_kernel(
    grad_ptr,  # (R, D)
    order_ptr,  # (K, B)
    counts_ptr,  # (K,)
    offsets_ptr,  # (B + 1,)
    out_ptr,  # (all lengths together, D) float32
    stride_gr,
    stride_gd,
    batch,
    D: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place, tail = tl.program_id(0), 0
    for candidate in tl.static_range(len(LENGTHS) - 1):
        beyond = (tail == candidate) & (place >= LENGTHS[candidate])
        place = tl.where(beyond, place - LENGTHS[candidate], place)
        tail = tl.where(beyond, candidate + 1, tail)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(counts_ptr + tail)
    order_ptr += tail * batch
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_B):
        slots = first + tl.arange(0, BLOCK_B)
        _, starts = locate(order_ptr, offsets_ptr, slots, slots < count)
        at = grad_ptr + (starts + place)[:, None] * stride_gr + columns[None, :].to(tl.int64) * stride_gd
        acc += tl.load(at, mask=(slots < count)[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(acc, axis=0), mask=columns < D)


@triton.jit
def weight_backward_kernel(
    grad_ptr,  # (R, D)
    images_ptr,  # (B, C, H, W)
    order_ptr,  # (K, B)
    counts_ptr,  # (K,)
    offsets_ptr,  # (B + 1,)
    partial_ptr,  # (SPANS, D, PIXELS) float32
    stride_gr,
    stride_gd,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    batch,
    D: tl.constexpr,
    P: tl.constexpr,
    TAIL: tl.constexpr,
    LENGTH: tl.constexpr,
    GRID_W: tl.constexpr,
    PIXELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    TILES_K: tl.constexpr = (PIXELS + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0) % (TILES_D * TILES_K)
    span = tl.program_id(0) // (TILES_D * TILES_K)
    columns = tile % TILES_D * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tile // TILES_D * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets, high, wide = pixel_offsets(k, stride_c, stride_h, stride_w, KERNEL_H, KERNEL_W)
    num_patches = tl.load(counts_ptr + TAIL) * (LENGTH - P)
    step = tl.cdiv(tl.cdiv(num_patches, BLOCK_M), SPANS) * BLOCK_M
    acc = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for start in range(span * step, tl.minimum(num_patches, (span + 1) * step), BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        live, patches = index < num_patches, index % (LENGTH - P)
        images, starts = locate(order_ptr + TAIL * batch, offsets_ptr, index // (LENGTH - P), live)
        at = grad_ptr + (starts + P + patches)[:, None] * stride_gr + columns[None, :].to(tl.int64) * stride_gd
        grad = tl.load(at, mask=live[:, None] & (columns < D)[None, :], other=0.0)
        top, left = patches // GRID_W * STRIDE - PADDING, patches % GRID_W * STRIDE - PADDING
        corner = images_ptr + images * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
        mask = pixel_mask(live, k < PIXELS, top, left, high, wide, HEIGHT, WIDTH, PADDING)
        pixels = tl.load(corner[:, None] + offsets[None, :], mask=mask, other=0.0)
        acc = dot(tl.trans(grad), pixels, acc, PRECISION)
    at = partial_ptr + span.to(tl.int64) * D * PIXELS + columns[:, None].to(tl.int64) * PIXELS + k[None, :]
    tl.store(at, acc, mask=(columns < D)[:, None] & (k < PIXELS)[None, :])


@triton.jit
def images_backward_kernel(
    grad_ptr,  # (R, D)
    weight_ptr,  # (D, PITCH)
    order_ptr,  # (K, B)
    counts_ptr,  # (K,)
    offsets_ptr,  # (B + 1,)
    out_ptr,  # (B, C, H, W), zeros
    stride_gr,
    stride_gd,
    batch,
    D: tl.constexpr,
    P: tl.constexpr,
    TAIL: tl.constexpr,
    GRID_W: tl.constexpr,
    PIXELS: tl.constexpr,
    PITCH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST_ROW: tl.constexpr,  # the patches (FIRST_ROW + i * EVERY_ROW, FIRST_COLUMN + j * EVERY_COLUMN) of the grid
    FIRST_COLUMN: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    EVERY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,  # how many i and j
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_K: tl.constexpr = (PIXELS + BLOCK_K - 1) // BLOCK_K
    CHANNELS: tl.constexpr = PIXELS // (KERNEL_H * KERNEL_W)
    first = tl.program_id(0) // TILES_K * BLOCK_M
    num_patches = tl.load(counts_ptr + TAIL) * (ROWS * COLUMNS)
    if first >= num_patches:
        return
    index = first + tl.arange(0, BLOCK_M)
    live, patches = index < num_patches, index % (ROWS * COLUMNS)
    images, starts = locate(order_ptr + TAIL * batch, offsets_ptr, index // (ROWS * COLUMNS), live)
    row, column = FIRST_ROW + patches // COLUMNS * EVERY_ROW, FIRST_COLUMN + patches % COLUMNS * EVERY_COLUMN
    grad_rows = grad_ptr + (starts + P + row * GRID_W + column)[:, None] * stride_gr
    k = tl.program_id(0) % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in tl.range(0, D, BLOCK_D, disable_licm=True):  # what is hoisted spills
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        grad = tl.load(grad_rows + d[None, :] * stride_gd, mask=live[:, None] & (d < D)[None, :], other=0.0)
        mask = (d < D)[:, None] & (k < PITCH)[None, :]
        weight = tl.load(weight_ptr + d[:, None] * PITCH + k[None, :], mask=mask, other=0.0)
        acc = dot(grad, weight, acc, PRECISION)
    top, left = row * STRIDE - PADDING, column * STRIDE - PADDING
    offsets, high, wide = pixel_offsets(k, HEIGHT * WIDTH, WIDTH, 1, KERNEL_H, KERNEL_W)
    mask = pixel_mask(live, k < PIXELS, top, left, high, wide, HEIGHT, WIDTH, PADDING)
    corner = out_ptr + images * (CHANNELS * HEIGHT * WIDTH) + top.to(tl.int64) * WIDTH + left
    at = corner[:, None] + offsets[None, :]
    if EVERY_ROW * EVERY_COLUMN > 1:  # onto what the launches before this one wrote
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


def ragged_patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    tails: Tensor,
    prefix: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    pos_embeds: list[Tensor],
    strides: list[int],
    paddings: list[int],
    wants_images: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    num_prefix, lengths = len(prefix), [len(table) for table in pos_embeds]
    if grad.numel() == 0:
        zeros = [[torch.zeros_like(entry) for entry in entries] for entries in (weights, biases, pos_embeds)]
        return images.new_zeros(images.shape if wants_images else 0), torch.zeros_like(prefix), *zeros
    plan = make_plan(tails, lengths)
    tables = _table_gradients(grad, plan, lengths).split(lengths)
    grad_prefix = torch.stack([table[:num_prefix] for table in tables]).sum(dim=0)
    grad_weights = []
    steps = list(zip(weights, strides, paddings))
    for tail, (weight, stride, padding) in enumerate(steps):
        sizes = geometry(images, prefix, weight, tail, stride, padding)
        grad_weights.append(_weight_gradient(grad, images, plan, lengths[tail], sizes).reshape(weight.shape))
    return (
        _image_gradients(grad, images, prefix, plan, steps) if wants_images else images.new_zeros(0),
        grad_prefix.to(prefix.dtype),
        [value.to(weight.dtype) for value, weight in zip(grad_weights, weights)],
        [table[num_prefix:].sum(dim=0).to(bias.dtype) for table, bias in zip(tables, biases)],
        [table.to(given.dtype, copy=True) for table, given in zip(tables, pos_embeds)],
    )


def _table_gradients(grad: Tensor, plan: Plan, lengths: list[int]) -> Tensor:
    """Those of all position tables, one behind another, in float32."""
    columns = grad.shape[1]
    out = grad.new_empty(sum(lengths), columns, dtype=torch.float32)
    block_b, block_d = image_column_tile(columns)
    with on_device_of(grad):
        tables_backward_kernel[(len(out), triton.cdiv(columns, block_d))](
            grad,
            plan.order,
            plan.counts,
            plan.offsets,
            out,
            *grad.stride(),
            plan.order.shape[1],
            D=columns,
            LENGTHS=tuple(lengths),
            BLOCK_B=block_b,
            BLOCK_D=block_d,
            num_warps=IMAGE_WARPS,
        )
    return out


def _weight_gradient(grad: Tensor, images: Tensor, plan: Plan, length: int, sizes: dict[str, int]) -> Tensor:
    """(D, PIXELS) float32."""
    columns, pixels = sizes["D"], sizes["PIXELS"]
    block_d, block_k = patch_columns(columns), patch_columns(pixels)
    tiles = triton.cdiv(columns, block_d) * triton.cdiv(pixels, block_k)
    _, block_m = patch_tile(images.dtype)
    spans = weight_spans(tiles, triton.cdiv(len(images) * (length - sizes["P"]), block_m))
    partial = grad.new_empty(spans, columns, pixels, dtype=torch.float32)
    with on_device_of(grad):
        weight_backward_kernel[(spans * tiles,)](
            grad,
            images,
            plan.order,
            plan.counts,
            plan.offsets,
            partial,
            *grad.stride(),
            *images.stride(),
            len(images),
            LENGTH=length,
            **sizes,
            SPANS=spans,
            PRECISION=dot_precision(),
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            num_warps=PATCH_WARPS,
            **roomy(grad.device),
            num_stages=2 if images.dtype == torch.float32 else PATCH_STAGES,  # a third one spills
        )
    return partial.sum(dim=0)


def _image_gradients(
    grad: Tensor, images: Tensor, prefix: Tensor, plan: Plan, steps: list[tuple[Tensor, int, int]]
) -> Tensor:
    overlaps = any(max(weight.shape[2:]) > stride for weight, stride, _ in steps)
    # patches that overlap are added up one set at a time: in float32
    out = images.new_zeros(images.shape, dtype=torch.float32 if overlaps else images.dtype)
    block_m, block_d = patch_tile(images.dtype)
    wide_on_ampere = images.dtype == torch.float32 and generation(grad.device) == 8  # elsewhere it spills more
    with on_device_of(grad):
        for tail, (weight, stride, padding) in enumerate(steps):
            sizes = geometry(images, prefix, weight, tail, stride, padding)
            flat, block_k = flat_weight(weight), patch_columns(sizes["PIXELS"])
            grid_h = (images.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
            grid_w = sizes["GRID_W"]
            every_row, every_column = (triton.cdiv(side, stride) for side in weight.shape[2:])
            for first_row in range(min(every_row, grid_h)):
                rows = triton.cdiv(grid_h - first_row, every_row)
                for first_column in range(min(every_column, grid_w)):
                    columns = triton.cdiv(grid_w - first_column, every_column)
                    tiles = triton.cdiv(len(images) * rows * columns, block_m)
                    images_backward_kernel[(tiles * triton.cdiv(sizes["PIXELS"], block_k),)](
                        grad,
                        flat,
                        plan.order,
                        plan.counts,
                        plan.offsets,
                        out,
                        *grad.stride(),
                        len(images),
                        PITCH=flat.shape[1],
                        **sizes,
                        FIRST_ROW=first_row,
                        FIRST_COLUMN=first_column,
                        EVERY_ROW=every_row,
                        EVERY_COLUMN=every_column,
                        ROWS=rows,
                        COLUMNS=columns,
                        PRECISION=dot_precision(),
                        BLOCK_M=block_m,
                        BLOCK_D=block_d,
                        BLOCK_K=block_k,
                        num_warps=PATCH_WARPS,
                        **(roomy(grad.device) if wide_on_ampere else {}),
                        num_stages=PATCH_STAGES,
                    )
    return out.to(images.dtype)
