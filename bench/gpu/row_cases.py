"""Ops on rows beside what plain PyTorch offers for the same, eager and compiled."""

from __future__ import annotations

import torch
from op_case import OpCase, Run, Sizes, half
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import ops
from mtvit_ops.reference import halting_step as halting_reference
from mtvit_ops.reference import slow_fast as slow_fast_reference
from mtvit_ops.testing import offsets


def layer_norm(sizes: Sizes) -> OpCase:
    x, rows, _ = half(sizes)
    weight, bias = sizes.random(sizes.dim), sizes.random(sizes.dim)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x[rows], x.shape[1:], weight, bias, 1e-6)

    compiled = sizes.compiled(plain)
    return OpCase(
        "gather_layer_norm",
        "half",
        {
            "ours": lambda: ops.gather_layer_norm(x, rows, weight, bias),
            "eager": lambda: plain(x, weight, bias),
            "compiled": lambda: compiled(x, weight, bias),
        },
        lambda: plain(x.double(), weight.double(), bias.double()),
        lambda: plain(x, weight, bias),
        bytes=2 * len(rows) * sizes.dim * x.element_size(),
    )


def residual(sizes: Sizes) -> OpCase:
    start, rows, _ = half(sizes)
    y, x = sizes.random(len(rows), sizes.dim), start.clone()

    def ours() -> Tensor:
        ops.scatter_residual_(x, rows, y)
        return x

    def plain(x: Tensor) -> Tensor:
        return x.index_add_(0, rows, y.to(x.dtype))

    compiled = sizes.compiled(plain)
    return OpCase(
        "scatter_residual_",
        "half",
        {"ours": ours, "eager": lambda: plain(x), "compiled": lambda: compiled(x)},
        lambda: plain(x.double()),
        lambda: plain(x.clone()),
        bytes=3 * len(rows) * sizes.dim * y.element_size(),
    )


def selection(sizes: Sizes) -> OpCase:
    total = sizes.batch * sizes.tokens
    scores, cu = torch.randperm(total, device=sizes.device).float(), offsets([sizes.tokens] * sizes.batch, sizes.device)

    def plain(scores: Tensor) -> Tensor:
        patches = scores.unflatten(0, (sizes.batch, sizes.tokens))[:, 1:].topk(sizes.kept - 1).indices.sort().values
        local = F.pad(patches + 1, (1, 0))
        return (local + sizes.tokens * torch.arange(sizes.batch, device=scores.device)[:, None]).flatten().int()

    compiled = sizes.compiled(plain)
    return OpCase(
        "token_select",
        f"{sizes.kept} of {sizes.tokens}",
        {
            "ours": lambda: ops.token_select(scores, None, cu, keep=sizes.kept, num_prefix_tokens=1).rows,
            "eager": lambda: plain(scores),
            "compiled": lambda: compiled(scores),
        },
        lambda: plain(scores),
        lambda: plain(scores),
        bytes=4 * (total + sizes.batch * sizes.kept),
    )


def halting(sizes: Sizes) -> OpCase:
    x, rows, cu = half(sizes)
    readout = torch.arange(sizes.batch, dtype=torch.int32, device=sizes.device) * sizes.tokens
    state = ops.initial_halting_state(x, readout)
    gate = {"gate_scale": 1.0, "gate_center": 1.0}

    def plain(x: Tensor) -> Tensor:
        wide = (
            value.to(x.dtype) if x.dtype == torch.float64 and value.is_floating_point() else value for value in state
        )
        return halting_reference.halting_step(x, rows, cu, readout, *wide, 1.0, 1.0, 0.01, False)[5]

    compiled = sizes.compiled(plain)
    return OpCase(
        "halting_step",
        "half",
        {
            "ours": lambda: ops.halting_step(x, rows, cu, readout, state, **gate).scores,
            "reference": lambda: plain(x),
            "reference, compiled": lambda: compiled(x),
        },
        lambda: plain(x.double()),
        lambda: plain(x),
        # four sums read and written, the scores, two lists, a sector of 32 bytes of each live row
        bytes=36 * len(x) + (8 + 32) * len(rows) + 8 * sizes.batch * sizes.dim,
    )


def merging(sizes: Sizes) -> OpCase:
    x, rows, cu = half(sizes)
    weights = sizes.random(len(rows), dtype=torch.float32).abs()

    def plain(x: Tensor) -> Tensor:
        return slow_fast_reference.slow_fast_merge(x, weights.to(x.dtype), rows, cu, sizes.kept, True)

    compiled = sizes.compiled(plain)
    return OpCase(
        "slow_fast_merge",
        "half",
        {
            "ours": lambda: ops.slow_fast_merge(x, weights, rows, cu, sizes.kept),
            "reference": lambda: plain(x),
            "reference, compiled": lambda: compiled(x),
        },
        lambda: plain(x.double()),
        lambda: plain(x),
        bytes=len(rows) * (sizes.dim * x.element_size() + 8),
    )


