"""What a case of the op benchmark is: candidates, the truth, and what must move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtvit_ops import RaggedTokens, ops
from mtvit_ops.testing import random_tensor

Run = Callable[[], Any]


class Sizes(NamedTuple):
    """A batch of DeiT-S, half of it alive."""

    device: torch.device
    batch: int = 256
    tokens: int = 197
    heads: int = 6
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"

    @property
    def dim(self) -> int:
        return 64 * self.heads

    @property
    def kept(self) -> int:
        return 1 + self.tokens // 2

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return random_tensor(*shape, dtype=dtype or self.dtype, device=self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=self.backend)


class OpCase(NamedTuple):
    """Candidates that compute the same; the first is ours."""

    op: str
    case: str
    runs: dict[str, Run]
    exact: Run  # the truth, in float64 where there are floats
    plain: Run  # plain PyTorch in the tested dtype, whose error is the allowance
    bytes: int  # that must move
    flops: int = 0


def half(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, D), and rows and offsets of a random half of each image's tokens."""
    everyone = RaggedTokens.from_dense(sizes.random(sizes.batch, sizes.tokens, sizes.dim))
    scores = sizes.random(len(everyone.x), dtype=torch.float32)
    kept = ops.token_select(scores, None, everyone.cu_seqlens, keep=sizes.kept, num_prefix_tokens=1)
    return everyone.x, kept.rows, kept.cu_seqlens
