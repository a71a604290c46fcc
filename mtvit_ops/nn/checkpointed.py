"""The same model with less memory in training: blocks are computed again for the gradient."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ragged import RaggedTokens
from .block import Attended, Block
from .drop_path import inside_drop_path
from .vision_transformer import VisionTransformer, check_flat

# nothing in here is random: what drop-path draws comes from outside
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
        image_scale: Tensor | None = None,
    ) -> Attended:
        half = partial(self.block.attend, scores=scores, ragged=ragged)
        if not torch.is_grad_enabled():
            return half(tokens, key_bias=key_bias, inplace=inplace, image_scale=image_scale)
        attended = checkpoint(half, tokens, key_bias=key_bias, image_scale=image_scale, **CHECKPOINT_OPTIONS)
        # the norm behind it is not kept either
        return Attended(attended.tokens, attended.scores, None)

    def feed_forward(
        self,
        tokens: RaggedTokens,
        *,
        inplace: bool = False,
        ragged: bool = False,
        normed: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> RaggedTokens:
        half = partial(self.block.feed_forward, ragged=ragged)
        if not torch.is_grad_enabled():
            return half(tokens, inplace=inplace, normed=normed, image_scale=image_scale)
        return checkpoint(half, tokens, image_scale=image_scale, **CHECKPOINT_OPTIONS)


def checkpointed_twin(model: VisionTransformer) -> VisionTransformer:
    """The model with shared weights and the same method, and activation checkpointing in every block.

    Args:
        model: any model of this package.

    Training then keeps two residual streams a block, and computes the rest a second time for the gradient. Logits,
    decisions and gradients are those of ``model``. Name, save and load parameters through ``model``.

    Raises:
        TypeError: no flat ViT of this package.
    """
    check_flat(model)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.ModuleList(inside_drop_path(block, CheckpointedBlock) for block in model.blocks)
    return twin
