"""Drawn calls of the operators that are a transformer block, or half of one, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fuzz_draw import REFUSALS, Draw
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops._cpu_linear import onednn_dtypes
from mtvit_ops.reference.gather_layer_norm import gather_layer_norm
from mtvit_ops.reference.scatter_residual import scatter_residual
from mtvit_ops.reference.varlen_attention import varlen_attention

native = torch.ops.mtvit_ops_cpp
SCALE, EPS = 0.25, 1e-6


class Layer(NamedTuple):
    """A linear layer: what the operator gets, and the same weight for the reference."""

    given: Tensor  # packed, perhaps
    bias: Tensor | None
    weight: Tensor


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor


class Stream(NamedTuple):
    """A residual stream and its live rows."""

    x: Tensor  # (R, D)
    rows: Tensor | None  # (T,)
    cu_seqlens: Tensor
    longest: int
    heads: int


def draw_layer(draw: Draw, inputs: int, outputs: int) -> Layer:
    weight = draw.tensor(outputs, inputs) * 0.2  # small enough that sums do not leave the dtype
    given = weight
    packs = weight.dim() == 2 and weight.numel() > 0 and weight.dtype in onednn_dtypes()
    if packs and draw.random.random() < 0.4:
        given = torch.ops.mkldnn._reorder_linear_weight(weight)
    bias = draw.maybe(lambda: draw.tensor(outputs) * 0.2)
    return Layer(given, None if bias is None else opaque(draw, bias), weight)


def draw_norm(draw: Draw, width: int) -> Norm:
    affine = draw.dtype if draw.random.random() < 0.5 else torch.float32
    return Norm(*(opaque(draw, draw.tensor(width, dtype=affine)) for _ in Norm._fields))


def draw_stream(draw: Draw) -> Stream:
    heads, per_head = 1 + draw.size(3), 1 + draw.size(30)
    num_rows, width = draw.size(), heads * per_head
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    cu = draw.offsets(draw.size(4), num_rows if rows is None else len(rows))
    told = heads if not draw.spoilt() else draw.random.choice((0, -1, heads + 1, 2**62))
    return Stream(opaque(draw, draw.tensor(num_rows, width)), rows, cu, draw.longest(cu), told)


def draw_hidden(draw: Draw) -> int:
    return 0 if draw.random.random() < 0.05 else 1 + draw.size(60)


def opaque(draw: Draw, t: Tensor) -> Tensor:
    """Where only a weight may be, a tensor in oneDNN's own layout: it has no strides."""
    fits = t.dtype in onednn_dtypes() and t.dim() > 0 and t.numel() > 0
    return t.to_mkldnn() if fits and draw.spoilt() else t


def dense(t: Tensor) -> Tensor:
    """A copy that no call can write to."""
    return t.to_dense() if t.is_mkldnn else t.clone()


def in_place(operator: Any, x: Tensor, *args: Any) -> Any:
    """Call it; what it refuses it must not have touched."""
    before = dense(x)
    try:
        return operator(x, *args)
    except REFUSALS:
        assert torch.equal(dense(x), before), f"{operator} refused after it had written into x"
        raise


def attended(s: Stream, x: Tensor, norm: Norm, qkv: Layer, proj: Layer, scores: int) -> tuple[Tensor, Tensor]:
    """What the attention half means."""
    h = gather_layer_norm(x, s.rows, *norm, EPS)[0]
    tokens, width = h.shape
    q, k, v = F.linear(h, qkv.weight, qkv.bias).reshape(tokens, 3, s.heads, width // s.heads).unbind(1)
    offsets = s.cu_seqlens, s.cu_seqlens, s.longest, s.longest
    out, _, received = varlen_attention(q, k, v, *offsets, SCALE, None, scores)
    y = F.linear(out.reshape(tokens, width), proj.weight, proj.bias)
    return scatter_residual(x, s.rows, y, None), received


def fed(s: Stream, x: Tensor, norm: Norm, fc1: Layer, fc2: Layer) -> Tensor:
    """What the MLP half means."""
    h = gather_layer_norm(x, s.rows, *norm, EPS)[0]
    y = F.linear(F.gelu(F.linear(h, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)
    return scatter_residual(x, s.rows, y, None)


def case_feed_forward_half(draw: Draw) -> tuple[Any, Any]:
    s, hidden = draw_stream(draw), draw_hidden(draw)
    width = s.x.shape[-1]
    norm, fc1, fc2 = draw_norm(draw, width), draw_layer(draw, width, hidden), draw_layer(draw, hidden, width)
    before = dense(s.x)
    in_place(native.feed_forward_half_, s.x, s.rows, *norm, EPS, *fc1[:2], *fc2[:2])
    return s.x, lambda: fed(s, before, norm, fc1, fc2)


def case_attention_half(draw: Draw) -> tuple[Any, Any]:
    s, scores = draw_stream(draw), draw.random.choice((0, 1, 2, 3 if draw.spoilt() else 0))
    width = s.x.shape[-1]
    norm, qkv, proj = draw_norm(draw, width), draw_layer(draw, width, 3 * width), draw_layer(draw, width, width)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, *norm, EPS, *qkv[:2], s.heads, SCALE, scores, *proj[:2]
    received = in_place(native.attention_half_, s.x, *first)
    return (s.x, received), lambda: attended(s, before, norm, qkv, proj, scores)


def case_block(draw: Draw) -> tuple[Any, Any]:
    s, hidden = draw_stream(draw), draw_hidden(draw)
    width = s.x.shape[-1]
    norm1, qkv, proj = draw_norm(draw, width), draw_layer(draw, width, 3 * width), draw_layer(draw, width, width)
    norm2, fc1, fc2 = draw_norm(draw, width), draw_layer(draw, width, hidden), draw_layer(draw, hidden, width)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, *norm1, EPS, *qkv[:2], s.heads, SCALE, *proj[:2]
    in_place(native.block_, s.x, *first, *norm2, EPS, *fc1[:2], *fc2[:2])
    return s.x, lambda: fed(s, attended(s, before, norm1, qkv, proj, 0)[0], norm2, fc1, fc2)


BLOCKS = {
    "attention_half_": case_attention_half,
    "feed_forward_half_": case_feed_forward_half,
    "block_": case_block,
}
