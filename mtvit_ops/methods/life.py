"""Life Regression based patch slimming: one score decides how long a patch lives (arXiv 2304.04926)."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_choice, check_count, check_real, check_sequence
from .._register import native_kernel, native_serves
from ..nn.method import Method
from ..nn.vision_transformer import VisionTransformer
from ..ops import token_select
from ..ragged import RaggedTokens
from ._standardise import standardise

NUM_STAGES = 3


@dataclass(frozen=True)
class LifeConfig:
    """
    Attributes:
        keep_ratio: share of the tokens that each stage keeps of the one before, (0, 1].
        budgets: tokens per image in each of the three stages, class token included, not rising; None: from
            ``keep_ratio``.
        base_block: the first slimmed block, >= 1.
        mode: ``"budget"``: the longest-lived tokens, equally many in every image; ``"threshold"``: those whose life
            exceeds the block's index, a number of its own for every image.
        temperature: of the soft weights in training, > 0.
    """

    keep_ratio: float = 0.7
    budgets: tuple[int, ...] | None = None
    base_block: int = 4
    mode: str = "budget"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_real("keep_ratio", self.keep_ratio, 0.0, 1.0, open_low=True)
        if self.budgets is not None:
            check_sequence("budgets", self.budgets)
            object.__setattr__(self, "budgets", tuple(self.budgets))  # the one way into a frozen dataclass
            for budget in self.budgets:
                check_count("budgets", budget, 1)
            if any(later > earlier for earlier, later in zip(self.budgets, self.budgets[1:])):
                raise ValueError(f"budgets must not rise from stage to stage, got {self.budgets}")
        check_count("base_block", self.base_block, 1)
        check_choice("mode", self.mode, ("budget", "threshold"))
        check_real("temperature", self.temperature, 0.0, math.inf, open_low=True)


class Stage(NamedTuple):
    """The longest-lived tokens of all images, equally many of each."""

    rows: Tensor  # (B * budget,) int32, class token first, then by falling life
    cu_seqlens: Tensor  # (B + 1,) int32


class LifeState(NamedTuple):
    """Between two blocks."""

    lives: Tensor | None  # (B, N) float32 (float64 for float64), from the base block on
    stages: tuple[Stage | None, ...] = ()  # of budgets, in their order; None: everyone


def stage_budgets(num_tokens: int, keep_ratio: float) -> tuple[int, ...]:
    """Tokens in each stage: the share of the patches before, rounded up, and two more, never more than there are."""
    budgets, tokens = [], num_tokens
    for _ in range(NUM_STAGES):
        tokens = min(tokens, math.ceil(round(keep_ratio * (tokens - 1), 9)) + 2)
        budgets.append(tokens)
    return tuple(budgets)


def schedule_statistics(
    num_tokens: int, budgets: tuple[int, ...], starts: tuple[int, ...], depth: int
) -> tuple[float, float]:
    """Mean and sample standard deviation of the normalised lives that would spend exactly the budgets."""
    base = starts[0]
    ends = [(start - base) / (depth - base) for start in starts] + [1.0]
    counts = [before - after for before, after in zip((num_tokens, *budgets), (*budgets, 0))]
    # numbers of the host, whatever device the model is created on
    lives = torch.tensor(ends, dtype=torch.float64, device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
    return float(lives.mean()), float(lives.std()) if num_tokens > 1 else 0.0


class Life(Method):
    """One bilinear score per patch before the base block, one sort, then shorter and shorter prefixes of it.

    Trace extras: ``lives`` (B, N), the block index up to which each patch would live.
    """

    config_class = LifeConfig
    cost_field = "keep_ratio"
    config: LifeConfig

    @property
    def counts_are_dynamic(self) -> bool:
        return self.config.mode == "threshold"

    def attach(self, model: VisionTransformer) -> None:
        config, sizes = self.config, model.config
        num_tokens = 1 + sizes.num_patches
        tail = sizes.depth - config.base_block
        if tail < 1:
            raise ValueError(f"base_block must be below the depth {sizes.depth}, got {config.base_block}")
        length = math.ceil(tail / NUM_STAGES)
        self.starts = tuple(range(config.base_block, sizes.depth, length))
        budgets = config.budgets or stage_budgets(num_tokens, config.keep_ratio)
        if config.budgets is not None and len(budgets) != len(self.starts):
            raise ValueError(f"budgets must have one entry for each of the {len(self.starts)} stages, got {budgets}")
        self.budgets = budgets[: len(self.starts)]
        if self.budgets[0] > num_tokens:
            raise ValueError(f"budgets must be at most the {num_tokens} tokens of an image, got {self.budgets[0]}")
        self.mean, self.std = schedule_statistics(num_tokens, self.budgets, self.starts, sizes.depth)
        self.depth = sizes.depth
        if not hasattr(self, "weight"):
            # the authors' initial values; their constant part does nothing, for the scored tokens have mean 0
            self.weight = nn.Parameter(torch.rand(sizes.embed_dim, sizes.embed_dim))

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, LifeState]:
        return model.embed(images), LifeState(None)

    def before_block(self, index: int, tokens: RaggedTokens, state: LifeState) -> tuple[RaggedTokens, LifeState]:
        if index == self.config.base_block:
            state = self._begin(tokens)
        if state.lives is None:
            return tokens, state
        if self.config.mode == "threshold":
            return self._outliving(index, tokens, state.lives), state
        if index not in self.starts:
            return tokens, state
        number = self.starts.index(index)
        stage = state.stages[number]
        if stage is None:
            return tokens, state
        return RaggedTokens(tokens.x, *stage, self.budgets[number], tokens.num_prefix_tokens), state

    def quiet_until(self, index: int) -> int:
        if self.config.mode == "threshold":  # every block behind the lives may drop tokens
            return max(index + 1, self.config.base_block)
        return min((start for start in self.starts if start > index), default=self.depth)

    def lives(self, x: Tensor) -> Tensor:
        """The last block index each patch outlives, (B, 1 + N, D) to (B, N) float32; may lie outside [0, depth].

        float64 for float64. The gradient is finite for equal scores, too.
        """
        base = self.config.base_block
        if native_serves(x) and self.weight.dtype is x.dtype:
            return native_kernel("lives")(x, self.weight, self.mean, self.std, base, self.depth)
        wide = torch.promote_types(x.dtype, torch.float32)
        device = x.device.type
        # autocast would round the scores; not every device has it, and PyTorch 2.11 cannot compile the question
        known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
            normed = F.layer_norm(x.to(wide), x.shape[2:])  # eps 1e-5, without affine: the authors never train it
            direction = normed[:, 0] @ self.weight.to(wide).T  # (B, D); first W c, then x . (W c)
            scores = (normed[:, 1:] @ direction[:, :, None])[:, :, 0]  # (B, N)
        normalised = standardise(scores) * self.std + self.mean
        return base + (self.depth - base) * normalised

    def extras(self, first_rows: Tensor, states: list[LifeState]) -> dict[str, Tensor]:
        lives = states[-1].lives
        assert lives is not None
        return {"lives": lives}

    def _begin(self, tokens: RaggedTokens) -> LifeState:
        """Lives, and in budget mode the lists of all stages."""
        x = tokens.x.reshape(tokens.num_images, tokens.max_seqlen, tokens.x.shape[1])
        if self.config.mode == "threshold":
            return LifeState(self.lives(x))
        shorter = tuple(budget for budget in self.budgets if budget < tokens.max_seqlen)  # the last ones, if any
        everyone = (None,) * (len(self.budgets) - len(shorter))
        if native_serves(x) and self.weight.dtype is x.dtype:
            schedule = self.mean, self.std, self.config.base_block, self.depth
            lives, rows, offsets = native_kernel("longest_lived")(x, self.weight, *schedule, shorter)
            parts = rows.split([tokens.num_images * budget for budget in shorter])
            return LifeState(lives, (*everyone, *map(Stage, parts, offsets.unbind())))
        lives = self.lives(x)
        if not shorter:
            return LifeState(lives, everyone)
        # one sort: the list of a later stage is the head of an earlier one's, image by image
        selection = token_select(
            F.pad(lives, (1, 0)).reshape(-1),  # the class token is protected, whatever its score
            None,
            tokens.cu_seqlens,
            keep=shorter[0],
            num_prefix_tokens=1,
            order="score",
            max_seqlen=tokens.max_seqlen,
        )
        rows = selection.rows.reshape(tokens.num_images, shorter[0])
        images = torch.arange(tokens.num_images + 1, dtype=torch.int32, device=x.device)
        stages = (Stage(rows[:, :budget].reshape(-1), images * budget) for budget in shorter)
        return LifeState(lives, (*everyone, *stages))

    def _outliving(self, index: int, tokens: RaggedTokens, lives: Tensor) -> RaggedTokens:
        scores = F.pad(lives, (1, 0)).reshape(-1)
        if tokens.rows is not None:
            scores = scores[tokens.rows.clamp_min(0)]
        selection = token_select(
            scores,
            tokens.rows,
            tokens.cu_seqlens,
            threshold=float(index),
            num_prefix_tokens=1,
            max_seqlen=tokens.max_seqlen,
        )
        return tokens.select(selection).trimmed()
