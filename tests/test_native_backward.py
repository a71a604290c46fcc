"""Native gradients of attention against autograd through the formula, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops import _extension
from mtvit_ops.testing import assert_close_to_float64, offsets, spans

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class Case(NamedTuple):
    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None  # None: as the queries
    d: int = 16
    dv: int | None = None  # None: d
    heads: int = 2
    bias: int = 0  # its dimensions
    removed: tuple[int, ...] = ()  # keys with a bias of -inf
    slack: int = 0  # rows behind the last sequence


CASES = {
    "one-token": Case((1,)),
    "DeiT-S": Case((197, 99), d=64, heads=6),
    "two-images": Case((5, 9)),
    "empty-ones": Case((0, 4, 0, 3), (2, 0, 0, 5)),
    "cross": Case((7, 3), (11, 20), d=24, dv=40),
    "odd-d": Case((13,), d=7, dv=5),
    "d=1": Case((6,), d=1, dv=1),
    "d=0": Case((6,), d=0, dv=3),
    "dv=0": Case((6,), d=3, dv=0),
    "bias": Case((9, 4), bias=1),
    "bias-per-head": Case((9, 4), bias=2),
    "removed-keys": Case((9, 4), bias=1, removed=(0, 5, 12)),
    "no-key-left": Case((3, 2), bias=2, removed=(0, 1, 2)),
    "slack": Case((5, 2), slack=6, bias=1),
    # the portable, AVX2 and AVX-512 vectors hold 4, 8 and 16 keys, tiles 6 or 12 queries
    "tile-edges": Case((11, 12, 13, 15, 16, 17, 31, 32, 33)),
    # 65536 / nk queries at a time: three blocks, the last one short
    "many-keys": Case((70,), (2200,), d=8),
    "many-queries": Case((900,), (150,), d=8),
    "nobody": Case(()),
}


def make(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], list[int], list[int]]:
    keys = case.queries if case.keys is None else case.keys
    nq, nk = sum(case.queries) + case.slack, sum(keys) + case.slack
    dv = case.d if case.dv is None else case.dv
    if nq == nk and dv == case.d:  # as a qkv layer leaves them
        q, k, v = torch.randn(nq, 3, case.heads, case.d).to(dtype).unbind(1)
    else:
        q, k = (torch.randn(n, case.heads, case.d).to(dtype) for n in (nq, nk))
        v = torch.randn(nk, case.heads, dv).to(dtype)
    bias = None
    if case.bias:
        bias = torch.randn(nk) if case.bias == 1 else torch.randn(nk, case.heads)
        bias[list(case.removed)] = -math.inf
    grad = torch.randn(nq, case.heads, dv).to(dtype)
    return {"q": q, "k": k, "v": v, "bias": bias, "grad": grad}, list(case.queries), list(keys)


def formula(q, k, v, bias, grad, lengths_q, lengths_k, scale) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of a bias per head, image by image."""
    per_head = torch.zeros(k.shape[0], k.shape[1], dtype=q.dtype)
    if bias is not None:
        per_head = per_head + bias.to(q.dtype).reshape(len(k), -1)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, per_head)]
    total = leaves[0].sum() * 0
    for at_q, at_k in zip(spans(lengths_q), spans(lengths_k), strict=True):
        qi, ki, vi, bi = (t[at].transpose(0, 1) for t, at in zip(leaves, (at_q, at_k, at_k, at_k), strict=True))
        if 0 in (qi.shape[1], ki.shape[1]):
            continue
        logits = qi @ ki.transpose(1, 2) * scale + bi[:, None]
        keyless = (logits == -math.inf).all(-1, keepdim=True)
        p = logits.masked_fill(keyless, 0.0).softmax(-1).masked_fill(keyless, 0.0)
        total = total + ((p @ vi).transpose(0, 1) * grad[at_q]).sum()
    return torch.autograd.grad(total, leaves, materialize_grads=True)


