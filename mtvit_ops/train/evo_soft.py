"""A forward pass from which Evo-ViT's class attention learns what to select: nothing waits, but less is heard of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..methods._standardise import standardise
from ..methods.evo_vit import EvoViT, EvoViTState
from ..nn import Block, VisionTransformer
from ..ops.class_attention import CLASS_ATTENTION
from ..ragged import RaggedTokens


def encode_softly(
    model: VisionTransformer, images: Tensor, temperature: float
) -> tuple[Tensor, RaggedTokens, EvoViTState]:
    """Embedding and all blocks, where a selection weighs patches, as keys of the blocks behind it, by their scores.

    Args:
        model: runs ``EvoViT``.
        images: as the model takes them, unchecked.
        temperature: see ``log_soft_weights``.

    Returns:
        What ``model.encode`` returns; all tokens are alive.

    Gradients reach the class attention that the scores are made of. No device synchronisation.

    Source: our design, after the soft weights of Life Regression (arXiv 2304.04926).
    """
    method = model.method
    assert isinstance(method, EvoViT)
    tokens = model.embed(images)
    batch, length = tokens.num_images, tokens.max_seqlen
    first_rows = tokens.cu_seqlens[:-1].long()
    score = torch.zeros(len(tokens.x), device=images.device)
    key_bias = None
    for index, block in enumerate(cast("list[Block]", list(model.blocks))):
        if method.selects[index] or method.config.mode == "layer":
            keep = method.kept_patches[index]
            patches = score.unflatten(0, (batch, length))[:, 1:]
            weights = None if keep == length - 1 else log_soft_weights(patches, keep, temperature)
            # the class token is heard as ever
            key_bias = None if weights is None else F.pad(weights, (1, 0)).flatten()
        if method.scores_at(index, False):
            attention = _class_attention(block, tokens, first_rows, key_bias)
            score = torch.lerp(score.to(attention), attention, method.tradeoffs[index])
        attended = block.attend(tokens, key_bias=key_bias)
        tokens = block.feed_forward(attended.tokens, normed=attended.normed)
    return first_rows, tokens, EvoViTState(tokens, score, None, None)


def log_soft_weights(scores: Tensor, keep: int, temperature: float) -> Tensor:
    """Logarithm of how much of each patch counts: half of one on the edge between those kept and the others.

    Args:
        scores: attention received, (B, N), >= 0.
        keep: patches that a selection would keep, in [0, N).
        temperature: of ``sigma(temperature * (z - edge))``, where z is the logarithm of the scores with mean 0 and
            deviation 1 over an image.

    Returns:
        (B, N), finite, dtype of ``scores``. The edge is a constant to gradients, the spread of z the same whatever the
        scores, so that weights cannot all be one.
    """
    z = standardise(scores.clamp_min(torch.finfo(scores.dtype).tiny).log())
    return F.logsigmoid(temperature * (z - edge(z.detach(), keep)))


def edge(z: Tensor, keep: int) -> Tensor:
    """Midway between the last value kept and the first that is not, (B, N) to (B, 1); the largest if none is kept."""
    return z.topk(keep + 1, dim=1).values[:, max(keep - 1, 0) :].mean(dim=1, keepdim=True)


def _class_attention(block: Any, tokens: RaggedTokens, first_rows: Tensor, key_bias: Tensor | None) -> Tensor:
    """What each token receives of the class token's attention in a block, (R,), summed over heads, with a gradient."""
    while hasattr(block, "block"):  # of a twin
        block = block.block
    attn, normed = block.attn, block.norm1(tokens.x)
    (q_weight, k_weight, _), (q_bias, k_bias, _) = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
    query = F.linear(normed[first_rows], q_weight, q_bias).unflatten(1, (attn.num_heads, -1))
    keys = F.linear(normed, k_weight, k_bias).unflatten(1, (attn.num_heads, -1))
    received = CLASS_ATTENTION(query, keys, tokens.cu_seqlens, tokens.max_seqlen, attn.scale, key_bias)
    return received.sum(dim=1)
