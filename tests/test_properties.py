"""Any lengths, any counts, any scores: token_select against sorted lists, varlen_attention against SDPA."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mtvit_ops.ops import token_select, varlen_attention
from mtvit_ops.testing import assert_close_to_float64, offsets, select_model, spans

BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 9), max_size=5)
# few values, so that ties are common
SCORES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf, math.nan])


@st.composite
def selections(draw: st.DrawFn) -> dict:
    lengths = draw(LENGTHS)
    total = sum(lengths)
    prefix = draw(st.integers(0, 2))
    rows = draw(st.permutations(range(total + 3)))[:total] if draw(st.booleans()) else None
    case = {
        "lengths": lengths,
        "rows": rows,
        "num_prefix_tokens": prefix,
        "scores": draw(st.lists(SCORES, min_size=total, max_size=total)),
    }
    kind = draw(st.sampled_from(["counts", "threshold", "mask"]))
    if kind == "counts":
        case["keep"] = [draw(st.integers(min(prefix, length), length)) for length in lengths]
    elif kind == "threshold":
        case["threshold"] = draw(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf]))
    else:
        case["mask"] = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    return case


@BOUNDED
@given(case=selections(), by_score=st.booleans(), dead=st.integers(0, 3), half=st.booleans())
def test_selection_is_the_sorted_list(case: dict, by_score: bool, dead: int, half: bool) -> None:
    kept, dropped = select_model(**case, by_score=by_score)
    dtype = torch.bfloat16 if half else torch.float32  # every score above is exact in both
    rows, keep, mask = case["rows"], case.get("keep"), case.get("mask")
    got = token_select(
        torch.tensor(case["scores"] + [math.nan] * dead, dtype=dtype),
        None if rows is None else torch.tensor([*rows, *[-1] * dead], dtype=torch.int32),
        offsets(case["lengths"]),
        keep=None if keep is None else torch.tensor(keep, dtype=torch.int32),
        threshold=case.get("threshold"),
        mask=None if mask is None else torch.tensor(mask + [True] * dead, dtype=torch.bool),
        num_prefix_tokens=case["num_prefix_tokens"],
        order="score" if by_score else "ascending",
        return_dropped=True,
    )
    room = sum(case["lengths"]) + dead
    for images, found, ends in (
        (kept, got.rows, got.cu_seqlens),
        (dropped, got.dropped_rows, got.dropped_cu_seqlens),
    ):
        listed = [row for image in images for row in image]
        assert found.tolist() == listed + [-1] * (room - len(listed))
        assert ends.tolist() == offsets([len(image) for image in images]).tolist()


@BOUNDED
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    heads=st.integers(1, 3),
    dim=st.integers(1, 17),
    value_dim=st.integers(1, 17),
    dead=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_attention_is_sdpa_of_each_image(
    pairs: list[tuple[int, int]], heads: int, dim: int, value_dim: int, dead: int, seed: int
) -> None:
    torch.manual_seed(seed)
    queries, keys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    q = torch.randn(sum(queries) + dead, heads, dim)
    k, v = (torch.randn(sum(keys) + dead, heads, size) for size in (dim, value_dim))
    longest = [max(lengths, default=0) for lengths in (queries, keys)]
    got = varlen_attention(q, k, v, offsets(queries), longest[0], offsets(keys), longest[1])

    def each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_zeros(len(q), heads, value_dim)
        for a, b in zip(spans(queries), spans(keys), strict=True):
            if a.stop > a.start and b.stop > b.start:
                image = (tensor.transpose(0, 1) for tensor in (q[a], k[b], v[b]))
                out[a] = F.scaled_dot_product_attention(*image).transpose(0, 1)
        return out

    assert_close_to_float64("out", got, each(q.double(), k.double(), v.double()), each(q, k, v))
