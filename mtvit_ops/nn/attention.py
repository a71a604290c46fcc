"""Multi-head attention over packed tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops.varlen_attention import SCORES, VARLEN_ATTENTION
from .linear import linear


class Attention(nn.Module):
    """Self-attention with timm's parameter names: ``qkv`` and ``proj``.

    Args:
        dim: width of a token, a multiple of ``num_heads``.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # (T, D)
        cu_seqlens: Tensor,  # (B + 1,)
        max_seqlen: int,
        key_bias: Tensor | None = None,  # (T,) or (T, H)
        scores: Literal["class", "mean"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # (T, D), (T, H) where asked for
        """Attend within each image; with ``scores`` also what each token received (see ``ops.varlen_attention``)."""
        qkv = linear(x, self.qkv).unflatten(1, (3, self.num_heads, -1))  # (T, 3, H, d)
        q, k, v = qkv.unbind(1)
        # the operator itself, not its door: see Block
        out, _, received = VARLEN_ATTENTION(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, self.scale, key_bias, SCORES[scores]
        )
        return linear(out.flatten(1), self.proj), None if scores is None else received.detach()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
