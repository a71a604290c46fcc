"""Blocks and classifier for training forwards that lay their tokens out, or weigh their keys, themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from ..nn import Block, VisionTransformer
from ..ragged import RaggedTokens


def run_blocks(
    model: VisionTransformer,
    tokens: RaggedTokens,
    blocks: range,
    *,
    key_bias: Callable[[int], Tensor] | None = None,
    ragged: bool = False,
) -> RaggedTokens:
    """The live tokens through some blocks; ``key_bias`` gives each block's (T,), ``ragged`` is as in ``Block``."""
    for index in blocks:
        block = cast(Block, model.blocks[index])
        bias = None if key_bias is None else key_bias(index)
        attended = block.attend(tokens, key_bias=bias, ragged=ragged)
        tokens = block.feed_forward(attended.tokens, ragged=ragged, normed=attended.normed)
    return tokens


def classify(model: VisionTransformer, tokens: RaggedTokens) -> Tensor:
    """Logits (B, C) from the class tokens of images whose tokens are all alive."""
    return model.classify(tokens.x[tokens.cu_seqlens[:-1].long()])
