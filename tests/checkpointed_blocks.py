"""A model whose blocks are computed again for the gradient, as a user of activation checkpointing would have it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from mtvit_ops.nn import VisionTransformer


class Checkpointed(nn.Module):
    """A block of which only what enters its halves is kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def attend(self, tokens: Any, **options: Any) -> Any:
        return checkpoint(self.block.attend, tokens, use_reentrant=False, **options)

    def feed_forward(self, tokens: Any, **options: Any) -> Any:
        return checkpoint(self.block.feed_forward, tokens, use_reentrant=False, **options)


def checkpointed(model: VisionTransformer) -> VisionTransformer:
    """The same weights and method; a parameter of block i is named ``blocks.<i>.block.*``."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    return twin
