"""class_attention against torch.softmax, image by image and head by head."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops.ops import class_attention
from mtvit_ops.testing import assert_matches_formula, offsets, packed_qkv, poison_behind, random_tensor, spans


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int = 2
    dim: int = 8
    bias: str | None = None  # "token": (T,), "head": (T, H)
    bias_float32: bool = False
    removed: tuple[int, ...] = ()  # keys with a bias of -inf (for "head": of the first head only)
    scale: float | None = None
    strided: bool = True  # k is a view of one (T, 3, H, d)
    dead: int = 0
    slack: int = 0


CASES = {
    "dense": Case((6, 6)),
    "B2-N197-d64": Case((197, 131), heads=3, dim=64),
    "odd-sizes": Case((17, 33, 5), heads=3, dim=13, bias="head"),
    "dim-1": Case((5, 3), heads=1, dim=1),
    "zero-length": Case((0, 4, 0, 0, 3, 0), bias="token"),
    "one-token": Case((1, 1)),
    "all-empty": Case((0, 0)),
    "all-empty-bias": Case((0, 0), bias="token"),
    "B0": Case(()),
    "B0-dead": Case((), dead=2, bias="head"),
    # NaN behind the live count
    "capacity": Case((4, 3), dead=5, bias="token"),
    "slack": Case((4, 3), slack=6),
    "token-bias": Case((7, 4), bias="token"),
    "float32-bias": Case((7, 4), bias="head", bias_float32=True),
    "removed-keys": Case((7, 4), bias="token", removed=(0, 5, 9)),
    "removed-in-one-head": Case((7, 4), bias="head", removed=(1, 10)),
    "removed-whole-image": Case((2, 4), bias="token", removed=(0, 1)),
    "scale": Case((7, 4), scale=1.5),
    "separate": Case((7, 4), strided=False),
    "one-key": Case((1,), heads=1),
    # around a power of two, to which the Triton kernel widens a row; a width that its slices do not divide
    "row-edges": Case((15, 16, 17), dim=16),
    "wide-head": Case((33, 300), heads=1, dim=100, bias="token"),
    # rows on both sides of what it keeps in registers (1024): one launch, then two, with runs that hold no key
    "longest-whole-row": Case((1024, 1023), heads=1, dim=20, bias="head"),
    "row-in-two": Case((3, 1025), heads=2, dim=17, bias="token", removed=tuple(range(3, 1027))),
    "row-in-three": Case((2049, 1024, 0), heads=1, dim=4, dead=1100, bias="token"),
    "removed-long-row": Case((1030, 2), heads=1, dim=3, bias="token", removed=tuple(range(1030))),
}


def formula(case: Case, q_class: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
    out = k.new_zeros(k.shape[0], case.heads)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    for image, span in enumerate(spans(case.lengths)):
        for head in range(case.heads):
            logits = k[span, head] @ q_class[image, head] * scale
            if key_bias is not None:
                logits = logits + (key_bias if case.bias == "token" else key_bias[:, head])[span]
            there = logits.detach() > -math.inf
            if there.any():
                index = torch.arange(span.start, span.stop, device=k.device)[there]
                out[index, head] = torch.softmax(logits[there], dim=0).to(out.dtype)
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_softmax(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    tokens, live = sum(case.lengths) + case.dead, sum(case.lengths)
    k = packed_qkv(tokens, case.heads, case.dim, dtype, device)[1]
    bias = None
    if case.bias is not None:
        shape = (tokens,) if case.bias == "token" else (tokens, case.heads)
        bias = random_tensor(*shape, dtype=torch.float32 if case.bias_float32 else dtype, device=device)
        for key in case.removed:
            (bias if case.bias == "token" else bias[:, 0])[key] = -math.inf
        poison_behind(bias, live)
    inputs = {
        "q_class": random_tensor(len(case.lengths), case.heads, case.dim, dtype=dtype, device=device),
        "k": poison_behind(k if case.strided else k.clone(), live),
        "key_bias": bias,
    }
    cu_seqlens, longest = offsets(case.lengths, device), max(case.lengths, default=0) + case.slack
    assert_matches_formula(
        lambda q_class, k, key_bias: class_attention(
            q_class, k, cu_seqlens, longest, scale=case.scale, key_bias=key_bias
        ),
        lambda **tensors: formula(case, **tensors),
        inputs,
    )


def test_probabilities_are_float32(backend: str, device: str, dtype: torch.dtype) -> None:
    k = random_tensor(3, 2, 8, dtype=dtype, device=device)
    got = class_attention(k[:1], k, offsets((3,), device), 3)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_any_strides(backend: str, device: str) -> None:
    """Queries, keys, bias and what comes back, each laid out the other way round."""
    q_class, k, bias = (random_tensor(*shape, device=device) for shape in ((8, 3, 2), (8, 3, 9), (3, 9)))
    grad = random_tensor(3, 9, device=device)
    results = []
    for contiguous in (True, False):
        inputs = [tensor.permute(*range(tensor.dim())[::-1]) for tensor in (q_class, k, bias, grad)]
        *leaves, incoming = (tensor.contiguous() if contiguous else tensor for tensor in inputs)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = class_attention(*leaves[:2], offsets((4, 5), device), 5, key_bias=leaves[2])
        results.append((out, *torch.autograd.grad(out, leaves, incoming)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)  # float32; the reference may add in another order


def good() -> dict:
    return {
        "q_class": torch.zeros(2, 2, 8),
        "k": torch.zeros(5, 2, 8),
        "cu_seqlens": offsets((2, 3)),
        "max_seqlen": 3,
    }


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "q-rank": ({"q_class": torch.zeros(2, 16)}, ValueError, "q_class must have shape"),
    "q-integer": ({"q_class": torch.zeros(2, 2, 8).int()}, TypeError, "q_class must have dtype"),
    "k-head-size": ({"k": torch.zeros(5, 2, 4)}, ValueError, r"k must have shape \(T, 2, 8\)"),
    "k-dtype": ({"k": torch.zeros(5, 2, 8).half()}, TypeError, "k must have dtype float32"),
    "k-device": ({"k": torch.zeros(5, 2, 8, device="meta")}, ValueError, "k must be on cpu"),
    "offsets-images": ({"cu_seqlens": int32(0, 5)}, ValueError, r"cu_seqlens must have shape \(3,\)"),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens must have dtype int32"),
    "offsets-start": ({"cu_seqlens": int32(2, 2, 5)}, ValueError, "cu_seqlens must start at 0"),
    "offsets-fall": ({"cu_seqlens": int32(0, 3, 2)}, ValueError, "cu_seqlens must not decrease"),
    "offsets-beyond": ({"cu_seqlens": int32(0, 3, 6)}, ValueError, "cu_seqlens must end within the 5 tokens"),
    "longest-too-small": ({"max_seqlen": 2}, ValueError, "max_seqlen"),
    "longest-no-int": ({"max_seqlen": 3.0}, TypeError, "max_seqlen must be an int"),
    "scale-nan": ({"scale": math.nan}, ValueError, "scale must be in"),
    "bias-shape": ({"key_bias": torch.zeros(4)}, ValueError, r"key_bias must have shape \(5,\)"),
    "bias-heads": ({"key_bias": torch.zeros(5, 1)}, ValueError, r"key_bias must have shape \(5, 2\)"),
    "bias-dtype": ({"key_bias": torch.zeros(5).double()}, TypeError, "key_bias must have dtype float32"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        class_attention(**{**good(), **changes})
