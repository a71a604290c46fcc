"""Evo-ViT on LeViT: slow-fast updates with a representative token; patches keep their places (arXiv 2108.01390)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_real
from ..nn.levit import LeViT, LeViTConfig, LeViTMethod, NormLinear, every_second
from ..nn.trace import Trace
from ..ops import slow_fast_merge, slow_fast_update, token_select
from ..ops.gather_rows import gather_rows


@dataclass(frozen=True)
class EvoLeViTConfig:
    """
    Attributes:
        keep_ratios: share of the patches that go through each layer, (0, 1]: one number for all layers behind the first
            two, which keep all, or one a layer. Where it is 1 nothing is selected.
        stage_keep_ratios: the same for all layers of a stage that select, in mode ``"stage"``: one a stage; None: as
            ``keep_ratios``, which must then agree within each stage.
        mode: ``"stage"``: select once a stage (inference); ``"layer"``: select anew in every layer (the authors' first
            training epochs).
        learn_tradeoff: take a learned weight of a block's own class attention in the evolving score, not one half;
            None: in mode ``"stage"``, as the authors do.
        class_head: add the authors' classifiers on the class token, which only training reads.
    """

    keep_ratios: float | tuple[float, ...] = 0.5
    stage_keep_ratios: tuple[float, ...] | None = None
    mode: str = "stage"
    learn_tradeoff: bool | None = None
    class_head: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_ratios", "stage_keep_ratios"):
            value = getattr(self, name)
            if value is None and name == "stage_keep_ratios":
                continue
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))  # the one way into a frozen dataclass
            elif name == "stage_keep_ratios":
                raise TypeError(f"{name} must be a tuple or None, got {type(value).__name__}")
            for ratio in value if isinstance(value, (list, tuple)) else (value,):
                check_real(name, ratio, 0.0, 1.0, open_low=True)
        check_choice("mode", self.mode, ("stage", "layer"))
        check_choice("learn_tradeoff", self.learn_tradeoff, (True, False, None))
        check_choice("class_head", self.class_head, (True, False))


class Group(NamedTuple):
    """Blocks that run on the same tokens."""

    blocks: tuple[int, ...]
    keep: int | None  # patches that go on; None: all


class Kept(NamedTuple):
    """The tokens of a stage that a group computes, and those that wait."""

    rows: Tensor  # (B * (1 + n),) int32, of the stage's B * (1 + M)
    dropped_rows: Tensor  # (B * (M - n),) int32
    dropped_offsets: Tensor  # (B + 1,) int32


class EvoLeViT(LeViTMethod):
    """The most attended patches go on beside a representative of the others, who get what it gained.

    Patches keep their places on the grid, so nothing needs to be put back before it is subsampled. In training a
    group's batch norms see its own tokens alone. The selection is deterministic, equal scores by the smaller place.

    Trace: tokens of the grid that the first stage sees, whatever the stage; ``tokens_per_block`` counts a group's
    representative, too. Extras: ``score`` (sum of M over the blocks, B): the evolving score after each block, in the
    order of the blocks.
    """

    config_class = EvoLeViTConfig
    config: EvoLeViTConfig

    def __init__(self, config: EvoLeViTConfig | None = None) -> None:
        super().__init__()
        self.config = EvoLeViTConfig() if config is None else config
        self.tradeoffs: nn.Parameter

    def attach(self, model: LeViT) -> None:
        if not isinstance(model, LeViT):
            raise TypeError(f"model must be a LeViT, got {type(model).__name__}")
        sizes, config = model.config, self.config
        ratios = _per_layer(config.keep_ratios, sum(sizes.depth))
        if ratios[0] != 1:
            raise ValueError(f"keep_ratios must begin with 1, since the first layer has no score yet, got {ratios[0]}")
        self.groups = _groups(sizes, ratios, config)
        blocks = len(sizes.stage_of_block)
        chooses = [group.blocks[0] for groups in self.groups for group in groups if group.keep is not None]
        self.last_selection = max(chooses, default=-1)
        if not hasattr(self, "tradeoffs"):
            # the weight of a block's own attention is the sigmoid; the first block has nothing to trade off with
            self.tradeoffs = nn.Parameter(torch.zeros(blocks))
        if config.class_head and not hasattr(self, "head_cls"):
            self.head_cls = NormLinear(sizes.embed_dim[-1], sizes.num_classes)
            if sizes.distillation:
                self.head_cls_dist = NormLinear(sizes.embed_dim[-1], sizes.num_classes)

    def run(self, model: LeViT, x: Tensor, tracing: bool) -> tuple[Tensor, Trace | None]:
        record = _Record(model.config, len(x), x.device) if tracing else None
        score: Tensor | None = None
        for stage, groups in enumerate(self.groups):
            for group in groups:
                if group.keep is None:
                    for index in group.blocks:
                        x, score = self._whole(model, index, x, score, record)
                else:
                    assert score is not None
                    x, score = self._slow_fast(model, group, x, score, record)
            if stage + 1 < len(self.groups):
                x, score = self._subsample(model, groups[-1].blocks[-1] + 1, x, score, record)
        return x, None if record is None else record.trace()

    def _whole(
        self, model: LeViT, index: int, x: Tensor, score: Tensor | None, record: _Record | None
    ) -> tuple[Tensor, Tensor | None]:
        block: Any = model.blocks[index]
        if record is not None:
            record.enter(index, x.shape[1], None)
        gained, received = block.attn(x, self._scored(index, record))
        x = x + _drop_path(model, gained)
        x = x + _drop_path(model, block.mlp(x))
        if received is not None:
            score = received if score is None else self._evolved(index, score, received)
        if record is not None:
            record.leave(score)
        return x, score

    def _slow_fast(
        self, model: LeViT, group: Group, x: Tensor, score: Tensor, record: _Record | None
    ) -> tuple[Tensor, Tensor]:
        assert group.keep is not None
        batch, tokens, dim = x.shape
        slow, wait = 1 + group.keep, tokens - 1 - group.keep
        flat, flat_score = x.reshape(batch * tokens, dim), score.reshape(-1)
        kept = _select(flat_score.detach(), batch, tokens, slow)
        places = kept.rows.long()
        weights = flat_score[kept.dropped_rows.long()]
        stands_for = (kept.dropped_rows, kept.dropped_offsets, wait)
        first = slow_fast_merge(flat, weights, *stands_for)
        z = torch.cat((gather_rows(flat, kept.rows).view(batch, slow, dim), first[:, None]), dim=1)
        for index in group.blocks:
            block: Any = model.blocks[index]
            if record is not None:
                record.enter(index, 2 + group.keep, kept.rows)
            gained, received = block.attn(z, self._scored(index, record))
            z = z + _drop_path(model, gained)
            z = z + _drop_path(model, block.mlp(z))
            if received is not None:
                evolved = self._evolved(index, flat_score[places], received[:, :-1].flatten())
                flat_score = flat_score.index_copy(0, places, evolved)
            if record is not None:
                record.leave(flat_score.view(batch, tokens))
        flat = slow_fast_update(flat, *stands_for, z[:, -1] - first)
        flat = flat.index_copy(0, places, z[:, :-1].reshape(-1, dim))
        return flat.view(batch, tokens, dim), flat_score.view(batch, tokens)

    def _subsample(
        self, model: LeViT, index: int, x: Tensor, score: Tensor | None, record: _Record | None
    ) -> tuple[Tensor, Tensor | None]:
        block: Any = model.blocks[index]
        side = block.attn.side
        if record is not None:
            record.enter(index, x.shape[1], None)
        x, received = block.attn(x, self._scored(index, record))
        if score is not None:
            total = score[:, 1:].sum(dim=1, keepdim=True)
            score = torch.cat((score[:, :1], every_second(score[:, 1:], side)), dim=1)
            if received is not None:
                received = torch.cat((received[:, :1], every_second(received[:, 1:], side)), dim=1)
                score = self._evolved(index, score, received)
            # fewer patches share what all had; no sum, no share
            score = score * (total / score[:, 1:].sum(dim=1, keepdim=True)).nan_to_num(0.0)
        x = x + _drop_path(model, block.mlp(x))
        if record is not None:
            record.leave(score)
            record.halve()
        return x, score

    def _scored(self, index: int, record: _Record | None) -> bool:
        return record is not None or index < self.last_selection

    def _evolved(self, index: int, score: Tensor, received: Tensor) -> Tensor:
        learned = self.config.mode == "stage" if self.config.learn_tradeoff is None else self.config.learn_tradeoff
        if not learned:
            return torch.lerp(score, received, 0.5)
        return torch.lerp(score, received, self.tradeoffs[index].sigmoid().to(received.dtype))

    def extra_repr(self) -> str:
        return repr(self.config)


class _Record:
    """Gathers a trace: rows of each stage become tokens of the first stage's grid."""

    def __init__(self, config: LeViTConfig, batch: int, device: torch.device) -> None:
        self._side, self._batch = config.grid_sizes[0], batch
        self._original = torch.arange(self._side**2, device=device)  # of each patch of the stage
        self._first_rows = (1 + self._side**2) * torch.arange(batch, device=device)
        self._counts: list[int] = []
        self._rows: list[Tensor] = []
        self._offsets: list[Tensor] = []
        self._scores: list[Tensor] = []

    def enter(self, index: int, computed: int, rows: Tensor | None) -> None:
        names = torch.cat((self._original.new_zeros(1), 1 + self._original))
        tokens = len(names)
        if rows is None:
            places = torch.arange(tokens, device=names.device).expand(self._batch, -1)
        else:
            first = tokens * torch.arange(self._batch, device=names.device)[:, None]
            kept = rows.shape[0] // max(self._batch, 1)
            places = rows.view(self._batch, kept).long() - first
        self._rows.append((names[places] + self._first_rows[:, None]).flatten())
        length = places.shape[1]
        self._offsets.append(length * torch.arange(self._batch + 1, device=names.device))
        self._counts.append(computed)

    def leave(self, score: Tensor | None) -> None:
        if score is not None:
            self._scores.append(score[:, 1:].detach())

    def halve(self) -> None:
        self._original = every_second(self._original[None], self._side)[0]
        self._side = (self._side - 1) // 2 + 1

    def trace(self) -> Trace:
        counts = torch.tensor(self._counts, device=self._original.device)[:, None].expand(-1, self._batch)
        scores = {"score": torch.cat(self._scores, dim=1).T} if self._scores else {}
        return Trace(counts, scores, tuple(self._rows), tuple(self._offsets), self._first_rows)


