"""A pre-norm transformer block that reads and writes the residual stream through the row list."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops.gather_layer_norm import GATHER_LAYER_NORM
from ..ops.scatter_residual import SCATTER_RESIDUAL, SCATTER_RESIDUAL_INPLACE
from ..ops.varlen_attention import SCORES
from ..ragged import RaggedTokens
from .attention import Attention
from .half_block import attention_half_, feed_forward_half_
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
        if inplace and key_bias is None and type(self.attn) is Attention:
            given = attention_half_(self, tokens, SCORES[scores])
            if given is not None:
                return tokens, None if scores is None else given
        y, received = self.attn(_normed(tokens, self.norm1), tokens.cu_seqlens, tokens.max_seqlen, key_bias, scores)
        return _added(tokens, y, inplace), received

    def feed_forward(self, tokens: RaggedTokens, *, inplace: bool = False) -> RaggedTokens:
        """The MLP half on the live tokens; ``inplace`` as in ``attend``."""
        if inplace and type(self.mlp) is Mlp and feed_forward_half_(self, tokens):
            return tokens
        return _added(tokens, self.mlp(_normed(tokens, self.norm2)), inplace)


# The operators themselves, not their doors: what is wrong here would have been wrong at the model's door.


def _normed(tokens: RaggedTokens, norm: nn.LayerNorm) -> Tensor:
    if tokens.rows is None:
        return norm(tokens.x)
    return GATHER_LAYER_NORM(tokens.x, tokens.rows, norm.weight, norm.bias, norm.eps)[0]


def _added(tokens: RaggedTokens, y: Tensor, inplace: bool) -> RaggedTokens:
    x, rows = tokens.x, tokens.rows
    if y.dtype is not x.dtype:  # under autocast
        y = y.to(x.dtype)
    if not inplace:
        return tokens._replace(x=x + y if rows is None else SCATTER_RESIDUAL(x, rows, y, None))
    if rows is None:
        x.add_(y)
    else:
        SCATTER_RESIDUAL_INPLACE(x, rows, y, None)
    return tokens
