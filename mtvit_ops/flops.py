"""Multiply-accumulates of real runs, through PyTorch's own counter."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension
from .nn import LeViT, VisionTransformer


class MacCount(NamedTuple):
    """Multiply-accumulates, each image run on its own."""

    per_image: float  # mean over the images
    per_block: tuple[float, ...]  # of each block, mean over the images
    per_image_list: tuple[float, ...]  # of each image


def count_macs(model: VisionTransformer | LeViT, images: Tensor) -> MacCount:
    """Count the multiply-accumulates of a real forward pass, from the shapes that really occurred.

    Counted are convolutions, linear layers and attention; additions, norms and softmax are not, as in the papers.

    Args:
        model: any model of this package; runs in the mode it is in, without gradients.
        images: (B, in_chans, img_size, img_size), B >= 1.

    Returns:
        MacCount(per_image, per_block, per_image_list).

    Raises:
        ValueError: no image, or images that the model refuses.

    Runs the model once per image and reads token counts, which waits for the device.
    """
    model.check_images(images)
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    runs = [_count(model, image[None]) for image in images]
    totals = [total for total, _ in runs]
    per_block = [sum(blocks) / len(runs) for blocks in zip(*(blocks for _, blocks in runs))]
    return MacCount(sum(totals) / len(totals), tuple(per_block), tuple(totals))


def count_batch_macs(model: VisionTransformer | LeViT, images: Tensor) -> float:
    """Multiply-accumulates per image, mean over the batch, from one run of the whole batch."""
    return _count(model, images)[0] / len(images)


def _count(model: VisionTransformer | LeViT, images: Tensor) -> tuple[float, list[float]]:
    """Multiply-accumulates in all, and in each block."""
    register_flop_formulas()
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    blocks = [
        sum(sum(counts.get(f"{root}.blocks.{index}.{half}", {}).values()) for half in ("attn", "mlp")) / 2
        for index in range(len(model.blocks))
    ]
    return sum(counts["Global"].values()) / 2, blocks


@cache
def register_flop_formulas() -> None:
    """Teach PyTorch's ``FlopCounterMode`` the ops of this package; ``count_macs`` does it by itself.

    Attention, ragged linear layers and patch embedding are counted exactly, from the offsets and tails of the call,
    whose values are read.
    Done on request because PyTorch's counter imports Triton, which importing this package must not.
    """
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.mtvit_ops
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_onednn_linear_flops)
    if _extension.has_extension():
        register_flop_formula(torch.ops.mtvit_ops_cpp.linear)(_panel_linear_flops)
    for op, formula in (
        (ops.varlen_attention, _varlen_attention_flops),
        (ops.varlen_attention_backward, _varlen_attention_backward_flops),
        (ops.class_attention, _class_attention_flops),
        (ops.ragged_linear, _ragged_linear_flops),
        (ops.ragged_linear_backward, _ragged_linear_backward_flops),
        (ops.ragged_linear_residual, _ragged_linear_residual_flops),
        (ops.ragged_linear_residual_, _ragged_linear_residual_flops),
        (ops.ragged_patch_embed, _ragged_patch_embed_flops),
    ):
        register_flop_formula(op, get_raw=True)(formula)


def _onednn_linear_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def _panel_linear_flops(a_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    outputs = math.prod(weight_shape) // max(a_shape[-1], 1)  # packed or not
    return 2 * math.prod(a_shape) * outputs


def _varlen_attention_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args: Any, **kwargs: Any
) -> int:
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
    pairs = sum(queries * keys for queries, keys in lengths)
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def _varlen_attention_backward_flops(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> int:
    lengths = zip(args[2].diff().tolist(), args[3].diff().tolist())  # after out and lse
    pairs = sum(queries * keys for queries, keys in lengths)
    # the logits again and the gradients of q and k, then those of the probabilities and of v
    return 2 * pairs * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _class_attention_flops(q_class: Tensor, k: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * int(cu_seqlens[-1]) * k.shape[1] * k.shape[2]


def _ragged_linear_flops(
    a: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *args: Any, **kwargs: Any
) -> int:
    return 2 * int(cu_seqlens[-1]) * weight.numel()


def _ragged_linear_backward_flops(
    grad: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    gelu: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    # the gradients of a and weight, and what the GELU saw once more
    return (6 if gelu else 4) * int(cu_seqlens[-1]) * weight.numel()


def _ragged_linear_residual_flops(x: Tensor, rows: Tensor | None, *args: Any, **kwargs: Any) -> int:
    return _ragged_linear_flops(*args[:4])


def _ragged_patch_embed_flops(
    images: Tensor,
    tails: Tensor,
    prefix: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    pos_embeds: list[Tensor],
    *args: Any,
    **kwargs: Any,
) -> int:
    costs = [(len(table) - len(prefix)) * weight.numel() for weight, table in zip(weights, pos_embeds)]
    return 2 * sum(costs[tail] for tail in tails.tolist())
