"""varlen_attention against F.scaled_dot_product_attention, image by image and head by head."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import varlen_attention
from mtvit_ops.testing import (
    assert_close_to_float64,
    assert_matches_formula,
    offsets,
    packed_qkv,
    poison_behind,
    random_tensor,
    spans,
)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    keys: tuple[int, ...] | None = None  # None: as the queries
    heads: int = 2
    dim: int = 8
    value_dim: int | None = None  # None: as dim
    bias: str | None = None  # "token": (Tk,), "head": (Tk, H)
    bias_float32: bool = False
    removed: tuple[int, ...] = ()  # keys with a bias of -inf (for "head": of the first head only)
    scores: str | None = None
    scale: float | None = None
    layout: str = "packed"  # "packed": views of one (T, 3, H, d); "last-stride": its last stride is not 1
    dead: int = 0  # entries behind the last image, full of NaN
    slack: int = 0  # by how much max_seqlen exceeds the longest image


CASES = {
    "dense": Case((6, 6)),
    "ragged": Case((7, 1, 4)),
    # a ViT's own sizes: many tiles, the last one cut
    "B2-N197-d64": Case((197, 131), heads=3, dim=64, scores="class"),
    # no size is a multiple of a vector or a tile
    "odd-sizes": Case((17, 33, 5), heads=3, dim=13, bias="head", scores="mean"),
    "dim-1": Case((5, 3), dim=1),
    "one-head": Case((5, 3), heads=1),
    # LeViT: values wider than keys; and the reverse
    "dv>d": Case((9, 5), dim=16, value_dim=24, bias="token"),
    "dv<d": Case((9, 5), dim=16, value_dim=5, scores="class"),
    # q shorter than k in one image and longer in the next
    "cross": Case((3, 5, 1), keys=(7, 2, 9), scores="mean"),
    "cross-class-bias": Case((1, 1), keys=(7, 3), bias="token", scores="class"),
    # empty images first, last and adjacent
    "zero-length": Case((0, 4, 0, 0, 3, 0), bias="token", scores="mean"),
    "no-query": Case((0, 3), keys=(4, 2), scores="mean"),
    "no-query-class": Case((0, 3), keys=(4, 2), scores="class"),
    "no-key": Case((3, 2), keys=(0, 4), scores="class"),
    "one-token": Case((1,), scores="class"),
    "one-token-each": Case((1, 1, 1), bias="token"),
    "all-empty": Case((0, 0)),
    "all-empty-bias-scores": Case((0, 0), bias="token", scores="mean"),
    "all-empty-head-bias": Case((0, 0), bias="head", scores="class"),
    "B0": Case(()),
    "B0-dead": Case((), dead=3, bias="head", scores="class"),
    # NaN behind the live count must reach neither results nor gradients
    "capacity": Case((4, 3), dead=5),
    "capacity-bias-scores": Case((4, 0, 3), dead=5, bias="head", scores="mean"),
    "capacity-cross": Case((4, 3), keys=(2, 6), dead=3, bias="token", scores="class"),
    "slack": Case((4, 3), slack=9, scores="mean"),
    "token-bias": Case((7, 4), bias="token"),
    "head-bias": Case((7, 4), bias="head", scores="class"),
    "float32-bias": Case((7, 4), bias="token", bias_float32=True),
    # -inf removes a key: as if it were not there
    "removed-keys": Case((7, 4), bias="token", removed=(0, 5, 9), scores="mean"),
    "removed-in-one-head": Case((7, 4), bias="head", removed=(1, 2, 10), scores="class"),
    "removed-whole-image": Case((3, 4), bias="token", removed=(0, 1, 2), scores="class"),
    "scale": Case((7, 4), scale=0.7),
    "scale-0": Case((7, 4), scale=0.0, scores="mean"),
    "scale<0": Case((7, 4), scale=-0.7, scores="mean"),
    "separate": Case((7, 4), layout="separate"),
    "last-stride": Case((7, 4), layout="last-stride", scores="mean"),
    # tiles of 32 and 64 tokens: one less, full, one more
    "tile-edges": Case((31, 32, 33), keys=(63, 64, 65), heads=1, scores="class"),
    # few programs, so that an image's queries are shared out and means are added up from several of them
    "query-edges": Case((129, 64, 63), heads=1, scores="mean"),
    "query-edges-class": Case((65,), keys=(130,), heads=1, bias="token", scores="class"),
    # most of the longest image's room is empty: programs are numbered by tokens
    "uneven": Case((1, 130, 0), heads=1, scores="mean"),
    "uneven-slack": Case((1, 70, 2), heads=1, bias="token", scores="class", slack=200),
    # all the keys that a row holds; with bias and mean, half of them are too many
    "full-row": Case((3,), keys=(256,), heads=1, scores="mean"),
    "bias-mean": Case((2, 3), keys=(150, 128), heads=1, bias="head", scores="mean"),
    # more keys than a row holds: several tiles, the last one full, cut, or the image's only one
    "many-keys": Case((70, 5, 1), keys=(320, 257, 3), heads=1, dim=16, scores="class"),
    "many-keys-mean": Case((70, 0, 1), keys=(257, 320, 3), heads=1, dim=16, bias="token", scores="mean", dead=3),
    "many-keys-removed": Case((2, 1), keys=(300, 64), bias="token", removed=tuple(range(130)), scores="class"),
    "many-keys-no-query": Case((0, 2), keys=(300, 4), scores="class"),
    # the widest heads that a kernel takes, and wider ones
    "dim-128": Case((9, 40), heads=1, dim=128, bias="token", scores="mean"),
    "dim-130": Case((5, 3), heads=1, dim=130, value_dim=6),
    # more dead entries than the programs fill in one go
    "much-capacity": Case((3,), dead=300, scores="class"),
    # the Triton gradient's tiles of 32, 64, 128 and 256 keys: one below, at and above; widths that fill none
    "tile-edges-gradient": Case((31, 32, 33), heads=1, dim=16),
    "tile-edges-64": Case((63, 64, 65), heads=1, dim=20, value_dim=40, bias="head"),
    "tile-edges-cross": Case((65, 1, 129), keys=(129, 128, 1), heads=1, dim=33, bias="token"),
    "longest-one-pass": Case((3, 64), keys=(256, 255), heads=1, dim=8, bias="token", removed=(0, 100, 255)),
    # too long for one pass over a whole row: two, with images that fill one tile, none, and a single key
    "two-passes": Case((257, 1, 0, 64), heads=1, dim=24, bias="head", dead=70),
    "two-passes-cross": Case(
        (1, 65, 4), keys=(300, 0, 1), heads=2, dim=8, value_dim=20, bias="token", removed=(0, 299)
    ),
    "two-passes-wide": Case((130, 129), heads=1, dim=128),
    "wider-than-128": Case((20, 70), heads=1, dim=160, value_dim=136, bias="token"),
}


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    keys = case.lengths if case.keys is None else case.keys
    tokens, num_keys = sum(case.lengths) + case.dead, sum(keys) + case.dead
    value_dim = case.value_dim or case.dim
    if case.layout == "packed" and case.keys is None and value_dim == case.dim:
        q, k, v = packed_qkv(tokens, case.heads, case.dim, dtype, device)
    elif case.layout == "last-stride":
        q, k, v = random_tensor(3, case.heads, case.dim, tokens, dtype=dtype, device=device).permute(0, 3, 1, 2)
    else:
        q = random_tensor(tokens, case.heads, case.dim, dtype=dtype, device=device)
        k = random_tensor(num_keys, case.heads, case.dim, dtype=dtype, device=device)
        v = random_tensor(num_keys, case.heads, value_dim, dtype=dtype, device=device)
    bias = None
    if case.bias is not None:
        shape = (num_keys,) if case.bias == "token" else (num_keys, case.heads)
        bias = random_tensor(*shape, dtype=torch.float32 if case.bias_float32 else dtype, device=device)
        for key in case.removed:
            (bias if case.bias == "token" else bias[:, 0])[key] = -math.inf
        poison_behind(bias, sum(keys))
    poison_behind(q, sum(case.lengths))
    poison_behind(k, sum(keys))
    poison_behind(v, sum(keys))
    return {"q": q, "k": k, "v": v, "key_bias": bias}


def formula(case: Case, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, ...]:
    """One image, one head at a time; removed keys are left out, not masked."""
    out = v.new_zeros(q.shape[0], case.heads, v.shape[2])
    scores = k.new_zeros(k.shape[0], case.heads)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    for of_queries, of_keys in zip(
        spans(case.lengths), spans(case.lengths if case.keys is None else case.keys), strict=True
    ):
        for head in range(case.heads):
            queries, keys, values = q[of_queries, head], k[of_keys, head], v[of_keys, head]
            bias = keys.new_zeros(len(keys))
            if key_bias is not None:
                bias = (key_bias if case.bias == "token" else key_bias[:, head])[of_keys]
            there = bias.detach() > -math.inf
            if len(queries) == 0 or not there.any():
                continue
            keys, values, bias = keys[there], values[there], bias[there].to(q.dtype)
            mask = bias.expand(len(queries), -1) if key_bias is not None else None
            out[of_queries, head] = F.scaled_dot_product_attention(
                queries[None], keys[None], values[None], mask, scale=scale
            )[0]
            if case.scores is not None:
                table = torch.softmax(queries @ keys.T * scale + bias, dim=-1)
                index = torch.arange(of_keys.start, of_keys.stop, device=there.device)[there]
                scores[index, head] = table[0] if case.scores == "class" else table.mean(dim=0)
    return (out,) if case.scores is None else (out, scores.detach())


def offset_arguments(case: Case, device: str) -> tuple:
    longest = max(case.lengths, default=0) + case.slack
    first = offsets(case.lengths, device), longest
    return first if case.keys is None else (*first, offsets(case.keys, device), max(case.keys) + case.slack)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_sdpa(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    arguments = offset_arguments(case, device)
    assert_matches_formula(
        lambda q, k, v, key_bias: varlen_attention(
            q, k, v, *arguments, key_bias=key_bias, scores=case.scores, scale=case.scale
        ),
        lambda **inputs: formula(case, **inputs),
        make_inputs(case, dtype, device),
    )


@pytest.mark.parametrize("name", ["dense", "zero-length", "no-key", "capacity", "removed-whole-image"])
def test_log_sum_exp(name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """What the backward pass is given: natural logarithm, -inf where there is no key."""
    case = CASES[name]
    inputs = make_inputs(case, dtype, device)
    cu_q, longest_q, cu_k, longest_k = (offset_arguments(case, device) * 2)[:4]
    _, lse, scores = torch.ops.mtvit_ops.varlen_attention(
        inputs["q"], inputs["k"], inputs["v"], cu_q, cu_k, longest_q, longest_k, 0.5, inputs["key_bias"], 0
    )

    def plain(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        table = q.new_full((q.shape[0], case.heads), -math.inf)
        for a, b in zip(spans(case.lengths), spans(case.lengths if case.keys is None else case.keys), strict=True):
            logits = torch.einsum("qhd,khd->qhk", q[a], k[b]) * 0.5
            table[a] = torch.logsumexp(logits if bias is None else logits + bias[b], dim=-1)
        return table

    doubles = [None if inputs[name] is None else inputs[name].double() for name in ("q", "k", "key_bias")]
    assert_close_to_float64("lse", lse, plain(*doubles), plain(inputs["q"], inputs["k"], inputs["key_bias"]))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.shape == (0, case.heads)


def test_scores_carry_no_gradient(backend: str, device: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in packed_qkv(4, 2, 8, device=device))
    out, scores = varlen_attention(q, k, v, offsets((4,), device), 4, scores="class")
    assert out.requires_grad
    assert not scores.requires_grad


@pytest.mark.parametrize("scores", ["class", "mean"])
def test_scores_of_an_image_sum_to_one(scores: str, backend: str, device: str) -> None:
    q, k, v = packed_qkv(11, 3, 8, device=device)
    _, found = varlen_attention(q, k, v, offsets((4, 0, 7), device), 7, scores=scores)
    sums = torch.stack([found[:4].sum(dim=0), found[4:].sum(dim=0)])
    torch.testing.assert_close(sums, torch.ones(2, 3, device=device), atol=1e-6, rtol=0)  # 7 roundings of eps / 2


@pytest.mark.parametrize("keys", [6, 300])  # the Triton gradient in one pass, and in two
def test_gradient_of_any_strides(keys: int, backend: str, device: str) -> None:
    """What ``sum`` and ``mean`` send back has strides of 0; a bias may be the column of something."""
    q, k, v = (tensor.requires_grad_() for tensor in packed_qkv(keys, 2, 8, device=device))
    bias = random_tensor(2, keys, device=device).T.requires_grad_()
    wanted = (q, k, v, bias)
    out = varlen_attention(q, k, v, offsets((keys,), device), keys, key_bias=bias)
    expanded = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    turned = torch.ones(8, 2, keys, device=device).permute(2, 1, 0)
    for name, got, same in zip("qkvb", expanded, torch.autograd.grad(out, wanted, turned), strict=True):
        assert got.abs().max() > 0
        # float32 sums of a few hundred terms; strides may decide the order in which a kernel adds
        torch.testing.assert_close(got, same, atol=1e-5, rtol=1e-5, msg=f"gradient of {name}")


def good() -> dict:
    q, k, v = packed_qkv(5, 2, 8)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": offsets((2, 3)), "max_seqlen_q": 3}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {  # what is changed, the error, how its message begins
    "q-no-tensor": ({"q": [1.0]}, TypeError, "q must be a tensor"),
    "q-rank": ({"q": torch.zeros(5, 16)}, ValueError, r"q must have shape \(Tq, H, d\)"),
    "q-integer": ({"q": torch.zeros(5, 2, 8, dtype=torch.int64)}, TypeError, "q must have dtype"),
    "k-dtype": ({"k": torch.zeros(5, 2, 8, dtype=torch.float16)}, TypeError, "k must have dtype float32, got float16"),
    "k-head-size": ({"k": torch.zeros(5, 2, 7)}, ValueError, r"k must have shape \(Tk, 2, 8\)"),
    "k-heads": ({"k": torch.zeros(5, 3, 8)}, ValueError, "k must have shape"),
    "k-device": ({"k": torch.zeros(5, 2, 8, device="meta")}, ValueError, "k must be on cpu"),
    "k-tokens": ({"k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8)}, ValueError, "k must have 5 tokens"),
    "v-tokens": ({"v": torch.zeros(4, 2, 8)}, ValueError, "v must have shape"),
    "v-dtype": ({"v": torch.zeros(5, 2, 8).double()}, TypeError, "v must have dtype"),
    "offsets-dtype": ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens_q must have dtype int32"),
    "offsets-rank": ({"cu_seqlens_q": int32(0, 5)[None]}, ValueError, "cu_seqlens_q must have shape"),
    "offsets-none": ({"cu_seqlens_q": int32()}, ValueError, "cu_seqlens_q must have B"),
    "offsets-device": ({"cu_seqlens_q": int32(0, 5).to("meta")}, ValueError, "cu_seqlens_q must be on cpu"),
    "offsets-start": ({"cu_seqlens_q": int32(1, 2, 5)}, ValueError, "cu_seqlens_q must start at 0"),
    "offsets-fall": ({"cu_seqlens_q": int32(0, 3, 2)}, ValueError, "cu_seqlens_q must not decrease"),
    "offsets-beyond": ({"cu_seqlens_q": int32(0, 3, 6)}, ValueError, "cu_seqlens_q must end"),
    "longest-too-small": ({"max_seqlen_q": 2}, ValueError, "max_seqlen"),
    "longest-negative": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be >= 0"),
    "longest-no-int": ({"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q must be an int"),
    "longest-bool": ({"max_seqlen_q": True}, TypeError, "max_seqlen_q must be an int"),
    "key-offsets-alone": ({"cu_seqlens_k": int32(0, 2, 5)}, ValueError, "max_seqlen_k must be given"),
    "key-offsets-images": (
        {"cu_seqlens_k": int32(0, 5), "max_seqlen_k": 5},
        ValueError,
        "cu_seqlens_k must have shape",
    ),
    "key-offsets-start": (
        {"cu_seqlens_k": int32(1, 2, 5), "max_seqlen_k": 5},
        ValueError,
        "cu_seqlens_k must start at 0",
    ),
    "key-offsets-beyond": ({"cu_seqlens_k": int32(0, 2, 9), "max_seqlen_k": 9}, ValueError, "cu_seqlens_k must end"),
    "key-longest-too-small": ({"cu_seqlens_k": int32(0, 2, 5), "max_seqlen_k": 2}, ValueError, "max_seqlen"),
    "bias-shape": ({"key_bias": torch.zeros(4)}, ValueError, r"key_bias must have shape \(5,\)"),
    "bias-heads": ({"key_bias": torch.zeros(5, 3)}, ValueError, r"key_bias must have shape \(5, 2\)"),
    "bias-dtype": ({"key_bias": torch.zeros(5).half()}, TypeError, "key_bias must have dtype float32"),
    "scale-nan": ({"scale": math.nan}, ValueError, "scale must be in"),
    "scale-word": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scores-unknown": ({"scores": "max"}, ValueError, "scores must be one of"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        varlen_attention(**{**good(), **changes})
