"""Several blocks as one native operator: Python is left once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .._cpu_linear import panel_columns, panel_dtypes
from .._register import native_operator
from ..ragged import RaggedTokens
from .half_block import attention_arguments, feed_forward_arguments, may_serve
from .linear import PackedLinear
from .prepared import Prepared

if TYPE_CHECKING:
    from .block import Block


class _Given(NamedTuple):
    """What the operators get of all blocks."""

    weights: list[Tensor]  # twelve a block; with a hidden width the two of csrc/cpu/blocks.h
    sizes: tuple[Any, ...]  # eps, heads, scale, whether our own kernel multiplies
    hidden: int | None

    def of(self, first: int, last: int) -> tuple[Any, ...]:
        if self.hidden is None:
            return self.weights[12 * first : 12 * last], *self.sizes, ()
        return self.weights, *self.sizes, (first, last, self.hidden)


class BlockRun:
    """A model's blocks in one forward pass; whether anything has changed since the last one is looked at once.

    Args:
        blocks: all of them.
        prepared: where their arguments are kept from pass to pass.
    """

    def __init__(self, blocks: Sequence[Block], prepared: Prepared) -> None:
        self.blocks = blocks
        self._prepared = prepared
        self._given: _Given | None = None
        self._asked = False

    def arguments(self, x: Tensor, first: int, last: int) -> tuple[Any, ...] | None:
        """Those of an operator for blocks [first, last) of a stream like ``x``; None: it cannot serve here."""
        if not may_serve(x):
            return None
        if not self._asked:
            self._given = self._prepared.arguments("blocks", self.blocks, x, _all_arguments)
            self._asked = True
        return None if self._given is None else self._given.of(first, last)


def blocks_(run: BlockRun, first: int, last: int, tokens: RaggedTokens) -> bool:
    """Blocks [first, last), one after the other; False: it cannot serve here, and nothing was done."""
    given = run.arguments(tokens.x, first, last)
    if given is None:
        return False
    _operators().blocks(tokens.x, tokens.rows, tokens.cu_seqlens, tokens.max_seqlen, *given)
    return True


def scored_blocks_(
    run: BlockRun, first: int, last: int, tokens: RaggedTokens, score: Tensor, tradeoffs: Sequence[float]
) -> Tensor | None:
    """The same, and Evo-ViT's score (R,) behind each block whose tradeoff is not negative.

    None: it cannot serve here, and nothing was done.
    """
    given = run.arguments(tokens.x, first, last)
    if given is None:
        return None
    stream = tokens.x, tokens.rows, tokens.cu_seqlens, tokens.max_seqlen
    return _operators().scored_blocks(*stream, *given, score, tradeoffs)


def halting_blocks_(run: BlockRun, tokens: RaggedTokens, *gate: float) -> Any:
    """All blocks on all tokens, A-ViT's halting step behind each; what the last one gives.

    ``gate``: gate_scale, gate_center and eps. None: it cannot serve here, and nothing was done.
    """
    given = run.arguments(tokens.x, 0, len(run.blocks))
    if given is None:
        return None
    return _operators().halting_blocks(tokens.x, tokens.cu_seqlens, tokens.max_seqlen, *given, *gate)


class _Operators(NamedTuple):
    blocks: Callable[..., None]
    scored_blocks: Callable[..., Tensor]
    halting_blocks: Callable[..., Any]


@cache
def _operators() -> _Operators:
    return _Operators(*map(native_operator, ("blocks_", "scored_blocks_", "halting_blocks_")))


def _all_arguments(blocks: Sequence[Block], x: Tensor) -> _Given | None:
    """Weights and sizes of blocks that are all of one kind."""
    listed = _listed(blocks, x, pack=False)  # nothing is packed for an operator that cannot serve
    if listed is None:
        return None
    panels = _pack_together(blocks, x, listed.weights)
    if panels is None:
        return _listed(blocks, x, pack=True)
    vectors = [weight.detach().float() for weight in listed.weights if weight.dim() == 1]
    return _Given([panels, torch.cat(vectors)], listed.sizes, blocks[0].mlp.fc1.out_features)


def _listed(blocks: Sequence[Block], x: Tensor, pack: bool) -> _Given | None:
    weights: list[Tensor | None] = []
    sizes: tuple[Any, ...] | None = None
    for block in blocks:
        if not block.is_whole():
            return None
        attention, feed_forward = attention_arguments(block, x, pack), feed_forward_arguments(block, x, pack)
        if attention is None or feed_forward is None:
            return None
        (weight1, bias1, eps1, qkv, qkv_bias, *heads), proj = attention
        weight2, bias2, eps2, *layers = feed_forward
        if sizes not in (None, (eps1, *heads)) or eps1 != eps2:
            return None
        sizes = eps1, *heads
        weights += (weight1, bias1, qkv, qkv_bias, *proj, weight2, bias2, *layers)
    if sizes is None or any(weight is None for weight in weights):
        return None
    return _Given(cast("list[Tensor]", weights), (*sizes, x.dtype in panel_dtypes()), None)


def _pack_together(blocks: Sequence[Block], x: Tensor, weights: list[Tensor]) -> Tensor | None:
    """The weights of all blocks in one piece of memory, which their layers read, too; None: they cannot be packed so.

    One tensor takes less time to hand over than 48, and can lie on large pages.
    """
    layers: list[Any] = []
    for block in blocks:
        layers += (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    if x.dtype not in panel_dtypes() or not all(type(layer) is PackedLinear and layer.can_keep() for layer in layers):
        return None
    if any(weight.dim() == 1 and weight.dtype not in (x.dtype, torch.float32) for weight in weights):
        return None
    columns, width, hidden = panel_columns(), x.shape[1], layers[2].out_features
    shapes = [(3 * width, width), (width, width), (hidden, width), (width, hidden)] * len(blocks)
    if width % columns or hidden % columns or [tuple(layer.weight.shape) for layer in layers] != shapes:
        return None
    for layer in layers:
        layer.keep(None)  # before they are packed anew: twice the weights would be much
    panels: Tensor = torch.ops.mtvit_ops_cpp.pack_run([layer.weight.detach() for layer in layers])
    begin = 0
    for layer in layers:
        count = layer.weight.numel()
        layer.keep(panels[begin : begin + count].view(-1, layer.in_features, columns))
        begin += count
    return panels
