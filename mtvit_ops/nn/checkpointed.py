"""The same model with less memory in training: blocks are computed again for the gradient."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ragged import RaggedTokens
from .block import Attended, Block
from .vision_transformer import VisionTransformer

# nothing in a block is random
CHECKPOINT_OPTIONS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class CheckpointedBlock(nn.Module):
    """A block of which only what enters its halves is kept for the gradient.

    Args:
        block: the block that it runs.
    """

    takes_packed = True

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def attend(
        self,
        tokens: RaggedTokens,
        *,
        key_bias: Tensor | None = None,
        scores: Literal["class", "mean"] | None = None,
        inplace: bool = False,
        ragged: bool = False,
    ) -> Attended:
        if not torch.is_grad_enabled():
            return self.block.attend(tokens, key_bias=key_bias, scores=scores, inplace=inplace, ragged=ragged)
        half = partial(self.block.attend, scores=scores, ragged=ragged)
        attended = checkpoint(half, tokens, key_bias=key_bias, **CHECKPOINT_OPTIONS)
        # the norm behind it is not kept either
        return Attended(attended.tokens, attended.scores, None)

    def feed_forward(
        self, tokens: RaggedTokens, *, inplace: bool = False, ragged: bool = False, normed: Tensor | None = None
    ) -> RaggedTokens:
        if not torch.is_grad_enabled():
            return self.block.feed_forward(tokens, inplace=inplace, ragged=ragged, normed=normed)
        return checkpoint(partial(self.block.feed_forward, ragged=ragged), tokens, **CHECKPOINT_OPTIONS)


def checkpointed_twin(model: VisionTransformer) -> VisionTransformer:
    """The model with shared weights and the same method, and activation checkpointing in every block.

    Args:
        model: any model of this package.

    Training then keeps two residual streams a block, and computes the rest a second time for the gradient. Logits,
    decisions and gradients are those of ``model``. Name, save and load parameters through ``model``.
    """
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.ModuleList(CheckpointedBlock(cast(Block, block)) for block in model.blocks)
    return twin
