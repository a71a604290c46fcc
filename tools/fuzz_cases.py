"""One drawn call of one native operator: it raises in words, or agrees with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzz_blocks import BLOCKS, EPS, Layer, dense, draw_layer, draw_norm, draw_panels, in_place
from fuzz_draw import REFUSALS, Draw
from fuzz_predictor import case_tail_predictor
from torch import Tensor
from torch.nn import functional as F

import mtvit_ops
from mtvit_ops.reference import (
    gather_layer_norm,
    ragged_linear,
    ragged_patch_embed,
    scatter_residual,
    slow_fast,
    token_select,
    varlen_attention,
)

# a wrong element is off by its own size; rounding in half dtypes by less than this share of the largest value
ROUGHLY = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}

if not mtvit_ops.available_backends()["cpp"].available:
    raise SystemExit(mtvit_ops.available_backends()["cpp"].reason)
native = torch.ops.mtvit_ops_cpp


def attention_arguments(draw: Draw) -> tuple[Any, ...]:
    batch, heads, d = draw.size(5), draw.size(4), draw.size(70)
    dv = d if draw.random.random() < 0.6 else draw.size(70)
    nq, nk = draw.size(90), draw.size(90)
    same = draw.random.random() < 0.5
    if same and dv == d:
        q, k, v = (
            draw.tensor(nq, 3, heads, d).unbind(1) if draw.bad == 0 else (draw.tensor(nq, heads, d) for _ in "qkv")
        )
    else:
        nk = nq if same else nk
        q, k, v = draw.tensor(nq, heads, d), draw.tensor(nk, heads, d), draw.tensor(nk, heads, dv)
    cu_q = draw.offsets(batch, len(q) if q.dim() else 0)
    cu_k = cu_q if same else draw.offsets(batch, nk)
    keys = k.shape[0] if k.dim() else 0
    bias = draw.maybe(lambda: draw.tensor(keys) if draw.random.random() < 0.5 else draw.tensor(keys, heads))
    if bias is not None and bias.numel() and bias.is_floating_point() and draw.random.random() < 0.3:
        bias = bias.clone()
        bias.reshape(-1)[draw.random.randrange(bias.numel())] = -torch.inf
    return q, k, v, cu_q, cu_k, draw.longest(cu_q), draw.longest(cu_k), draw.random.choice((0.0, 0.125, 1.0)), bias


def case_varlen_attention(draw: Draw) -> tuple[Any, Any]:
    args = (*attention_arguments(draw), draw.random.choice((0, 1, 2, 3 if draw.spoilt() else 0)))
    return native.varlen_attention(*args), lambda: varlen_attention.varlen_attention(*args)


def case_varlen_attention_backward(draw: Draw) -> tuple[Any, Any]:
    q, k, v, *rest = attention_arguments(draw)
    out, lse, _ = native.varlen_attention(q, k, v, *rest, 0)
    grad = draw.tensor(*out.shape)
    args = (grad, q, k, v, out, lse if not draw.spoilt() else draw.tensor(*lse.shape), *rest)
    got = native.varlen_attention_backward(*args)
    # with another lse it only must not fail
    return got, (lambda: varlen_attention.varlen_attention_backward(*args)) if args[5] is lse else None


def case_gather_layer_norm(draw: Draw) -> tuple[Any, Any]:
    num_rows, d = draw.size(), draw.size(100)
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    affine = draw.dtype if draw.random.random() < 0.5 else torch.float32
    args = draw.tensor(num_rows, d), rows, draw.tensor(d, dtype=affine), draw.tensor(d, dtype=affine), 1e-6
    got = native.gather_layer_norm(*args)
    # rows without a channel have no statistics
    kept = slice(None) if got[0].shape[-1] else slice(1)
    return got[kept], lambda: gather_layer_norm.gather_layer_norm(*args)[kept]


def case_scatter_residual(draw: Draw) -> tuple[Any, Any]:
    num_rows, d = draw.size(), draw.size(100)
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    tokens = num_rows if rows is None else len(rows)
    scale = draw.maybe(lambda: draw.tensor(d) if draw.random.random() < 0.5 else draw.tensor(tokens, 1))
    x, y = draw.tensor(num_rows, d), draw.tensor(tokens, d)
    if draw.random.random() < 0.1 and rows is not None and x.dim() == 2 and len(rows) <= len(x):
        y = x[: len(rows)]  # lies in the memory being written
    expected = scatter_residual.scatter_residual(x, rows, y, scale) if draw.bad == 0 else None
    native.scatter_residual_(x, rows, y, scale)
    return x, None if expected is None else (lambda: expected)


def case_token_select(draw: Draw) -> tuple[Any, Any]:
    batch, total = draw.size(6), draw.size(120)
    cu = draw.offsets(batch, total)
    lengths = cu.diff().tolist()
    prefix = draw.random.choice((0, 1, 2)) if not draw.spoilt() else -1
    scores = draw.tensor(total)
    if scores.numel() and draw.random.random() < 0.5 and scores.is_floating_point():
        scores = (scores * 2).round()  # ties
        if draw.random.random() < 0.3:
            scores.reshape(-1)[draw.random.randrange(scores.numel())] = torch.nan
    rows = draw.maybe(lambda: torch.randperm(total).int())
    rule = draw.random.randrange(4)
    mask = counts = threshold = None
    keep = -1
    if rule == 0:
        mask = torch.rand(total) < 0.5
    elif rule == 1:
        low = [min(max(prefix, 0), max(n, 0)) for n in lengths]
        counts = torch.tensor([draw.random.randint(a, max(a, n)) for a, n in zip(low, lengths)], dtype=torch.int32)
        if draw.spoilt() and len(counts):
            counts[0] = draw.random.choice((-1, 2**31 - 1))
    elif rule == 2:
        threshold = draw.random.choice((-1.0, 0.0, 0.5))
    else:
        keep = draw.random.randint(0, max([0, *lengths]))
    by_score, both = draw.random.random() < 0.5, draw.random.random() < 0.5
    capacity = total if not draw.spoilt() else draw.random.choice((-1, 0, total - 1))
    args = (scores, rows, cu, mask, counts, keep, threshold, prefix, by_score, capacity, both, total)
    got = native.token_select(*args)
    return got, lambda: token_select.token_select(*args, total)


def case_halting_step(draw: Draw) -> tuple[Any, Any]:
    batch, length, d = draw.size(4), 1 + draw.size(20), 1 + draw.size(20)
    num_rows = batch * length
    cu = torch.arange(batch + 1, dtype=torch.int32) * length if draw.bad == 0 else draw.offsets(batch, num_rows)
    rows = draw.maybe(lambda: torch.arange(num_rows, dtype=torch.int32)) if draw.bad == 0 else draw.rows(5, num_rows)
    state = [torch.rand(num_rows) for _ in range(3)]
    readout = torch.arange(batch, dtype=torch.int32) * length if not draw.spoilt() else draw.rows(batch, num_rows)
    counters, output = torch.zeros(num_rows, dtype=torch.int32), draw.tensor(len(readout), d, dtype=torch.float32)
    args = (draw.tensor(num_rows, d), rows, cu, readout, *state, counters, output, 5.0, 30.0, 0.01)
    native.halting_step(*args, draw.random.random() < 0.3)
    return (), None  # its meaning has tables of its own; here it only must not fail


def pack_patches(draw: Draw, weight: Tensor) -> Tensor:
    """A convolution's weight in panels, sometimes cut to what is none."""
    if weight.shape[0] % native.panel_columns() or draw.random.random() < 0.5:
        return weight
    packed = native.pack_panels(weight.flatten(1))
    return packed[:, : draw.random.randint(0, packed.shape[1])].contiguous() if draw.spoilt() else packed


