"""Native attention and selection, each against the plain formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtvit_ops import _extension

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, ulps: int = 4) -> None:
    """No more than twice what plain PyTorch loses in the same dtype, and a few units in the last place."""
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    got, finite = got.double(), exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite])
    if not finite.any():
        return
    exact, last_place = exact[finite], torch.finfo(plain.dtype).eps * exact[finite].abs().max()
    allowed = 2 * (plain.double()[finite] - exact).abs().max() + ulps * last_place
    assert (got[finite] - exact).abs().max() <= allowed


# --- varlen_attention -------------------------------------------------------------------------------------------------


def attention(q, k, v, lengths_q, lengths_k, scale, bias, scores):
    """The formula, image by image, in the dtype of q; statistics of half inputs are taken in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -math.inf, dtype=wide)
    token_scores = torch.zeros(k.shape[0] if scores else 0, q.shape[1], dtype=wide)
    first_q = first_k = 0
    for nq, nk in zip(lengths_q, lengths_k, strict=True):
        at_q, at_k = slice(first_q, first_q + nq), slice(first_k, first_k + nk)
        first_q, first_k = first_q + nq, first_k + nk
        if nq == 0 or nk == 0:
            continue
        qi, ki, vi = (t.transpose(0, 1) for t in (q[at_q], k[at_k], v[at_k]))
        logits = (qi @ ki.transpose(1, 2)).to(wide) * scale  # (H, nq, nk)
        if bias is not None:
            logits = logits + bias[at_k].to(wide).reshape(nk, -1).T[:, None]
        p = logits.softmax(-1).nan_to_num(0.0)
        out[at_q] = (p.to(q.dtype) @ vi).transpose(0, 1)
        exact_logits = (qi.to(wide) @ ki.to(wide).transpose(1, 2)) * scale
        if bias is not None:
            exact_logits = exact_logits + bias[at_k].to(wide).reshape(nk, -1).T[:, None]
        lse[at_q] = exact_logits.logsumexp(-1).T
        if scores:
            p = exact_logits.softmax(-1).nan_to_num(0.0)
            token_scores[at_k] = (p[:, 0] if scores == 1 else p.mean(1)).T
    return out, lse, token_scores


def check_attention(q, k, v, lengths_q, lengths_k, bias=None, scores=0, scale=None):
    scale = max(q.shape[2], 1) ** -0.5 if scale is None else scale
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    got = native.varlen_attention(
        q, k, v, cu_q, cu_k, max(lengths_q, default=0), max(lengths_k, default=0), scale, bias, scores
    )
    plain = attention(q, k, v, lengths_q, lengths_k, scale, bias, scores)
    wide_bias = None if bias is None else bias.double()
    exact = attention(q.double(), k.double(), v.double(), lengths_q, lengths_k, scale, wide_bias, scores)
    for g, e, p in zip(got, exact, plain, strict=True):
        assert_as_good(g, e, p)
    assert got[0].is_contiguous()
    return got


ATTENTION_CASES = {  # (query lengths, key lengths, heads, d, dv)
    "deit-s": ([197], [197], 6, 64, 64),
    "mixed-lengths": ([60, 140, 99, 1], [60, 140, 99, 1], 3, 64, 64),
    "one-token": ([1, 1], [1, 1], 2, 16, 16),
    "empty-batch": ([], [], 2, 8, 8),
    "empty-images": ([0, 5, 0], [0, 5, 0], 2, 8, 8),
    "no-keys": ([3, 4], [0, 4], 2, 8, 8),
    "no-queries": ([0, 4], [3, 4], 2, 8, 8),
    "fewer-queries": ([1, 1, 1], [33, 50, 7], 3, 32, 32),
    "more-queries": ([40, 23], [3, 17], 2, 24, 24),
    "odd-d": ([13, 29], [13, 29], 2, 5, 5),
    "d=1": ([7], [7], 1, 1, 1),
    "wide-dv": ([19], [21], 2, 20, 70),
    "narrow-dv": ([19], [21], 2, 70, 3),
    "d=0": ([5], [7], 2, 0, 3),
    "dv=0": ([5], [7], 2, 3, 0),
    "no-heads": ([5], [7], 0, 3, 3),
    "d=256": ([18], [34], 1, 256, 256),
    "d=300": ([5], [17], 1, 300, 260),
    "whole-vectors": ([48, 16], [64, 32], 2, 32, 16),
    "long": ([30], [4096], 1, 64, 64),
}


