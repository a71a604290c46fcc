"""Drop-path (stochastic depth): in training an image skips halves of blocks, more of them the deeper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .._checks import check_real
from ..ragged import RaggedTokens
from .block import Attended, Block
from .vision_transformer import VisionTransformer, check_flat


class DropPathBlock(nn.Module):
    """A block whose halves each image skips at random in training mode, where what it gains otherwise is scaled up.

    Args:
        block: the block that it runs.
        rate: probability of a skip, (0, 1).
        training: the mode to begin in; the block keeps its own.
    """

    def __init__(self, block: Block, rate: float, training: bool) -> None:
        super().__init__()
        self.block, self.rate, self.training = block, rate, training
        self.takes_packed = block.takes_packed

    def attend(
        self,
        tokens: RaggedTokens,
        *,
        key_bias: Tensor | None = None,
        scores: Literal["class", "mean"] | None = None,
        inplace: bool = False,
        ragged: bool = False,
    ) -> Attended:
        half = partial(self.block.attend, key_bias=key_bias, scores=scores, inplace=inplace, ragged=ragged)
        return half(tokens, image_scale=self.draw(tokens.x, tokens.num_images)) if self.training else half(tokens)

    def feed_forward(
        self, tokens: RaggedTokens, *, inplace: bool = False, ragged: bool = False, normed: Tensor | None = None
    ) -> RaggedTokens:
        half = partial(self.block.feed_forward, inplace=inplace, ragged=ragged, normed=normed)
        return half(tokens, image_scale=self.draw(tokens.x, tokens.num_images)) if self.training else half(tokens)

    def draw(self, like: Tensor, num_images: int) -> Tensor:
        """What each image's gain is multiplied with, (B,): 0 or 1 / (1 - rate), float32 (float64 for float64)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        keep = 1 - self.rate
        return torch.empty(num_images, dtype=wide, device=like.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_twin(model: VisionTransformer, rate: float) -> VisionTransformer:
    """The model with shared weights and the same method, and drop-path in training mode.

    Args:
        model: any model of this package, or a checkpointed or masked twin.
        rate: probability that an image skips the attention of the last block, and, drawn anew, its MLP, [0, 1). It
            falls in a line to 0 in the first block: block i of L has rate * i / (L - 1).

    Returns:
        The twin, in the model's mode; later calls of ``train`` and ``eval`` are for the one that they are made on.
        Name, save and load parameters through ``model``, and evaluate it.

    Raises:
        TypeError: no model, or a rate that is no number.
        ValueError: a rate out of its range, or a model that has drop-path already.

    In training mode what half a block adds to all of an image's tokens is multiplied by 0 with that probability, else
    divided by 1 minus it, so its mean is what ``model`` adds. Draws are one an image, a half and a block, from the
    global generator of PyTorch on the model's device: a seed fixes them, activation checkpointing does not draw again,
    and a sequence that MT-ViT makes of an image with one tail counts as an image. In evaluation mode and in blocks of
    rate 0 nothing is drawn, and the operators are those of ``model``. No device synchronisation.

    Equivalent PyTorch, for branches y (B, N, D): ``x + y * y.new_empty(B, 1, 1).bernoulli_(1 - p) / (1 - p)``.

    Source: Deep Networks with Stochastic Depth, arXiv 1603.09382; drawn per image and scaled up in training, as in
    timm.
    """
    check_flat(model)
    check_drop_path("rate", rate)
    if any(isinstance(module, DropPathBlock) for module in model.modules()):
        raise ValueError("model must be without drop-path, got a twin that has it")
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    last = max(len(model.blocks) - 1, 1)
    twin.blocks = nn.ModuleList(
        DropPathBlock(cast(Block, block), rate * index / last, model.training) if rate * index else block
        for index, block in enumerate(model.blocks)
    )
    return twin


def inside_drop_path(block: Any, wrap: Callable[[Any], nn.Module]) -> nn.Module:
    """``wrap(block)``, but a drop-path block's draws stay outside: a block computed again is not drawn again."""
    if isinstance(block, DropPathBlock):
        return DropPathBlock(cast(Block, wrap(block.block)), block.rate, block.training)
    return wrap(block)


def check_drop_path(name: str, rate: Any) -> None:
    """Refuse what is no rate, in words."""
    check_real(name, rate, 0.0, 1.0)
    if rate == 1:
        raise ValueError(f"{name} must be below 1, or nothing is left to learn from, got 1")
