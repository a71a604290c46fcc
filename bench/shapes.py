"""What is measured: model sizes, batches, token counts; ``--smoke`` shrinks them all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mtvit_ops import Method, RaggedTokens, VisionTransformer
from mtvit_ops.ops import token_select

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (1, 8)
FIRST_PRUNED_BLOCK = 4
MAC_RATIO = 0.65  # what the published methods are calibrated to
# name: tokens of each image, for a batch of B
LENGTHS = ("197", "99", "50", "mixed")

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "smoke": {"embed_dim": 64, "depth": 6, "num_heads": 2, "img_size": 64},
}


def counts_between(batch: int, low: int, high: int, seed: int = 0) -> list[int]:
    """One token count per image, drawn evenly between two bounds, both included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (batch,), generator=generator).tolist()


def attention_lengths(name: str, batch: int) -> list[int]:
    """Tokens of each image of an attention case."""
    return counts_between(batch, 60, 140) if name == "mixed" else [int(name)] * batch


@cache  # what is timed is removal, not drawing
def random_scores(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class FixedCountsConfig:
    """Tokens per image from the first pruned block on, class token included."""

    counts: tuple[int, ...]


class FixedCounts(Method):
    """Keeps random patches, a fixed number in each image: what removal alone costs and gains, whoever chooses."""

    config_class = FixedCountsConfig
    config: FixedCountsConfig

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, Tensor]:
        tokens = model.embed(images)
        return tokens, random_scores(tokens.x.shape[0]).to(images.device)

    def before_block(self, index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        if index != FIRST_PRUNED_BLOCK:
            return tokens, state
        counts = self.config.counts
        keep: int | Tensor = counts[0]
        if len(set(counts)) > 1:
            keep = torch.tensor(counts, dtype=torch.int32, device=tokens.x.device)
        selection = token_select(
            state, None, tokens.cu_seqlens, keep=keep, num_prefix_tokens=1, max_seqlen=tokens.max_seqlen
        )
        return tokens.select(selection, max(counts)).trimmed(), state

    def quiet_until(self, index: int) -> int:
        return FIRST_PRUNED_BLOCK if index < FIRST_PRUNED_BLOCK else super().quiet_until(index)
