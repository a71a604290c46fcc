"""The same model with dead tokens masked instead of removed: slow on purpose, to hold removal to."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ..ragged import RaggedTokens
from .block import Attended, Block
from .drop_path import inside_drop_path
from .vision_transformer import VisionTransformer, check_flat


class MaskedBlock(nn.Module):
    """A block that computes every row, hides dead keys behind a bias of -inf, and keeps only what live rows gained.

    Args:
        block: the block whose weights it uses.
    """

    takes_packed = False  # it is to see the dead rows

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
        if tokens.rows is None:
            return self.block.attend(tokens, key_bias=key_bias, scores=scores, image_scale=image_scale)
        everyone, alive, rows, live = _everyone(tokens)
        bias = torch.zeros_like(alive, dtype=tokens.x.dtype).masked_fill(~alive, -torch.inf)
        if key_bias is not None:
            bias = bias.index_add(0, rows, key_bias.where(live, 0.0))
        after, received, _ = self.block.attend(everyone, key_bias=bias, scores=scores, image_scale=image_scale)
        x = torch.where(alive[:, None], after.x, tokens.x)
        kept = None if received is None else received[rows].where(live[:, None], 0.0)
        return Attended(tokens._replace(x=x), kept, None)

    def feed_forward(
        self,
        tokens: RaggedTokens,
        *,
        inplace: bool = False,
        ragged: bool = False,
        normed: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> RaggedTokens:
        if tokens.rows is None:
            return self.block.feed_forward(tokens, normed=normed, image_scale=image_scale)
        everyone, alive, _, _ = _everyone(tokens)
        after = self.block.feed_forward(everyone, image_scale=image_scale)
        return tokens._replace(x=torch.where(alive[:, None], after.x, tokens.x))


def masked_twin(model: VisionTransformer) -> VisionTransformer:
    """The model with shared weights and the same method, masking instead of removing.

    Args:
        model: any model of this package. Where lists are never shortened (dense, MT-ViT) the twin is the model.

    Equal to ``model`` to float rounding, in logits and in every decision.

    Raises:
        TypeError: no flat ViT of this package.
    """
    check_flat(model)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.ModuleList(inside_drop_path(block, MaskedBlock) for block in model.blocks)
    return twin


def _everyone(tokens: RaggedTokens) -> tuple[RaggedTokens, Tensor, Tensor, Tensor]:
    """All rows as live, which of them really are (R,), the listed rows (T,), and which entries are live (T,)."""
    assert tokens.rows is not None
    num_rows, batch = tokens.x.shape[0], tokens.num_images
    live = tokens.rows >= 0
    # away from the CPU a list keeps its dead entries: they mark a row that is cut off
    marked = tokens.rows.where(live, num_rows).long()
    alive = torch.zeros(num_rows + 1, dtype=torch.bool, device=live.device).index_fill(0, marked, True)[:num_rows]
    length = num_rows // max(batch, 1)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=live.device) * length
    everyone = tokens._replace(rows=None, cu_seqlens=offsets, max_seqlen=length)
    return everyone, alive, tokens.rows.clamp_min(0).long(), live
