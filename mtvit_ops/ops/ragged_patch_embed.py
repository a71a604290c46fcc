"""Patch embedding with a tail chosen per image, straight into one packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_float, check_tensor
from .._cpu_linear import linear_dtypes, panel_dtypes
from .._register import NATIVE_NAMESPACE, native_operator, register_op
from ..reference import ragged_patch_embed as reference


def ragged_patch_embed(
    images: Tensor,
    tails: Tensor,
    prefix: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    pos_embeds: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Tokenise every image with its own tail and pack the tokens, image after image.

    Args:
        images: (B, C, H, W), float32, bfloat16, float16 or float64.
        tails: which tail each image takes, (B,), int32, in [0, K).
        prefix: class (and other prefix) tokens that head every image, (P, D), dtype of ``images``.
        weights: K convolution kernels, each (D, C, k, k), dtype of ``images``.
        biases: K of (D,).
        pos_embeds: K position tables, prefix first, each (P + patches of the tail's grid, D).
        strides: K steps in pixels, >= 1.
        paddings: K paddings in pixels, >= 0.

    Returns:
        The packed tokens (B * longest, D), dtype of ``images``, where longest is the largest table; rows past the last
        offset are 0. And the offsets (B + 1,), int32, whose last entry is the live count, on the device.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, a table whose length is not that of its tail's
            grid; on the CPU also a tail outside [0, K).

    Gradients flow to images, prefix and every list; unused tails get zeros. Deterministic, but for the reference away
    from the CPU. No device synchronisation: Triton embeds each image with its own tail, and away from the CPU the
    reference embeds every tail and keeps the chosen one. On a GPU Triton multiplies float32 factors as
    ``torch.backends.cuda.matmul.fp32_precision`` says, and the reference as cuDNN's convolutions are set.

    Equivalent PyTorch, for each image:
        ``cat((prefix, F.conv2d(image, weights[t], biases[t], strides[t], paddings[t]).flatten(1).T)) + pos_embeds[t]``.

    Source: MT-ViT, arXiv 2203.01587.
    """
    check_float("images", images, ("B", "C", "H", "W"))
    _, channels, height, width = images.shape
    check_tensor("tails", tails, (images.shape[0],), torch.int32, images)
    check_float("prefix", prefix, ("P", "D"), images)
    num_prefix, dim = prefix.shape
    lists = {"biases": biases, "pos_embeds": pos_embeds, "strides": strides, "paddings": paddings}
    if len(weights) == 0:
        raise ValueError("weights must hold at least one tail, got none")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(f"{name} must hold {len(weights)} entries like weights, got {len(values)}")
    for tail, weight in enumerate(weights):
        check_float(f"weights[{tail}]", weight, (dim, channels, "k", "k"), images)
        check_float(f"biases[{tail}]", biases[tail], (dim,), images)
        stride, padding = strides[tail], paddings[tail]
        check_count(f"strides[{tail}]", stride, 1)
        check_count(f"paddings[{tail}]", padding)
        grid = [(side + 2 * padding - kernel) // stride + 1 for side, kernel in zip((height, width), weight.shape[2:])]
        if min(grid) < 1:
            raise ValueError(f"images must be at least as large as tail {tail}'s kernel, got {height} x {width} pixels")
        check_float(f"pos_embeds[{tail}]", pos_embeds[tail], (num_prefix + grid[0] * grid[1], dim), images)
    return RAGGED_PATCH_EMBED(
        images, tails, prefix, list(weights), list(biases), list(pos_embeds), list(strides), list(paddings)
    )


def _fake(images: Tensor, tails: Tensor, prefix: Tensor, weights: Any, biases: Any, tables: Any, *_: Any) -> Any:
    longest = max(table.shape[0] for table in tables)
    return prefix.new_empty(images.shape[0] * longest, prefix.shape[1]), tails.new_empty(images.shape[0] + 1)


def _value_checks(images: Tensor, tails: Tensor, prefix: Tensor, weights: list[Tensor], *_: Any) -> None:
    for image, tail in enumerate(tails.tolist()):
        if not 0 <= tail < len(weights):
            raise ValueError(f"tails must be in [0, {len(weights)}), got {tail} for image {image}")


def _refuses(images: Tensor, *_: Any) -> str | None:
    if images.dtype not in linear_dtypes():
        return f"the native kernel multiplies as linear layers do, for which nothing takes {images.dtype} here"
    return None if images.dtype in panel_dtypes() else _missing() or None


def _native(images: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    embed = getattr(torch.ops, NATIVE_NAMESPACE).ragged_patch_embed.default
    return embed(images, *args, images.dtype in panel_dtypes())


@cache
def _missing() -> str:
    return native_operator("onednn_linear_missing")()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, tails, prefix, weights, biases, tables, strides, paddings = inputs
    ctx.save_for_backward(images, tails, prefix, *weights, *biases, *tables)
    ctx.steps = strides, paddings


def _backward(ctx: Any, grad: Tensor, grad_offsets: Tensor) -> tuple[Any, ...]:
    images, tails, prefix, *rest = ctx.saved_tensors
    count = len(rest) // 3
    lists = rest[:count], rest[count : 2 * count], rest[2 * count :]
    wants_images = ctx.needs_input_grad[0]  # training asks for the parameters' gradients alone
    grads = RAGGED_PATCH_EMBED_BACKWARD(grad, images, tails, prefix, *lists, *ctx.steps, wants_images)
    grad_images, grad_prefix, grad_weights, grad_biases, grad_tables = grads
    # none for the tails, strides and paddings
    return grad_images if wants_images else None, None, grad_prefix, grad_weights, grad_biases, grad_tables, None, None


_INPUTS = (
    "Tensor images, Tensor tails, Tensor prefix, Tensor[] weights, Tensor[] biases, Tensor[] pos_embeds,"
    " SymInt[] strides, SymInt[] paddings"
)
RAGGED_PATCH_EMBED_BACKWARD = register_op(
    "ragged_patch_embed_backward",
    f"(Tensor grad, {_INPUTS}, bool wants_images) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    reference=reference.ragged_patch_embed_backward,
    fake=lambda grad, images, tails, prefix, weights, biases, tables, strides, paddings, wants_images: (
        torch.empty_like(images) if wants_images else images.new_empty(0),
        torch.empty_like(prefix),
        [torch.empty_like(weight) for weight in weights],
        [torch.empty_like(bias) for bias in biases],
        [torch.empty_like(table) for table in tables],
    ),
    triton="ragged_patch_embed_backward",
)
RAGGED_PATCH_EMBED = register_op(
    "ragged_patch_embed",
    f"({_INPUTS}) -> (Tensor x, Tensor cu_seqlens)",
    reference=reference.ragged_patch_embed,
    fake=_fake,
    value_checks=_value_checks,
    native=_native,
    refuses=_refuses,
    triton="ragged_patch_embed",
    setup_context=_setup_context,
    backward=_backward,
)
