"""Drawn calls of the operators that are a transformer block, or half of one, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fuzz_draw import DTYPES, REFUSALS, Draw
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops._cpu_linear import onednn_dtypes
from mtvit_ops.reference.gather_layer_norm import gather_layer_norm
from mtvit_ops.reference.scatter_residual import scatter_residual
from mtvit_ops.reference.varlen_attention import varlen_attention

native = torch.ops.mtvit_ops_cpp
SCALE = 0.25
EPS = 0.1  # of layer norms: two features that are nearly equal would become +1 and -1, whichever rounding made larger


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


def draw_layer(draw: Draw, inputs: int, outputs: int, panels: bool = False) -> Layer:
    weight = draw.tensor(outputs, inputs) * 0.2  # small enough that sums do not leave the dtype
    given = weight
    fits = weight.dim() == 2 and weight.dtype in (DTYPES if panels else onednn_dtypes())
    if fits and draw.random.random() < 0.4:
        if not panels and weight.numel() > 0:
            given = torch.ops.mkldnn._reorder_linear_weight(weight)
        elif panels and weight.shape[0] % native.panel_columns() == 0:
            given = native.pack_panels(weight)
    if panels and draw.spoilt():
        given = draw.tensor(1, inputs, draw.random.choice((native.panel_columns(), 3)))
        weight = unpacked(given) if given.dim() == 3 else given  # it may fit
    bias = draw.maybe(lambda: draw.tensor(outputs) * 0.2)
    return Layer(given, None if bias is None else opaque(draw, bias), weight)


def unpacked(panels: Tensor) -> Tensor:
    """The weight (N, K) whose panels these are."""
    count, inputs, columns = panels.shape
    if native.isa() == "avx512bf16" and panels.dtype is torch.bfloat16 and inputs % 2 == 0:  # lies in pairs
        panels = panels.reshape(count, inputs // 2, columns, 2).transpose(2, 3).reshape(panels.shape)
    return panels.transpose(1, 2).flatten(0, 1)


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
    return 0 if draw.random.random() < 0.05 else draw.random.choice((1 + draw.size(60), 32, 64))


def draw_panels(draw: Draw) -> bool:
    """Whose linear layers: ours, or oneDNN's."""
    return draw.random.random() < 0.5


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