def updating(sizes: Sizes) -> OpCase:
    x, rows, cu = half(sizes)
    increment = sizes.random(sizes.batch, sizes.dim)

    def plain(x: Tensor) -> Tensor:
        return slow_fast_reference.slow_fast_update(x, rows, cu, sizes.kept, increment.to(x.dtype))

    compiled = sizes.compiled(plain)
    return OpCase(
        "slow_fast_update",
        "half",
        {
            "ours": lambda: ops.slow_fast_update(x, rows, cu, sizes.kept, increment),
            "reference": lambda: plain(x),
            "reference, compiled": lambda: compiled(x),
        },
        lambda: plain(x.double()),
        lambda: plain(x),
        bytes=2 * x.numel() * x.element_size(),  # a new x
    )


def residual_norm(sizes: Sizes) -> OpCase:
    start, rows, _ = half(sizes)
    y, weight, bias = sizes.random(len(rows), sizes.dim), sizes.random(sizes.dim), sizes.random(sizes.dim)

    def plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        new = x.index_add(0, rows, y)
        return new, F.layer_norm(new[rows], x.shape[1:], weight, bias, 1e-6)

    compiled = sizes.compiled(plain)
    args = start, y, weight, bias
    return OpCase(
        "scatter_residual_layer_norm",
        "half, a new x",
        {
            "ours": lambda: ops.scatter_residual_layer_norm(start, rows, y, weight, bias),
            "eager": lambda: plain(*args),
            "compiled": lambda: compiled(*args),
        },
        lambda: plain(*(value.double() for value in args)),
        lambda: plain(*args),
        # x copied, then half of it read and written again, y read and the normed rows written
        bytes=(2 * start.numel() + 4 * y.numel()) * y.element_size(),
    )


def linear(sizes: Sizes, name: str, wide: int, deep: int, live: float) -> OpCase:
    """A linear layer over the live rows of a buffer: PyTorch's own multiplies as many rows, and all of the buffer."""
    capacity = sizes.batch * sizes.tokens
    count, gelu = round(live * capacity), name.endswith("GELU")
    a, weight, bias = sizes.random(capacity, deep), sizes.random(wide, deep), sizes.random(wide)
    a[count:] = 0
    cu = offsets([count], sizes.device)
    alive = (torch.arange(capacity, device=sizes.device) < count)[:, None]

    def layer(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(a, weight, bias)
        return F.gelu(out) if gelu else out

    def plain(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer(a, weight, bias)[:count]

    runs: dict[str, Run] = {
        "ours": lambda: ops.ragged_linear(a, weight, bias, cu, activation="gelu" if gelu else None)[:count],
        "cuBLAS, live rows known": lambda: layer(a[:count], weight, bias),
        "cuBLAS, all rows": lambda: plain(a, weight, bias),
        "cuBLAS, all rows, masked": lambda: layer(a, weight, bias).where(alive, 0)[:count],
    }
    if gelu:
        compiled = sizes.compiled(layer)
        runs["compiled, live rows known"] = lambda: compiled(a[:count], weight, bias)
    return OpCase(
        "ragged_linear",
        f"{name}, {live:.0%} of {capacity} rows alive",
        runs,
        lambda: plain(a.double(), weight.double(), bias.double()),
        lambda: plain(a, weight, bias),
        bytes=(count * (deep + wide) + wide * deep) * a.element_size(),
        flops=2 * count * deep * wide,
    )


def linear_residual(sizes: Sizes) -> OpCase:
    """The MLP's second layer onto the residual stream of the live half."""
    start, rows, cu = half(sizes)
    deep = 4 * sizes.dim
    x, a = start.clone(), sizes.random(len(rows), deep)
    weight, bias = sizes.random(sizes.dim, deep) / deep**0.5, sizes.random(sizes.dim)

    def plain(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.index_add_(0, rows, F.linear(a, weight, bias))

    compiled = sizes.compiled(plain)
    return OpCase(
        "ragged_linear_residual_",
        "fc2, half",
        {
            "ours": lambda: ops.ragged_linear_residual_(x, rows, a, weight, bias, cu),
            "cuBLAS and ours": lambda: ops.scatter_residual_(x, rows, F.linear(a, weight, bias)),
            "eager": lambda: plain(x, a, weight, bias),
            "compiled": lambda: compiled(x, a, weight, bias),
        },
        lambda: plain(*(value.double() for value in (x, a, weight, bias))),
        lambda: plain(x.clone(), a, weight, bias),
        bytes=(len(rows) * (deep + 2 * sizes.dim) + weight.numel()) * a.element_size(),
        flops=2 * len(rows) * deep * sizes.dim,
    )
