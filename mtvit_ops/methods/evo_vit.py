"""Evo-ViT on flat ViTs: the most attended tokens go on, the rest wait in place (arXiv 2108.01390)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_real
from .._register import native_kernel, native_serves
from ..nn.block_run import BlockRun, scored_blocks_
from ..nn.method import Method
from ..nn.vision_transformer import VisionTransformer
from ..ops import token_select
from ..ragged import RaggedTokens
from ._pooling import pool_tokens


@dataclass(frozen=True)
class EvoViTConfig:
    """
    Attributes:
        keep_ratios: share of the patches that go through each block, (0, 1]: one number for all blocks after the first
            third, which stay dense, or one a block, of which stage mode reads those where it selects.
        tradeoffs: weight of a block's own class attention in the evolving score, [0, 1]: one number for all blocks
            after the first third, where it is 1, or one a block.
        mode: ``"stage"``: select at one third and at two thirds of the depth (inference); ``"layer"``: select anew
            before every pruned block (the authors' first training epochs).
        prune_cls: classify from the patches alive at the end only; without one, from zeros.
        pool: ``"mean"`` of the patch tokens (the authors' classifier), or the ``"class"`` token (weights trained so).
        class_head: add the authors' second classifier, on the class token, which only training reads.
    """

    keep_ratios: float | tuple[float, ...] = 0.5
    tradeoffs: float | tuple[float, ...] = 0.5
    mode: str = "stage"
    prune_cls: bool = False
    pool: str = "mean"
    class_head: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_ratios", "tradeoffs"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))  # the one way into a frozen dataclass
            for ratio in value if isinstance(value, (list, tuple)) else (value,):
                check_real(name, ratio, 0.0, 1.0, open_low=name == "keep_ratios")
        check_choice("mode", self.mode, ("stage", "layer"))
        check_choice("pool", self.pool, ("mean", "class"))
        check_choice("prune_cls", self.prune_cls, (True, False))
        check_choice("class_head", self.class_head, (True, False))


class EvoViTState(NamedTuple):
    """Between two blocks."""

    everyone: RaggedTokens  # the list of all tokens, to select from
    score: Tensor  # (R,) float32, the evolving class attention of every token
    received: Tensor | None  # (T, H), the class attention of the last scored block
    received_rows: Tensor | None  # (T,), whose it is; None: everyone's


class EvoViT(Method):
    """Placeholders keep their rows: they are frozen until a later selection lets them back in.

    Trace extras: ``class_attention`` (L, B, N), summed over heads, 0 where a patch was not processed; ``score``
    (L, B, N), the evolving score after each block.
    """

    config_class = EvoViTConfig
    cost_field = "keep_ratios"
    reads_scores_only = True
    config: EvoViTConfig

    def attach(self, model: VisionTransformer) -> None:
        depth = model.config.depth
        self.keep_ratios = _per_block("keep_ratios", self.config.keep_ratios, depth)
        self.tradeoffs = _per_block("tradeoffs", self.config.tradeoffs, depth)
        num_patches = model.config.num_patches
        pruned = [ratio != 1 for ratio in self.keep_ratios]
        if self.config.mode == "layer":
            self.selects = tuple(pruned)
        else:
            starts = (depth // 3, 2 * depth // 3)
            # a stage that keeps all still selects: the placeholders of the stage before come back
            self.selects = tuple(index in starts and any(pruned) for index in range(depth))
        self.kept_patches = tuple(int(num_patches * ratio) for ratio in self.keep_ratios)
        chooses = (index for index in range(depth) if self.selects[index] and self.kept_patches[index] < num_patches)
        # the first block has nothing to trade off with
        self.tradeoffs = (1.0, *self.tradeoffs[1:])
        self.last_selection = max(chooses, default=-1)
        if self.config.class_head and not hasattr(self, "head_cls"):
            sizes = model.config
            self.norm_cls = nn.LayerNorm(sizes.embed_dim, eps=sizes.norm_eps)
            self.head_cls = nn.Linear(sizes.embed_dim, sizes.num_classes)
            nn.init.trunc_normal_(self.head_cls.weight, std=0.02)
            nn.init.zeros_(self.head_cls.bias)

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, EvoViTState]:
        tokens = model.embed(images)
        scores = torch.zeros(tokens.x.shape[0], dtype=torch.float32, device=tokens.x.device)
        return tokens, EvoViTState(tokens, scores, None, None)

    def before_block(self, index: int, tokens: RaggedTokens, state: EvoViTState) -> tuple[RaggedTokens, EvoViTState]:
        if not self.selects[index]:
            if self.config.mode == "layer" and tokens.rows is not None:
                # a dense block among pruned ones
                tokens = state.everyone._replace(x=tokens.x)
            return tokens, state
        everyone = state.everyone._replace(x=tokens.x)
        keep = everyone.num_prefix_tokens + self.kept_patches[index]
        if keep == everyone.max_seqlen:
            return everyone, state
        selection = token_select(
            state.score,
            None,
            everyone.cu_seqlens,
            keep=keep,
            num_prefix_tokens=everyone.num_prefix_tokens,
            max_seqlen=everyone.max_seqlen,
        )
        return everyone.select(selection, keep), state

    def scores_at(self, index: int, tracing: bool) -> Literal["class"] | None:
        if tracing:
            return "class"
        # a block whose successor scores all tokens afresh, or after which nothing is selected, need not be scored
        overwritten = (
            index + 1 < len(self.tradeoffs) and self.tradeoffs[index + 1] == 1 and not any(self.selects[: index + 2])
        )
        return "class" if index < self.last_selection and not overwritten else None

    def run_blocks_(
        self, index: int, run: BlockRun, tokens: RaggedTokens, state: EvoViTState
    ) -> tuple[int, RaggedTokens, EvoViTState] | None:
        until = index + 1
        # in layer mode a dense block behind a pruned one takes everyone
        while until < len(run.blocks) and not self.selects[until] and self.config.mode == "stage":
            until += 1
        weights = [
            -1.0 if self.scores_at(block, False) is None else self.tradeoffs[block] for block in range(index, until)
        ]
        score = scored_blocks_(run, index, until, tokens, state.score, weights)
        return None if score is None else (until, tokens, state._replace(score=score))

    def after_attention(
        self, index: int, tokens: RaggedTokens, state: EvoViTState, scores: Tensor | None
    ) -> tuple[RaggedTokens, EvoViTState]:
        if scores is None:
            return tokens, state
        score = self._evolved(scores, state.score, tokens.rows, self.tradeoffs[index])
        return tokens, state._replace(score=score, received=scores, received_rows=tokens.rows)

    def _evolved(self, received: Tensor, score: Tensor, rows: Tensor | None, weight: float) -> Tensor:
        """The score (R,) after a block whose live tokens received (T, H) of the class token's attention."""
        if native_serves(received) and received.dtype is torch.float32:
            return native_kernel("evolve_scores")(received, score, rows, weight)
        attention = received.float().sum(dim=1)
        if rows is None:
            return torch.lerp(score, attention, weight) if weight != 1 else attention
        index = rows.long()
        evolved = torch.lerp(score[index], attention, weight) if weight != 1 else attention
        return score.index_copy(0, index, evolved)

    @property
    def reads_class_tokens(self) -> bool:
        return type(self).readout is EvoViT.readout and self.config.pool == "class"

    def readout(self, first_rows: Tensor, tokens: RaggedTokens, state: EvoViTState) -> Tensor:
        if self.config.prune_cls and self.config.pool == "mean" and len(first_rows) > 0:
            # every image keeps the same number of tokens
            alive = tokens.packed().reshape(len(first_rows), -1, tokens.x.shape[1])
            patches = alive[:, tokens.num_prefix_tokens :]
            return patches.sum(dim=1) / max(patches.shape[1], 1)  # 0 where every patch was dropped
        return pool_tokens(tokens.x, first_rows, tokens.num_prefix_tokens, self.config.pool)

    def extras(self, first_rows: Tensor, states: list[EvoViTState]) -> dict[str, Tensor]:
        prefix = states[-1].everyone.num_prefix_tokens
        shape = (len(states), len(first_rows), states[-1].everyone.max_seqlen)
        attention = torch.stack([_class_attention(state) for state in states if state.received is not None])
        return {
            "class_attention": attention.reshape(shape)[:, :, prefix:],
            "score": torch.stack([state.score for state in states]).reshape(shape)[:, :, prefix:],
        }


def _class_attention(state: EvoViTState) -> Tensor:
    """(R,), summed over heads, 0 where a token was not processed."""
    assert state.received is not None
    attention = state.received.float().sum(dim=1)
    if state.received_rows is None:
        return attention
    return torch.zeros_like(state.score).index_copy(0, state.received_rows.long(), attention)


def _per_block(name: str, value: float | tuple[float, ...], depth: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (1.0,) * (depth // 3) + (float(value),) * (depth - depth // 3)
    if len(value) != depth:
        raise ValueError(f"{name} must have one entry for each of the {depth} blocks, got {len(value)}")
    return tuple(float(entry) for entry in value)