def _select(score: Tensor, batch: int, tokens: int, slow: int) -> Kept:
    offsets = tokens * torch.arange(batch + 1, dtype=torch.int32, device=score.device)
    selection = token_select(
        score, None, offsets, keep=slow, num_prefix_tokens=1, return_dropped=True, max_seqlen=tokens
    )
    assert selection.dropped_rows is not None
    assert selection.dropped_cu_seqlens is not None
    return Kept(selection.rows, selection.dropped_rows, selection.dropped_cu_seqlens)


def _drop_path(model: LeViT, branch: Tensor) -> Tensor:
    rate = model.config.drop_path
    if not (model.training and rate > 0):
        return branch
    return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(1 - rate) / (1 - rate)


def _per_layer(value: float | tuple[float, ...], layers: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (1.0,) * min(2, layers) + (float(value),) * (layers - 2)
    if len(value) != layers:
        raise ValueError(f"keep_ratios must have one entry for each of the {layers} layers, got {len(value)}")
    return tuple(float(entry) for entry in value)


def _groups(sizes: LeViTConfig, ratios: tuple[float, ...], config: EvoLeViTConfig) -> tuple[tuple[Group, ...], ...]:
    """The groups of each stage."""
    stages = config.stage_keep_ratios
    if stages is not None and len(stages) != len(sizes.depth):
        raise ValueError(
            f"stage_keep_ratios must have one entry for each of the {len(sizes.depth)} stages, got {len(stages)}"
        )
    groups, block, layer = [], 0, 0
    for stage, depth in enumerate(sizes.depth):
        own, patches = ratios[layer : layer + depth], sizes.grid_sizes[stage] ** 2
        pruned = [index for index in range(depth) if own[index] != 1]
        found = [Group((block + index,), None) for index in range(depth) if own[index] == 1]
        if config.mode == "layer":
            found += [Group((block + index,), _keep(patches, own[index])) for index in pruned]
            found.sort()
        elif pruned:
            if pruned != list(range(pruned[0], depth)):
                raise ValueError(
                    f"keep_ratios must be 1 in the first layers of a stage alone, got {own} in stage {stage}"
                )
            if stages is None and len({own[index] for index in pruned}) > 1:
                raise ValueError(f"keep_ratios must agree within stage {stage} without stage_keep_ratios, got {own}")
            ratio = own[pruned[0]] if stages is None else stages[stage]
            found.append(Group(tuple(block + index for index in pruned), _keep(patches, ratio)))
        groups.append(tuple(found))
        block, layer = block + depth + 1, layer + depth
    return tuple(groups)


def _keep(patches: int, ratio: float) -> int | None:
    keep = int(patches * ratio)
    return None if keep == patches else keep
