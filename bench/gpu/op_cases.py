"""What the op benchmark compares: our ops and what plain PyTorch offers for the same, at DeiT-S in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import RaggedTokens, ops
from mtvit_ops.reference import class_attention as class_reference
from mtvit_ops.reference import halting_step as halting_reference
from mtvit_ops.reference import slow_fast as slow_fast_reference
from mtvit_ops.testing import offsets, packed_qkv, random_lengths, random_tensor

Run = Callable[[], Any]


class Sizes(NamedTuple):
    """A batch of DeiT-S, half of it alive."""

    device: torch.device
    batch: int = 256
    tokens: int = 197
    heads: int = 6
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"

    @property
    def dim(self) -> int:
        return 64 * self.heads

    @property
    def kept(self) -> int:
        return 1 + self.tokens // 2

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return random_tensor(*shape, dtype=dtype or self.dtype, device=self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=self.backend)


class OpCase(NamedTuple):
    """Candidates that compute the same; the first is ours."""

    op: str
    case: str
    runs: dict[str, Run]
    exact: Run  # the truth, in float64 where there are floats
    plain: Run  # plain PyTorch in the tested dtype, whose error is the allowance
    bytes: int  # that must move
    flops: int = 0


def cases(sizes: Sizes) -> Iterator[Callable[[], OpCase]]:
    """Makers, in order of worth."""
    longest = sizes.tokens
    for tokens in (longest, sizes.kept, 1 + longest // 4):
        yield lambda tokens=tokens: attention(sizes, [tokens] * sizes.batch, f"{tokens} tokens")
    lengths = random_lengths(sizes.batch, round(0.7 * longest), round(0.3 * longest))
    yield lambda: attention(sizes, lengths, f"{min(lengths)} to {max(lengths)} tokens")
    yield from (lambda make=make: make(sizes) for make in (layer_norm, residual, selection, halting, merging, updating))
    yield lambda: class_row(sizes)
    yield lambda: attention_gradient(sizes, [longest] * sizes.batch)


def packed_baseline(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # no kernel for the CPU

    return varlen_attn(q, k, v, cu, cu, longest, longest)


def explicit(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Padded logits, softmax and product in the inputs' own dtype."""
    from mtvit_ops.reference._segments import to_packed, to_padded

    (queries, _), (keys, valid), (values, _) = (to_padded(each, cu, longest) for each in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * q.shape[2] ** -0.5
    weights = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(dim=-1)
    return to_packed(torch.einsum("bhqk,bkhd->bqhd", weights, values), cu, len(q))


def attention(sizes: Sizes, lengths: list[int], case: str) -> OpCase:
    total, longest = sum(lengths), max(lengths)
    q, k, v = packed_qkv(total, sizes.heads, 64, sizes.dtype, sizes.device)
    cu = offsets(lengths, sizes.device)
    args = q, k, v, cu, longest
    runs: dict[str, Run] = {
        "ours": lambda: ops.varlen_attention(*args),
        "ours, class scores": lambda: ops.varlen_attention(*args, scores="class")[0],
        "ours, mean scores": lambda: ops.varlen_attention(*args, scores="mean")[0],
        "varlen_attn": lambda: packed_baseline(*args),
    }
    if len(set(lengths)) == 1:
        dense = [each.unflatten(0, (len(lengths), longest)).transpose(1, 2) for each in (q, k, v)]
        runs["dense SDPA"] = lambda: F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)
    return OpCase(
        "varlen_attention",
        case,
        runs,
        lambda: explicit(q.double(), k.double(), v.double(), cu, longest),
        lambda: explicit(*args),
        bytes=4 * total * sizes.dim * q.element_size(),
        flops=sum(4 * length**2 * sizes.dim for length in lengths),
    )


def attention_gradient(sizes: Sizes, lengths: list[int]) -> OpCase:
    total, longest = sum(lengths), max(lengths)
    leaves = [sizes.random(total, sizes.heads, 64).requires_grad_() for _ in range(3)]
    grad, cu = sizes.random(total, sizes.heads, 64), offsets(lengths, sizes.device)

    def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(function(*inputs, cu, longest), inputs, grad.to(inputs[0].dtype))

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return OpCase(
        "varlen_attention, forward and backward",
        f"{longest} tokens",
        {
            "ours": lambda: gradients(ops.varlen_attention, *leaves),
            "varlen_attn": lambda: gradients(packed_baseline, *leaves),
        },
        lambda: gradients(explicit, *wide),
        lambda: gradients(explicit, *leaves),
        bytes=12 * total * sizes.dim * grad.element_size(),
        flops=sum(14 * length**2 * sizes.dim for length in lengths),
    )


def half(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, D), and rows and offsets of a random half of each image's tokens."""
    everyone = RaggedTokens.from_dense(sizes.random(sizes.batch, sizes.tokens, sizes.dim))
    scores = sizes.random(len(everyone.x), dtype=torch.float32)
    kept = ops.token_select(scores, None, everyone.cu_seqlens, keep=sizes.kept, num_prefix_tokens=1)
    return everyone.x, kept.rows, kept.cu_seqlens


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


def class_row(sizes: Sizes) -> OpCase:
    total = sizes.batch * sizes.tokens
    _, k, _ = packed_qkv(total, sizes.heads, 64, sizes.dtype, sizes.device)
    q, cu = sizes.random(sizes.batch, sizes.heads, 64), offsets([sizes.tokens] * sizes.batch, sizes.device)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return class_reference.class_attention(q, k, cu, sizes.tokens, 0.125, None)

    return OpCase(
        "class_attention",
        f"{sizes.tokens} tokens",
        {
            "ours": lambda: ops.class_attention(q, k, cu, sizes.tokens, scale=0.125),
            "reference": lambda: plain(q, k),
        },
        lambda: plain(q.double(), k.double()),
        lambda: plain(q, k),
        bytes=total * sizes.heads * (64 * k.element_size() + 4),
    )