@DTYPES
@pytest.mark.parametrize("scores", [0, 1, 2])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case, scores, dtype):
    lengths_q, lengths_k, heads, d, dv = ATTENTION_CASES[case]
    torch.manual_seed(0)
    q = torch.randn(sum(lengths_q), heads, d).to(dtype)
    k = torch.randn(sum(lengths_k), heads, d).to(dtype)
    v = torch.randn(sum(lengths_k), heads, dv).to(dtype)
    check_attention(q, k, v, lengths_q, lengths_k, scores=scores)


@DTYPES
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("scores", [0, 1, 2])
def test_attention_bias(per_head, scores, dtype):
    torch.manual_seed(1)
    lengths, heads = [37, 20, 16], 3
    q, k, v = torch.randn(3, sum(lengths), heads, 32).to(dtype)
    bias = 3 * torch.randn(sum(lengths), heads) if per_head else 3 * torch.randn(sum(lengths))
    bias[4] = -math.inf
    got = check_attention(q, k, v, lengths, lengths, bias, scores)
    if scores:
        assert (got[2][4] == 0).all()  # -inf removes the key
    check_attention(q, k, v, lengths, lengths, bias.double(), scores)
    check_attention(q, k, v, lengths, lengths, bias.to(torch.bfloat16), scores)


def test_attention_all_keys_removed():
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 9, 2, 8)
    v[0] = math.inf
    bias = torch.zeros(9)
    bias[:5] = -math.inf
    cu = offsets([5, 4])
    for scores in (1, 2):
        out, lse, token_scores = native.varlen_attention(q, k, v, cu, cu, 5, 5, 0.3, bias, scores)
        assert (out[:5] == 0).all()
        assert (lse[:5] == -math.inf).all()
        assert (token_scores[:5] == 0).all()
        torch.testing.assert_close(token_scores[5:].sum(0), torch.ones(2))


@DTYPES
def test_attention_reads_strided_views(dtype):
    torch.manual_seed(3)
    lengths = [21, 34]
    qkv = torch.randn(sum(lengths), 3, 4, 48).to(dtype)
    dense = [t.contiguous() for t in qkv.unbind(1)]
    got = check_attention(*qkv.unbind(1), lengths, lengths, scores=2)
    expected = check_attention(*dense, lengths, lengths, scores=2)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense]  # last stride is not 1
    got = check_attention(*turned, lengths, lengths, scores=2)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_attention_leaves_slack_alone():
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 20, 2, 8)
    for t in (q, k, v):
        t[12:] = math.nan
    cu = offsets([7, 5])
    for scores in (0, 1, 2):
        out, lse, token_scores = native.varlen_attention(q, k, v, cu, cu, 20, 20, 0.3, None, scores)
        cut = native.varlen_attention(q[:12], k[:12], v[:12], cu, cu, 7, 7, 0.3, None, scores)
        assert torch.equal(out[:12], cut[0])
        assert (out[12:] == 0).all()
        assert torch.equal(lse[:12], cut[1])
        assert (lse[12:] == -math.inf).all()
        if scores:
            assert torch.equal(token_scores[:12], cut[2])
            assert (token_scores[12:] == 0).all()


def test_attention_passes_nan_on():
    q, k, v = torch.randn(3, 6, 1, 8)
    q[2, 0, 0] = math.nan
    cu = offsets([6])
    out, lse, _ = native.varlen_attention(q, k, v, cu, cu, 6, 6, 1.0, None, 0)
    assert out[2].isnan().all()
    assert lse[2].isnan().all()
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


def test_attention_large_logits():
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 31, 2, 16)
    check_attention(q, k, v, [31], [31], scores=2, scale=30.0)
    check_attention(q, k, v, [31], [31], scores=1, scale=0.0)
    check_attention(q, k, v, [31], [31], scores=1, scale=-2.0)


@pytest.mark.parametrize("heads", [1, 3, 6])
@DTYPES
def test_attention_does_not_depend_on_threads(heads, dtype):
    torch.manual_seed(6)
    lengths = [197, 64, 130]
    q, k, v = torch.randn(3, sum(lengths), heads, 32).to(dtype)
    cu = offsets(lengths)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(native.varlen_attention(q, k, v, cu, cu, 197, 197, 0.2, None, 2))
            results[-1] += native.varlen_attention(q[:197], k[:197], v[:197], cu[:2], cu[:2], 197, 197, 0.2, None, 2)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_exp2_accuracy():
    # every power of two's neighbourhood and a dense sweep of what softmax feeds it
    x = torch.cat((torch.linspace(-126, 0, 1_000_003), -torch.logspace(-30, 6.9, 100_000, base=2)))
    x = x.clamp(-126, 0)
    exact = torch.exp2(x.double())
    last_place = torch.exp2(torch.floor(torch.log2(exact)) - 23)
    assert ((native._exp2(x).double() - exact).abs() / last_place).max() <= 2
    edge = native._exp2(torch.tensor([0.0, -0.0, -math.inf, -1e30, -200.0, -126.7, math.nan]))
    assert edge[:2].tolist() == [1.0, 1.0]
    assert edge[2:5].tolist() == [0.0, 0.0, 0.0]
    assert 0 <= edge[5] < 2**-126
    assert edge[6].isnan()


