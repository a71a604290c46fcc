"""The two halves of a block where only the device knows how many tokens live: products over the live rows alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from .. import _backend
from ..ops import ragged_linear, ragged_linear_residual, ragged_linear_residual_
from ..ops.varlen_attention import SCORES, VARLEN_ATTENTION
from ..ragged import RaggedTokens
from .plain import is_plain

if TYPE_CHECKING:
    from .block import Block


def serves(tokens: RaggedTokens, *layers: nn.Module) -> bool:
    """Whether the kernels are there, and the layers are ones whose weights say all."""
    # without the kernels every row of the buffer is multiplied: then PyTorch's own layers are as good
    if not _backend.triton_serves(tokens.x.device.type):
        return False
    return all(type(layer) is nn.Linear and is_plain(layer) for layer in layers)


def attend(
    block: Block,
    tokens: RaggedTokens,
    normed: Tensor,  # (T, D)
    key_bias: Tensor | None,
    scores: Literal["class", "mean"] | None,
    inplace: bool,
    image_scale: Tensor | None,  # (B,)
) -> tuple[RaggedTokens, Tensor | None]:
    """The attention half behind its layer norm."""
    attn, offsets, longest = block.attn, tokens.cu_seqlens, tokens.max_seqlen
    qkv = ragged_linear(normed, attn.qkv.weight, attn.qkv.bias, offsets).unflatten(1, (3, attn.num_heads, -1))
    out, _, received = VARLEN_ATTENTION(
        *qkv.unbind(1), offsets, offsets, longest, longest, attn.scale, key_bias, SCORES[scores]
    )
    added = _added(tokens, out.flatten(1), attn.proj, inplace, image_scale)
    return added, None if scores is None else received.detach()


def feed_forward(
    block: Block, tokens: RaggedTokens, normed: Tensor, inplace: bool, image_scale: Tensor | None
) -> RaggedTokens:
    """The MLP half behind its layer norm."""
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    hidden = ragged_linear(normed, fc1.weight, fc1.bias, tokens.cu_seqlens, activation="gelu")
    return _added(tokens, hidden, fc2, inplace, image_scale)


def _added(
    tokens: RaggedTokens, a: Tensor, layer: nn.Linear, inplace: bool, image_scale: Tensor | None
) -> RaggedTokens:
    add = ragged_linear_residual_ if inplace else ragged_linear_residual
    scale = None if image_scale is None else tokens.per_token(image_scale)
    return tokens._replace(x=add(tokens.x, tokens.rows, a, layer.weight, layer.bias, tokens.cu_seqlens, scale))