def run(inputs: dict[str, Tensor | None], lengths_q: list[int], lengths_k: list[int], scale: float) -> tuple:
    sizes = offsets(lengths_q), offsets(lengths_k), max(lengths_q, default=0), max(lengths_k, default=0), scale
    q, k, v, bias, grad = (inputs[name] for name in ("q", "k", "v", "bias", "grad"))
    out, lse, _ = native.varlen_attention(q, k, v, *sizes, bias, 0)
    return native.varlen_attention_backward(grad, q, k, v, out, lse, *sizes, bias)


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_autograd(case: Case, dtype: torch.dtype) -> None:
    inputs, lengths_q, lengths_k = make(case, dtype)
    scale = 0.3
    got = run(inputs, lengths_q, lengths_k, scale)
    wide = {name: None if value is None else value.double() for name, value in inputs.items()}
    exact = formula(**wide, lengths_q=lengths_q, lengths_k=lengths_k, scale=scale)
    plain = formula(**inputs, lengths_q=lengths_q, lengths_k=lengths_k, scale=scale)
    for name, g, e, p in zip("qkvb", got, exact, plain, strict=True):
        assert g.is_contiguous()
        assert g.dtype == (torch.float32 if name == "b" else dtype)
        assert_close_to_float64(f"gradient of {name}", g, e, p)
    if case.slack:
        for g in got:
            assert (g[-case.slack :] == 0).all()


@DTYPES
def test_thread_count_does_not_matter(dtype: torch.dtype) -> None:
    inputs, lengths_q, lengths_k = make(CASES["DeiT-S"], dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, lengths_q, lengths_k, 0.125))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_gradient() -> None:
    inputs, lengths_q, lengths_k = make(CASES["two-images"], torch.float32)
    shape = inputs["grad"].shape
    expected = run(inputs, lengths_q, lengths_k, 0.25)
    turned = inputs["grad"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for grad in (turned, inputs["grad"].repeat(1, 1, 2)[..., : shape[2]]):
        assert grad.stride() != inputs["grad"].stride()
        got = run({**inputs, "grad": grad}, lengths_q, lengths_k, 0.25)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    ones = run({**inputs, "grad": torch.ones(shape)}, lengths_q, lengths_k, 0.25)
    broadcast = run({**inputs, "grad": torch.ones(()).expand(shape)}, lengths_q, lengths_k, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(ones, broadcast, strict=True))


def backward(**changes):
    q, k, v, grad, out = torch.randn(5, 6, 2, 4)
    args = {"grad": grad, "q": q, "k": k, "v": v, "lse": torch.zeros(6, 2), "cu": [0, 2, 6], "bias": None} | changes
    cu = torch.tensor(args["cu"], dtype=torch.int32)
    return native.varlen_attention_backward(
        args["grad"], args["q"], args["k"], args["v"], out, args["lse"], cu, cu, 4, 4, 0.5, args["bias"]
    )


ERRORS = {
    "grad_out must have shape (6, 2, 4), got (5, 2, 4)": lambda: backward(grad=torch.ones(5, 2, 4)),
    "grad_out must have shape (Tq, H, dv), got (6, 8)": lambda: backward(grad=torch.ones(6, 8)),
    "grad_out must have q's dtype": lambda: backward(grad=torch.ones(6, 2, 4).half()),
    "lse must have shape (6, 2), got (6, 1)": lambda: backward(lse=torch.ones(6, 1)),
    "k must have shape (Tk, 2, 4), got (6, 2, 5)": lambda: backward(k=torch.randn(6, 2, 5)),
    "key_bias must have shape (6,) or (6, 2), got (5,)": lambda: backward(bias=torch.ones(5)),
    "mtvit_ops value error: cu_seqlens_q must end at 6 or before, got 7": lambda: backward(cu=[0, 3, 7]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message]()
    assert str(caught.value).splitlines()[0] == message
