"""ragged_patch_embed: each image's chosen tail, straight into its rows, and its gradients.

Which images take a tail is known to the device alone. A convolution of PyTorch's would have to embed every image with
every tail, so the contraction over a patch's pixels is done here: a first launch sorts the images by tail (``order``,
and how many each has), then one launch a tail multiplies the patches of that tail's images and no others. Programs
behind the tail's last token leave at once, so K tails cost what the chosen ones cost, with nothing to wait for.

Grid of a tail: one program for BLOCK_M tokens, counted through the tail's images so that no image leaves a tile part
empty, and BLOCK_D columns; neighbours share the tokens, and so their pixels stay in cache. Prefix tokens take part with
no pixels. Bias, prefix and position are added to the float32 sum, rounded once. The longest tail's launch has a program
for every row, so it also writes the zeros behind the live ones.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._launch import (
    PATCH_STAGES,
    PATCH_WARPS,
    PLAN_BLOCK,
    dot_precision,
    generation,
    on_device_of,
    patch_columns,
    patch_tile,
)
from ._math import dot, rounded


@triton.jit
def plan_kernel(
    tails_ptr,  # (B,)
    offsets_ptr,  # (B + 1,)
    order_ptr,  # (K, B): each tail's images, ascending
    counts_ptr,  # (K,)
    stride_tails,
    batch,
    LENGTHS: tl.constexpr,  # K table lengths
    BLOCK: tl.constexpr,
):
    tail, K = tl.program_id(0), len(LENGTHS)
    before = tl.zeros((1,), tl.int32)
    for first in range(0, batch, BLOCK):
        images = first + tl.arange(0, BLOCK)
        tails = tl.load(tails_ptr + images * stride_tails, mask=images < batch, other=-1)
        if tail == K:  # the program behind the tails' adds up the lengths
            lengths = tl.zeros((BLOCK,), tl.int32)
            for candidate in tl.static_range(len(LENGTHS)):
                lengths += tl.where(tails == candidate, LENGTHS[candidate], 0)
            tl.store(offsets_ptr + 1 + images, before + tl.cumsum(lengths, axis=0), mask=images < batch)
            before += tl.sum(lengths, axis=0)
        else:
            chosen = tails == tail
            places = before + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(order_ptr + tail.to(tl.int64) * batch + places, images, mask=chosen)
            before += tl.sum(chosen.to(tl.int32), axis=0)
    one = tl.arange(0, 1)
    if tail == K:
        tl.store(offsets_ptr + one, tl.zeros((1,), tl.int32))
    else:
        tl.store(counts_ptr + tail + one, before)


@triton.jit
def locate(order_ptr, offsets_ptr, slots, inside):
    """Image and first row of each slot of a tail."""
    images = tl.load(order_ptr + slots, mask=inside, other=0).to(tl.int64)
    return images, tl.load(offsets_ptr + images, mask=inside, other=0).to(tl.int64)


@triton.jit
def pixel_offsets(k, stride_c, stride_h, stride_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """Where pixel k of a patch lies from the patch's corner, and its row and column in the patch."""
    high, wide = k % (KERNEL_H * KERNEL_W) // KERNEL_W, k % KERNEL_W
    channel = (k // (KERNEL_H * KERNEL_W)).to(tl.int64)
    return channel * stride_c + high.to(tl.int64) * stride_h + wide.to(tl.int64) * stride_w, high, wide


@triton.jit
def pixel_mask(live, inside, top, left, high, wide, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PADDING: tl.constexpr):
    """Which (patch, pixel) pairs lie in their image."""
    mask = live[:, None] & inside[None, :]
    if PADDING > 0:
        y, x = top[:, None] + high[None, :], left[:, None] + wide[None, :]
        mask = mask & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    return mask


@triton.jit
def embed_kernel(
    images_ptr,  # (B, C, H, W)
    prefix_ptr,  # (P, D)
    weight_ptr,  # (D, PITCH), C * KERNEL_H * KERNEL_W of each row
    bias_ptr,  # (D,)
    table_ptr,  # (LENGTH, D)
    order_ptr,  # (K, B)
    counts_ptr,  # (K,)
    offsets_ptr,  # (B + 1,)
    out_ptr,  # (R, D)
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
    PITCH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FILLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) // TILES_D * BLOCK_M
    tokens = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % TILES_D * BLOCK_D + tl.arange(0, BLOCK_D)
    wide_enough = columns < D
    if FILLS:
        end = tl.load(offsets_ptr + batch)
        if first + BLOCK_M > end:
            behind = (tokens >= end) & (tokens < batch * LENGTH)
            zeros = tl.zeros((BLOCK_M, BLOCK_D), out_ptr.dtype.element_ty)
            at = out_ptr + tokens[:, None].to(tl.int64) * D + columns[None, :]
            tl.store(at, zeros, mask=behind[:, None] & wide_enough[None, :])
    num_tokens = tl.load(counts_ptr + TAIL) * LENGTH
    if first >= num_tokens:
        return
    inside, places = tokens < num_tokens, tokens % LENGTH
    images, starts = locate(order_ptr + TAIL * batch, offsets_ptr, tokens // LENGTH, inside)
    patches = places - P
    live = inside & (patches >= 0)
    top, left = patches // GRID_W * STRIDE - PADDING, patches % GRID_W * STRIDE - PADDING
    corner = images_ptr + images * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    weight_rows = weight_ptr + columns[:, None].to(tl.int64) * PITCH
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, PIXELS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets, high, wide = pixel_offsets(k, stride_c, stride_h, stride_w, KERNEL_H, KERNEL_W)
        mask = pixel_mask(live, k < PIXELS, top, left, high, wide, HEIGHT, WIDTH, PADDING)
        pixels = tl.load(corner[:, None] + offsets[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_rows + k[None, :], mask=wide_enough[:, None] & (k < PITCH)[None, :], other=0.0)
        acc = dot(pixels, tl.trans(weight), acc, PRECISION)
    mask = inside[:, None] & wide_enough[None, :]
    # what a token adds to its position; two loads, since a choice between two pointers does not compile for gfx942
    bias = tl.load(bias_ptr + columns, mask=wide_enough, other=0.0).to(tl.float32)
    acc += tl.where(patches[:, None] < 0, 0.0, bias[None, :])
    if P > 0:
        at = prefix_ptr + places[:, None].to(tl.int64) * D + columns[None, :]
        acc += tl.load(at, mask=mask & (patches < 0)[:, None], other=0.0).to(tl.float32)
    at = places[:, None].to(tl.int64) * D + columns[None, :]
    acc += tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = out_ptr + (starts + places)[:, None] * D + columns[None, :]
    tl.store(at, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


def ragged_patch_embed(
    images: Tensor,
    tails: Tensor,
    prefix: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    pos_embeds: list[Tensor],
    strides: list[int],
    paddings: list[int],
) -> tuple[Tensor, Tensor]:
    columns, lengths = prefix.shape[1], [len(table) for table in pos_embeds]
    longest = max(lengths)
    x = images.new_empty(len(images) * longest, columns)
    plan = make_plan(tails, lengths)
    if x.numel() == 0:
        return x, plan.offsets
    block_m, block_k = patch_tile(images.dtype, generation(images.device))
    block_d = patch_columns(columns)
    prefix = prefix.contiguous()
    with on_device_of(images):
        for tail, (weight, bias, table) in enumerate(zip(weights, biases, pos_embeds)):
            tokens = len(images) * lengths[tail]
            flat = flat_weight(weight)
            embed_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(columns, block_d),)](
                images,
                prefix,
                flat,
                bias.contiguous(),
                table.contiguous(),
                plan.order,
                plan.counts,
                plan.offsets,
                x,
                *images.stride(),
                len(images),
                LENGTH=lengths[tail],
                FILLS=tail == lengths.index(longest),
                PITCH=flat.shape[1],
                **geometry(images, prefix, weight, tail, strides[tail], paddings[tail]),
                PRECISION=dot_precision(),
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                BLOCK_K=block_k,
                num_warps=PATCH_WARPS,
                num_stages=PATCH_STAGES,
            )
    return x, plan.offsets


class Plan(NamedTuple):
    """Which images take which tail, on the device."""

    offsets: Tensor  # (B + 1,) int32
    order: Tensor  # (K, B) int32, each tail's images, ascending; as many as ``counts`` says
    counts: Tensor  # (K,) int32


def make_plan(tails: Tensor, lengths: list[int]) -> Plan:
    batch, count = len(tails), len(lengths)
    plan = Plan(tails.new_empty(batch + 1), tails.new_empty(count, batch), tails.new_empty(count))
    with on_device_of(tails):
        plan_kernel[(count + 1,)](
            tails, *plan, tails.stride(0), batch, LENGTHS=tuple(lengths), BLOCK=PLAN_BLOCK, num_warps=4
        )
    return plan


def flat_weight(weight: Tensor) -> Tensor:
    """(D, C * k * k), rows filled up with zeros to where 16 bytes start in every dtype."""
    flat = weight.flatten(1)
    gap = -flat.shape[1] % 8
    return (F.pad(flat, (0, gap)) if gap else flat).contiguous()


def geometry(images: Tensor, prefix: Tensor, weight: Tensor, tail: int, stride: int, padding: int) -> dict[str, int]:
    """What the kernels of a tail know when they are compiled: sizes belong to the model."""
    height, width = images.shape[2:]
    kernel_h, kernel_w = weight.shape[2:]
    return {
        "D": weight.shape[0],
        "P": len(prefix),
        "TAIL": tail,
        "GRID_W": (width + 2 * padding - kernel_w) // stride + 1,
        "PIXELS": weight[0].numel(),
        "KERNEL_H": kernel_h,
        "KERNEL_W": kernel_w,
        "STRIDE": stride,
        "PADDING": padding,
        "HEIGHT": height,
        "WIDTH": width,
    }
