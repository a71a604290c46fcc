"""A block, or each of its halves, as one native operator: Python is left once or twice a block, not nine times."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from .. import _backend, _extension
from .._cpu_linear import linear_dtypes, panel_dtypes
from .._register import native_operator, native_serves
from ..ragged import RaggedTokens
from .linear import PackedLinear
from .plain import affine, is_plain, modules_are_watched

if TYPE_CHECKING:
    from .block import Block


class _Halves(NamedTuple):
    attention: Callable[..., Tensor]
    feed_forward: Callable[..., None]
    block: Callable[..., Tensor]


def attention_half_(block: Block, tokens: RaggedTokens, scores: int) -> Tensor | None:
    """``x[rows] += proj(attention(qkv(norm1(x[rows]))))`` and the scores, (T, H) or (0, H).

    None: it cannot serve here, and nothing was done.
    """
    x = tokens.x
    halves = _halves_for(x)
    given = None if halves is None else attention_arguments(block, x)
    if halves is None or given is None:
        return None
    into, out_of = given
    offsets, longest = tokens.cu_seqlens, tokens.max_seqlen
    return halves.attention(x, tokens.rows, offsets, longest, *into, scores, *out_of, x.dtype in panel_dtypes())


def feed_forward_half_(block: Block, tokens: RaggedTokens) -> bool:
    """``x[rows] += fc2(gelu(fc1(norm2(x[rows]))))``; False: it cannot serve here, and nothing was done."""
    x = tokens.x
    halves = _halves_for(x)
    given = None if halves is None else feed_forward_arguments(block, x)
    if halves is None or given is None:
        return False
    halves.feed_forward(x, tokens.rows, *given, x.dtype in panel_dtypes())
    return True


def block_(block: Block, tokens: RaggedTokens, scores: int) -> Tensor | None:
    """Both halves, and the scores of the first; None: it cannot serve here, and nothing was done."""
    x = tokens.x
    halves = _halves_for(x)
    if halves is None:
        return None
    attention, feed_forward = attention_arguments(block, x), feed_forward_arguments(block, x)
    if attention is None or feed_forward is None:
        return None
    into, out_of = attention
    offsets, longest, panels = tokens.cu_seqlens, tokens.max_seqlen, x.dtype in panel_dtypes()
    return halves.block(x, tokens.rows, offsets, longest, *into, scores, *out_of, *feed_forward, panels)


Arguments = tuple[Any, ...]


def attention_arguments(block: Block, x: Tensor, pack: bool = True) -> tuple[Arguments, Arguments] | None:
    """Those of the norm, the first layer and the heads, and those of the last layer; weights packed or as they are."""
    parts: dict[str, Any] = block._modules
    attn = parts["attn"]
    if not is_plain(attn):
        return None
    norm = affine(parts["norm1"])
    qkv, proj = layer_weights(x, attn._modules["qkv"], pack), layer_weights(x, attn._modules["proj"], pack)
    if norm is None or qkv is None or proj is None:
        return None
    return (*norm, *qkv, attn.num_heads, attn.scale), proj


def feed_forward_arguments(block: Block, x: Tensor, pack: bool = True) -> Arguments | None:
    parts: dict[str, Any] = block._modules
    mlp = parts["mlp"]
    if not is_plain(mlp):
        return None
    norm = affine(parts["norm2"])
    fc1, fc2 = layer_weights(x, mlp._modules["fc1"], pack), layer_weights(x, mlp._modules["fc2"], pack)
    if norm is None or fc1 is None or fc2 is None:
        return None
    return (*norm, *fc1, *fc2)


@cache
def _native_halves(panels: bool = False) -> _Halves | None:
    if not _extension.has_extension():
        return None  # said elsewhere
    missing = None if panels else native_operator("onednn_linear_missing")()
    if missing:
        _backend.say_once(logging.INFO, f"blocks run as single operators on the CPU, since {missing}")
        return None
    return _Halves(*map(native_operator, ("attention_half_", "feed_forward_half_", "block_")))


def may_serve(x: Tensor) -> bool:
    """Whether native operators for blocks may run on a stream like ``x``, if the blocks are what they stand for."""
    return _halves_for(x) is not None


def _halves_for(x: Tensor) -> _Halves | None:
    if not native_serves(x) or x.numel() == 0 or x.dtype not in linear_dtypes():
        return None
    # whoever watches modules wants to see each
    if modules_are_watched():
        return None
    return _native_halves(x.dtype in panel_dtypes())


def layer_weights(x: Tensor, layer: Any, pack: bool = True) -> tuple[Tensor, Tensor | None] | None:
    """Weight, packed where the layer packs it, and bias; None: the layer must run itself."""
    packs = type(layer) is PackedLinear
    if not ((packs or type(layer) is nn.Linear) and is_plain(layer)):
        return None
    parameters = layer._parameters
    weight = parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype is not x.dtype or weight.numel() == 0:
        return None
    if "bias" not in parameters:  # it is computed
        return None
    return (layer.packed_weight(weight) if packs and pack else weight), parameters["bias"]