def case_ragged_patch_embed(draw: Draw) -> tuple[Any, Any]:
    batch, channels, height, width = draw.size(4), 1 + draw.size(2), draw.size(20), draw.size(20)
    d = draw.random.choice((draw.size(12), 16, 32))
    prefix = draw.tensor(draw.size(2), d)
    images = draw.tensor(batch, channels, height, width)
    weights, biases, tables, strides, paddings = [], [], [], [], []
    for _ in range(draw.random.randint(1, 3)):
        kernel, stride, padding = 1 + draw.size(5), 1 + draw.size(5), draw.size(4)
        grid = [max((side + 2 * padding - kernel) // stride + 1, 0) for side in (height, width)]
        weights.append(draw.tensor(d, channels, kernel, kernel) * 0.2)
        biases.append(draw.tensor(d))
        tables.append(draw.tensor(len(prefix) + grid[0] * grid[1], d))
        strides.append(stride if not draw.spoilt() else draw.random.choice((0, -1, 2**62)))
        paddings.append(padding if not draw.spoilt() else draw.random.choice((-1, 2**62)))
    tails = torch.tensor([draw.random.randrange(len(weights)) for _ in range(batch)], dtype=torch.int32)
    if draw.spoilt() and batch:
        tails[-1] = draw.random.choice((-1, len(weights), 2**31 - 1))
    args = (images, tails, prefix, weights, biases, tables, strides, paddings)
    panels = draw_panels(draw)
    given = [pack_patches(draw, weight) if panels else weight for weight in weights]
    got = native.ragged_patch_embed(*args[:3], given, *args[4:], panels)
    return got, lambda: ragged_patch_embed.ragged_patch_embed(*args)


def linear_arguments(draw: Draw) -> tuple[Tensor, Layer, Tensor]:
    """The left factor, the layer and the offsets of a linear layer over ragged tokens."""
    outputs = draw.random.choice((draw.size(70), 32, 64))
    a = draw.tensor(draw.size(), draw.random.choice((draw.size(40), draw.size(600))))
    features = a.shape[1] if a.dim() > 1 else 1
    return a, draw_layer(draw, features, outputs, True), draw.offsets(draw.size(4), a.shape[0] if a.dim() else 0)


def case_linear(draw: Draw) -> tuple[Any, Any]:
    a, layer, _ = linear_arguments(draw)
    gelu = draw.random.random() < 0.5

    def expected() -> Tensor:
        bias = None if layer.bias is None else dense(layer.bias).float()
        y = F.linear(a.float(), layer.weight.float(), bias)
        return (F.gelu(y) if gelu else y).to(a.dtype)

    return native.linear(a, *layer[:2], gelu), expected


def case_ragged_linear(draw: Draw) -> tuple[Any, Any]:
    a, layer, cu = linear_arguments(draw)
    gelu = draw.random.random() < 0.5
    got = native.ragged_linear(a, *layer[:2], cu, gelu)
    return got, lambda: ragged_linear.ragged_linear(a, layer.weight, layer.bias, cu, gelu)


def case_ragged_linear_residual(draw: Draw) -> tuple[Any, Any]:
    a, layer, cu = linear_arguments(draw)
    tokens, outputs = a.shape[0] if a.dim() else 0, layer.weight.shape[0]
    num_rows = tokens + draw.size(5)
    x = draw.tensor(num_rows, outputs, dtype=draw.random.choice((draw.dtype, torch.float32)))
    rows = draw.maybe(lambda: torch.randperm(num_rows)[:tokens].int() if draw.bad == 0 else draw.rows(tokens, num_rows))
    scale = draw.maybe(lambda: draw.tensor(outputs) if draw.random.random() < 0.5 else draw.tensor(tokens, 1))
    before = dense(x)
    in_place(native.ragged_linear_residual_, x, rows, a, *layer[:2], cu, scale)
    rest = a, layer.weight, layer.bias, cu, scale
    return x, lambda: ragged_linear.ragged_linear_residual(before, rows, *rest)


def case_lives(draw: Draw) -> tuple[Any, Any]:
    width, length = draw.size(70), 0 if draw.spoilt() else 1 + draw.size(60)
    native.lives(draw.tensor(draw.size(3), length, width), draw.tensor(width, width), 0.5, 0.3, 4, 12)
    return (), None  # divided by how much scores differ, which may be next to nothing


def case_longest_lived(draw: Draw) -> tuple[Any, Any]:
    batch, width, length = draw.size(3), draw.size(70), 0 if draw.spoilt() else 1 + draw.size(60)
    most, budgets = length, []
    for _ in range(draw.size(3)):
        most = draw.random.randint(1, max(most, 1))
        budgets.append(most if not draw.spoilt() else draw.random.choice((0, -1, length + 1, 2**62)))
    schedule = draw.tensor(width, width), 0.5, 0.3, 4, 12
    x = draw.tensor(batch, length, width)
    lives, rows, ends = native.longest_lived(x, *schedule, budgets)
    batch, length = x.shape[:2]  # it may have been spoilt, and still be one
    offsets = torch.arange(batch + 1, dtype=torch.int32) * length

    def expected() -> Any:  # from the lives there are: those of the reference may be in another order
        scores = F.pad(lives, (1, 0)).reshape(-1)
        lists = [
            token_select.token_select(
                *(scores, None, offsets, None, None, budget, None, 1, True, batch * budget, False, 0, length)
            )
            for budget in budgets
        ]
        empty = rows.new_empty(0), ends.new_empty(0, batch + 1)
        return torch.cat([empty[0], *(one[0] for one in lists)]), torch.cat(
            [empty[1], *(one[1][None] for one in lists)]
        )

    return (rows, ends), expected


def case_mean_patches(draw: Draw) -> tuple[Any, Any]:
    batch, length = draw.size(4), 1 + draw.size(40)
    prefix = min(draw.size(2), length)
    x = draw.tensor(batch * length, draw.size(70))
    images = batch if not draw.spoilt() else draw.random.choice((-1, 0, batch + 1, 2**62))

    def expected() -> Tensor:
        patches = x.float().reshape(images, -1 if x.numel() else length, x.shape[1])[:, prefix:]
        return (patches.sum(dim=1) / max(patches.shape[1], 1)).to(x.dtype)

    return native.mean_patches(x, images, prefix), expected


def case_classify(draw: Draw) -> tuple[Any, Any]:
    x, layer, cu = linear_arguments(draw)
    offsets = draw.maybe(lambda: cu)
    if draw.bad == 0 and bool((cu[:-1] >= x.shape[0]).any()):  # an image behind the last row: refused
        offsets = None
    norm = draw_norm(draw, x.shape[1] if x.dim() > 1 else 1)
    got = native.classify(x, offsets, *norm, EPS, *layer[:2])

    def expected() -> Tensor:
        rows = None if offsets is None else offsets[:-1]
        normed = gather_layer_norm.gather_layer_norm(x, rows, *norm, EPS)[0]
        bias = None if layer.bias is None else dense(layer.bias).float()
        return F.linear(normed.float(), layer.weight.float(), bias).to(x.dtype)

    return got, expected


def case_pack_run(draw: Draw) -> tuple[Any, Any]:
    columns = native.panel_columns()
    weights = [draw.tensor(columns * draw.size(3), draw.size(40)) for _ in range(1 + draw.size(3))]
    return native.pack_run(weights), lambda: torch.cat([native.pack_panels(weight).flatten() for weight in weights])


def case_evolve_scores(draw: Draw) -> tuple[Any, Any]:
    num_rows = draw.size()
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    received = draw.tensor(num_rows if rows is None else len(rows), draw.size(5), dtype=torch.float32)
    score = draw.tensor(num_rows, dtype=torch.float32)
    got = native.evolve_scores(received, score, rows, 0.3)
    live = torch.arange(len(score)) if rows is None else rows.long()
    sums, known = received.sum(dim=1), live >= 0
    return got, lambda: score.index_copy(0, live[known], torch.lerp(score[live[known]], sums[known], 0.3))


def case_slow_fast_merge(draw: Draw) -> tuple[Any, Any]:
    num_rows = draw.size()
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    tokens = num_rows if rows is None else len(rows)
    weights = draw.tensor(tokens, dtype=draw.random.choice((draw.dtype, torch.float32))).abs()
    offsets = draw.offsets(draw.size(5), tokens)
    args = draw.tensor(num_rows, draw.size(100)), weights, rows, offsets, draw.longest(offsets)
    normalize = draw.random.random() < 0.5
    return native.slow_fast_merge(*args, normalize), lambda: slow_fast.slow_fast_merge(*args, normalize)


def case_slow_fast_update(draw: Draw) -> tuple[Any, Any]:
    num_rows, d, batch = draw.size(), draw.size(100), draw.size(5)
    rows = draw.maybe(lambda: draw.rows(draw.size(), num_rows))
    offsets = draw.offsets(batch, num_rows if rows is None else len(rows))
    args = draw.tensor(num_rows, d), rows, offsets, draw.longest(offsets), draw.tensor(batch, d)
    return native.slow_fast_update(*args), lambda: slow_fast.slow_fast_update(*args)


CASES = {
    "slow_fast_merge": case_slow_fast_merge,
    "slow_fast_update": case_slow_fast_update,
    "linear": case_linear,
    "ragged_linear": case_ragged_linear,
    "ragged_linear_residual_": case_ragged_linear_residual,
    "lives": case_lives,
    "longest_lived": case_longest_lived,
    "mean_patches": case_mean_patches,
    "classify": case_classify,
    "pack_run": case_pack_run,
    "evolve_scores": case_evolve_scores,
    "tail_predictor": case_tail_predictor,
    "ragged_patch_embed": case_ragged_patch_embed,
    "varlen_attention": case_varlen_attention,
    "varlen_attention_backward": case_varlen_attention_backward,
    "gather_layer_norm": case_gather_layer_norm,
    "scatter_residual_": case_scatter_residual,
    "token_select": case_token_select,
    "halting_step": case_halting_step,
    **BLOCKS,
}


def run(seed: int, only: str | None = None, say: Callable[[str], Any] = lambda _: None) -> str:
    """Draw and run one case, of the operator ``only`` if that is given; returns the operator and what came of it."""
    draw = Draw(seed)
    name = draw.random.choice([only] if only else list(CASES))
    say(f"{name}, dtype {draw.dtype}, bad {draw.bad}")
    try:
        got, expected = CASES[name](draw)
    except REFUSALS as error:
        say(f"refused: {str(error).splitlines()[0]}")
        if draw.bad == 0 and not _is_expected(str(error)):
            raise
        return f"{name} refused"
    if expected is None:
        return f"{name} ran"
    try:
        wanted = expected()
    except REFUSALS as error:  # the reference may refuse what the kernel can do
        say(f"the reference refused: {error}")
        return f"{name} ran"
    for place, (g, w) in enumerate(zip(_tuple(got), _tuple(wanted))):
        _compare(f"{name}, result {place}", g, w)
    return f"{name} agreed"


def _is_expected(message: str) -> bool:
    """What good draws may run into: a layout that cannot be written, a count no image has, a dtype the CPU lacks."""
    parts = (
        "must not overlap",
        "contiguous in its last",
        "keep must lie in",
        "oneDNN linear refused",
        "as large as tail",
        "at least one feature",
    )
    return any(part in message for part in parts)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _compare(name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    assert got.dtype == want.dtype, f"{name}: expected {want.dtype}, got {got.dtype}"
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{name}: expected {want}, got {got}"
        return
    finite = want.isfinite()
    if not finite.any():
        return
    size = max(want[finite].abs().max().item(), 1.0)
    off = (got.double() - want.double())[finite].abs().max().item()
    assert off <= ROUGHLY.get(got.dtype, 1e-3) * size, f"{name}: off by {off} where values reach {size}"