def rounded(draw: Draw, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are as far off as the queries and keys that they come from."""
    return x, scores.to(draw.dtype)


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
    s, hidden, panels = draw_stream(draw), draw_hidden(draw), draw_panels(draw)
    width = s.x.shape[-1]
    norm, fc1 = draw_norm(draw, width), draw_layer(draw, width, hidden, panels)
    fc2 = draw_layer(draw, hidden, width, panels)
    before = dense(s.x)
    in_place(native.feed_forward_half_, s.x, s.rows, *norm, EPS, *fc1[:2], *fc2[:2], panels)
    return s.x, lambda: fed(s, before, norm, fc1, fc2)


def case_attention_half(draw: Draw) -> tuple[Any, Any]:
    s, panels = draw_stream(draw), draw_panels(draw)
    scores, width = draw_scores(draw), s.x.shape[-1]
    norm, qkv = draw_norm(draw, width), draw_layer(draw, width, 3 * width, panels)
    proj = draw_layer(draw, width, width, panels)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, *norm, EPS, *qkv[:2], s.heads, SCALE, scores, *proj[:2]
    received = in_place(native.attention_half_, s.x, *first, panels)
    return rounded(draw, s.x, received), lambda: rounded(draw, *attended(s, before, norm, qkv, proj, scores))


class Parts(NamedTuple):
    """What a block is made of."""

    norm1: Norm
    qkv: Layer
    proj: Layer
    norm2: Norm
    fc1: Layer
    fc2: Layer


def draw_parts(draw: Draw, width: int, hidden: int, panels: bool) -> Parts:
    qkv, proj = draw_layer(draw, width, 3 * width, panels), draw_layer(draw, width, width, panels)
    fc1, fc2 = draw_layer(draw, width, hidden, panels), draw_layer(draw, hidden, width, panels)
    return Parts(draw_norm(draw, width), qkv, proj, draw_norm(draw, width), fc1, fc2)


def draw_scores(draw: Draw) -> int:
    return draw.random.choice((0, 1, 2, 3 if draw.spoilt() else 0))


def block_of(s: Stream, x: Tensor, parts: Parts, scores: int = 0) -> tuple[Tensor, Tensor]:
    """What a block means."""
    y, received = attended(s, x, parts.norm1, parts.qkv, parts.proj, scores)
    return fed(s, y, parts.norm2, parts.fc1, parts.fc2), received


def case_block(draw: Draw) -> tuple[Any, Any]:
    s, hidden, panels = draw_stream(draw), draw_hidden(draw), draw_panels(draw)
    scores, parts = draw_scores(draw), draw_parts(draw, s.x.shape[-1], hidden, panels)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, *parts.norm1, EPS, *parts.qkv[:2], s.heads, SCALE, scores, *parts.proj[:2]
    received = in_place(native.block_, s.x, *first, *parts.norm2, EPS, *parts.fc1[:2], *parts.fc2[:2], panels)
    return rounded(draw, s.x, received), lambda: rounded(draw, *block_of(s, before, parts, scores))


class Run(NamedTuple):
    """Blocks, their weights as the operators get them, and those that run."""

    blocks: list[Parts]
    weights: list[Tensor]
    layout: tuple[int, ...]  # as in csrc/cpu/blocks.h


def draw_run(draw: Draw, s: Stream, panels: bool) -> Run:
    """A bias everywhere."""
    width, hidden = s.x.shape[-1], draw_hidden(draw)
    run = [draw_parts(draw, width, hidden, panels) for _ in range(draw.random.randint(1, 3))]
    layers = [
        part._replace(bias=part.weight.new_zeros(part.weight.shape[:1]) if part.bias is None else part.bias)
        for parts in run
        for part in parts
        if isinstance(part, Layer)
    ]
    filled = iter(layers)
    run = [Parts(*(part if isinstance(part, Norm) else next(filled) for part in parts)) for parts in run]
    weights = [tensor for parts in run for part in parts for tensor in part[:2]]
    columns = native.panel_columns()
    if not (panels and draw.bad == 0 and width % columns == 0 and hidden % columns == 0) and not draw.spoilt():
        return Run(run, weights[:-1] if draw.spoilt() else weights, ())
    # together
    first, last = sorted(draw.random.randint(0, len(run)) for _ in "ab")
    matrices = [part.weight for parts in run for part in parts if isinstance(part, Layer)]
    vectors = [
        part[index] for parts in run for part in parts for index in ((1,) if isinstance(part, Layer) else (0, 1))
    ]
    layout = first, last, hidden
    if draw.spoilt():
        layout = draw.random.choice(((), (first, last), (-1, last, hidden), (first, 2**62, hidden), (0, 0, 2**40)))
    packed = native.pack_run([dense(matrix) for matrix in matrices])
    return Run(run[first:last], [packed, torch.cat([dense(vector).float() for vector in vectors])], layout)


def case_blocks(draw: Draw) -> tuple[Any, Any]:
    s, panels = draw_stream(draw), draw_panels(draw)
    run = draw_run(draw, s, panels)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, run.weights, EPS, s.heads, SCALE, panels, run.layout
    in_place(native.blocks_, s.x, *first)

    def expected() -> Tensor:
        x = before
        for parts in run.blocks:
            x = block_of(s, x, parts)[0]
        return x

    return s.x, expected


def case_scored_blocks(draw: Draw) -> tuple[Any, Any]:
    s, panels = draw_stream(draw), draw_panels(draw)
    run = draw_run(draw, s, panels)
    tradeoffs = [draw.random.choice((-1.0, 0.0, 0.3, 1.0)) for _ in run.blocks]
    score = draw.tensor(s.x.shape[0] if s.x.dim() else 0, dtype=torch.float32)
    if draw.spoilt():
        tradeoffs.append(0.5)
    before = dense(s.x)
    first = s.rows, s.cu_seqlens, s.longest, run.weights, EPS, s.heads, SCALE, panels, run.layout, score, tradeoffs
    evolved = in_place(native.scored_blocks_, s.x, *first)

    def expected() -> tuple[Tensor, Tensor]:
        x, scores = before, score
        for parts, weight in zip(run.blocks, tradeoffs):
            x, received = block_of(s, x, parts, int(weight >= 0))
            if weight >= 0:
                scores = native.evolve_scores(received, scores, s.rows, weight)
        return rounded(draw, x, scores)

    return rounded(draw, s.x, evolved), expected


def case_halting_blocks(draw: Draw) -> tuple[Any, Any]:
    s, panels = draw_stream(draw), draw_panels(draw)
    cu = draw.offsets(draw.size(4), s.x.shape[0] if s.x.dim() else 0)  # everyone is alive
    s = s._replace(rows=None, cu_seqlens=cu, longest=draw.longest(cu))
    run = draw_run(draw, s, panels)
    first = s.cu_seqlens, s.longest, run.weights, EPS, s.heads, SCALE, panels, run.layout
    num_rows = s.x.shape[0] if s.x.dim() else 0
    # an image behind the last row has no class token to read out, and no block at all is refused
    well_formed = bool((cu[:-1] < num_rows).all()) and run.blocks
    try:
        in_place(native.halting_blocks_, s.x, *first, 5.0, draw.random.choice((0.0, 5.0, 30.0)), 0.01)
    except REFUSALS:
        if well_formed:
            raise
    return (), None  # blocks and step have tables of their own; here it only must not fail


BLOCKS = {
    "attention_half_": case_attention_half,
    "feed_forward_half_": case_feed_forward_half,
    "block_": case_block,
    "blocks_": case_blocks,
    "scored_blocks_": case_scored_blocks,
    "halting_blocks_": case_halting_blocks,
}
