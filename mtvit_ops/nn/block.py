"""A pre-norm transformer block that reads and writes the residual stream through the row list."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops import gather_layer_norm, scatter_residual, scatter_residual_
from ..ragged import RaggedTokens
from .attention import Attention
from .mlp import Mlp


class Block(nn.Module):
    """Attention and MLP in two halves, so that a method may act between them; timm's parameter names.

    Args:
        dim, num_heads: width and heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        eps: of both LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """Both halves; the caller's tokens are left as they are."""
        return self.feed_forward(self.attend(tokens)[0])

    def attend(
        self,
        tokens: RaggedTokens,
        *,
        key_bias: Tensor | None = None,
        scores: Literal["class", "mean"] | None = None,
        inplace: bool = False,
    ) -> tuple[RaggedTokens, Tensor | None]:
        """The attention half on the live tokens, and the scores (T, H) where asked for.

        ``inplace`` writes into ``tokens.x``: for inference by whoever owns it.
        """
        normed = gather_layer_norm(tokens.x, tokens.rows, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        y, received = self.attn(normed, tokens.cu_seqlens, tokens.max_seqlen, key_bias, scores)
        return _add(tokens, y, inplace), received

    def feed_forward(self, tokens: RaggedTokens, *, inplace: bool = False) -> RaggedTokens:
        """The MLP half on the live tokens; ``inplace`` as in ``attend``."""
        normed = gather_layer_norm(tokens.x, tokens.rows, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        return _add(tokens, self.mlp(normed), inplace)


def _add(tokens: RaggedTokens, y: Tensor, inplace: bool) -> RaggedTokens:
    add = scatter_residual_ if inplace else scatter_residual
    return tokens._replace(x=add(tokens.x, tokens.rows, y))
