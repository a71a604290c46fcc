"""Attention beside PyTorch's own, packed and dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_case import OpCase, Run, Sizes
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import ops
from mtvit_ops.reference import class_attention as class_reference
from mtvit_ops.testing import offsets, packed_qkv


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