# --- token_select -----------------------------------------------------------------------------------------------------


def select(scores, rows, lengths, stays, prefix, by_score, capacity, dropped_capacity):
    """One image after the other with Python's sort; ``stays(image, places by worth)`` is the rule."""
    kept, dropped, first = [], [], 0
    kept_counts, dropped_counts = [], []
    for image, n in enumerate(lengths):
        places = list(range(first, first + n))
        head, tail = places[:prefix], places[prefix:]

        def worth(i):
            s = 0.0 if scores is None else float(scores[i])
            return (True, 0.0, i) if math.isnan(s) else (False, -s, i)

        ranked = sorted(tail, key=worth)
        chosen = set(stays(image, head, ranked))
        order = ranked if by_score else tail
        kept.append(head + [i for i in order if i in chosen])
        dropped.append([i for i in order if i not in chosen])
        kept_counts.append(len(kept[-1]))
        dropped_counts.append(len(dropped[-1]))
        first += n

    def as_list(groups, capacity):
        entries = [rows[i].item() if rows is not None else i for group in groups for i in group]
        return torch.tensor(entries + [-1] * (capacity - len(entries)), dtype=torch.int32)

    if dropped_capacity is None:
        return as_list(kept, capacity), offsets(kept_counts), as_list([], 0), offsets([0] * len(lengths))
    return as_list(kept, capacity), offsets(kept_counts), as_list(dropped, dropped_capacity), offsets(dropped_counts)


SELECT_LENGTHS = {
    "even": [8, 8, 8],
    "mixed": [11, 5, 30, 6],
    "one-image": [197],
    "many": [9] * 40,
}


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("rule", ["keep", "keep_counts", "threshold", "mask", "mask-alone"])
@pytest.mark.parametrize("lengths", SELECT_LENGTHS.values(), ids=SELECT_LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_select(rule, lengths, prefix, with_rows, by_score, dtype):
    torch.manual_seed(prefix)
    total, slack = sum(lengths), 4
    scores = torch.randint(-4, 5, (total + slack,)).to(dtype) / 4  # many ties
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, math.nan], dtype=dtype)
    scores[torch.randperm(total)[:6]] = special
    rows = torch.randperm(total + slack).int() if with_rows else None
    mask = torch.rand(total + slack) < 0.5
    keep = 4
    counts = [min(max(prefix, n // 2), n) for n in lengths]
    threshold = 0.3

    def stays(image, head, ranked):
        if rule.startswith("mask"):
            return [i for i in ranked if mask[i]]
        if rule == "threshold":
            return [i for i in ranked if scores[i] > threshold]
        return ranked[: (keep if rule == "keep" else counts[image]) - len(head)]

    given = None if rule == "mask-alone" else scores
    for dropped_capacity in (None, total + 1):
        expected = select(given, rows, lengths, stays, prefix, by_score, total, dropped_capacity)
        got = native.token_select(
            given,
            rows,
            offsets(lengths),
            mask if rule.startswith("mask") else None,
            torch.tensor(counts, dtype=torch.int32) if rule == "keep_counts" else None,
            keep if rule == "keep" else -1,
            threshold if rule == "threshold" else None,
            prefix,
            by_score,
            total,
            dropped_capacity is not None,
            dropped_capacity or 0,
        )
        for g, e in zip(got, expected, strict=True):
            assert g.dtype == torch.int32
            assert torch.equal(g, e)


def test_select_short_and_empty_images():
    scores, cu = torch.tensor([3.0, 1.0, 2.0, 5.0]), offsets([1, 0, 3])
    counts = torch.tensor([1, 0, 2], dtype=torch.int32)
    got = native.token_select(scores, None, cu, None, counts, -1, None, 2, False, 3, True, 1)
    assert [t.tolist() for t in got] == [[0, 1, 2], [0, 1, 1, 3], [3], [0, 0, 0, 1]]
    none = native.token_select(torch.empty(0), None, offsets([]), None, None, 0, None, 1, True, 2, True, 1)
    assert [t.tolist() for t in none] == [[-1, -1], [0], [-1], [0]]


def test_select_does_not_depend_on_threads():
    torch.manual_seed(7)
    lengths = [50] * 64
    scores = torch.randn(sum(lengths))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            args = (scores, None, offsets(lengths), None, None, 20, None, 1, True, 64 * 20, True, 64 * 30)
            results.append(native.token_select(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
