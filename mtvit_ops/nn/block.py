"""A pre-norm transformer block that reads and writes the residual stream through the row list."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from .. import _backend
from ..ops.gather_layer_norm import GATHER_LAYER_NORM
from ..ops.scatter_residual import SCATTER_RESIDUAL, SCATTER_RESIDUAL_INPLACE
from ..ops.scatter_residual_layer_norm import SCATTER_RESIDUAL_LAYER_NORM, SCATTER_RESIDUAL_LAYER_NORM_INPLACE
from ..ops.varlen_attention import SCORES
from ..ragged import RaggedTokens
from . import ragged_block
from .attention import Attention
from .half_block import attention_half_, block_, feed_forward_half_
from .mlp import Mlp
from .plain import is_plain_norm


class Block(nn.Module):
    """Attention and MLP in two halves, so that a method may act between them; timm's parameter names.

    A model walks through the halves and never calls the block itself: hooks belong on the layers within.

    Args:
        dim, num_heads: width and heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        eps: of both LayerNorms.
    """

    takes_packed = True  # training may hand over a copy of the live rows

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """Both halves; the caller's tokens are left as they are."""
        attended = self.attend(tokens)
        return self.feed_forward(attended.tokens, normed=attended.normed)

    def run_(self, tokens: RaggedTokens, scores: Literal["class", "mean"] | None = None) -> Whole | None:
        """Both halves into ``tokens.x`` as one native operator; None: it cannot serve here, and nothing was done."""
        received = block_(self, tokens, SCORES[scores]) if self.is_whole() else None
        return None if received is None else Whole(None if scores is None else received)

    def is_whole(self) -> bool:
        """Whether both parts are of the classes that the native operator stands for."""
        parts = self._modules  # a module's attribute look-up would cost more than the check
        return type(parts["attn"]) is Attention and type(parts["mlp"]) is Mlp

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
        """The attention half on the live tokens.

        ``inplace`` writes into ``tokens.x``: for inference by whoever owns it. ``ragged`` says that only the device
        knows how many tokens live. ``image_scale`` (B,), float32 or wider, multiplies what an image's tokens gain.
        """
        attn = self.attn
        if inplace and key_bias is None and image_scale is None and type(attn) is Attention:
            given = attention_half_(self, tokens, SCORES[scores])
            if given is not None:
                return Attended(tokens, None if scores is None else given, None)
        normed = _normed(tokens, self.norm1)
        if ragged and type(attn) is Attention and ragged_block.serves(tokens, attn.qkv, attn.proj):
            return Attended(*ragged_block.attend(self, tokens, normed, key_bias, scores, inplace, image_scale), None)
        y, received = attn(normed, tokens.cu_seqlens, tokens.max_seqlen, key_bias, scores)
        if image_scale is not None:
            y = _scaled(tokens, y, image_scale)
        if _backend.triton_serves(y.device.type) and y.dtype is tokens.x.dtype and is_plain_norm(self.norm2):
            return _added_and_normed(tokens, y, self.norm2, inplace, received)
        return Attended(_added(tokens, y, inplace), received, None)

    def feed_forward(
        self,
        tokens: RaggedTokens,
        *,
        inplace: bool = False,
        ragged: bool = False,
        normed: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> RaggedTokens:
        """The MLP half on the live tokens; ``inplace``, ``ragged`` and ``image_scale`` as in ``attend``, whose
        ``normed`` saves work where these are still the tokens it gave.
        """
        mlp = self.mlp
        if inplace and image_scale is None and type(mlp) is Mlp and feed_forward_half_(self, tokens):
            return tokens
        if normed is None:
            normed = _normed(tokens, self.norm2)
        if ragged and type(mlp) is Mlp and ragged_block.serves(tokens, mlp.fc1, mlp.fc2):
            return ragged_block.feed_forward(self, tokens, normed, inplace, image_scale)
        y = mlp(normed)
        return _added(tokens, y if image_scale is None else _scaled(tokens, y, image_scale), inplace)


class Whole(NamedTuple):
    """What a block that ran as one operator leaves behind."""

    scores: Tensor | None  # (T, H) where asked for


class Attended(NamedTuple):
    """What the attention half leaves behind."""

    tokens: RaggedTokens
    scores: Tensor | None  # (T, H) where asked for
    normed: Tensor | None  # (T, D): the MLP's layer norm of these very tokens, where it came with the residual


# The operators themselves, not their doors: what is wrong here would have been wrong at the model's door.


def _normed(tokens: RaggedTokens, norm: nn.LayerNorm) -> Tensor:
    if tokens.rows is None:
        return norm(tokens.x)
    if not is_plain_norm(norm):
        return norm(tokens.packed())
    return GATHER_LAYER_NORM(tokens.x, tokens.rows, norm.weight, norm.bias, norm.eps)[0]


def _added_and_normed(
    tokens: RaggedTokens, y: Tensor, norm: nn.LayerNorm, inplace: bool, received: Tensor | None
) -> Attended:
    """The residual and the layer norm after it in one pass over the rows."""
    arguments = tokens.x, tokens.rows, y, norm.weight, norm.bias, norm.eps, None
    if inplace:
        return Attended(tokens, received, SCATTER_RESIDUAL_LAYER_NORM_INPLACE(*arguments))
    x, normed, _, _ = SCATTER_RESIDUAL_LAYER_NORM(*arguments)
    return Attended(tokens._replace(x=x), received, normed)


def _scaled(tokens: RaggedTokens, y: Tensor, image_scale: Tensor) -> Tensor:
    """``y`` (T, D) times its image's factor, in the dtype of the residual stream."""
    # not the residual's own scale: with one it keeps y for the gradient
    return (y * tokens.per_token(image_scale)).to(tokens.x.dtype)


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
