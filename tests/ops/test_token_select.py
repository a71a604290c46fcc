"""token_select against a model on plain Python lists."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops.ops import token_select
from mtvit_ops.testing import assert_equal, offsets, select_model

NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    scores: tuple[tuple[float, ...], ...] | None  # of each image
    keep: int | tuple[int, ...] | None = None
    threshold: float | None = None
    mask: tuple[tuple[int, ...], ...] | None = None
    prefix: int = 0
    rows: tuple[int, ...] | None = None  # None: all rows
    dead: int = 0  # entries behind the last image: NaN scores, mask True, row 99
    capacity: int | None = None
    max_seqlen: int | None = None
    tile: int | None = None  # the kernels' tiles, made so small that a short image does not fit


def spread(*lengths: int) -> tuple[tuple[float, ...], ...]:
    """Scores of images this long, with ties."""
    return tuple(tuple(float((i * 37 + b) % 101 - 50) for i in range(n)) for b, n in enumerate(lengths))


CASES = {
    "half": Case(((0.1, 0.4, 0.3, 0.2), (4.0, 3.0, 2.0, 1.0)), keep=2),
    "keep-all": Case(((1.0, 2.0), (2.0, 1.0)), keep=2),
    "keep-0": Case(((1.0, 2.0), (3.0,)), keep=0),
    "one-token": Case(((1.0,),), keep=1),
    "last-row-only": Case(((1.0, 2.0, 3.0),), keep=1),
    "last-row-of-the-list": Case(((1.0, 2.0, 3.0),), keep=1, rows=(4, 6, 9)),
    # the class token has the lowest score and stays
    "prefix": Case(((-9.0, 1.0, 3.0, 2.0), (-9.0, 5.0, 4.0, 6.0)), keep=2, prefix=1),
    "prefix-is-all-kept": Case(((1.0, 2.0, 9.0), (1.0, 2.0, 9.0)), keep=2, prefix=2),
    "prefix-2-ragged": Case(((0.0, 0.0, 1.0, 2.0), (0.0, 0.0, 3.0)), keep=3, prefix=2),
    # equal scores: the smaller position wins, inside and across the cut
    "ties": Case(((1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 2.0, 1.0, 2.0)), keep=2),
    "ties-long": Case(((0.5,) * 131,), keep=65),
    "zeros": Case(((-0.0, 0.0, -0.0, 0.0),), keep=2),
    "zeros-threshold": Case(((-0.0, 0.0, 1.0),), threshold=-0.0),
    # NaN ranks below -inf, in the order it stands
    "nan": Case(((NAN, -INF, NAN, 1.0), (NAN, NAN, NAN)), keep=2),
    "nan-kept": Case(((NAN, -INF, NAN, 1.0),), keep=3),
    "nan-in-prefix": Case(((NAN, 1.0, 2.0),), keep=2, prefix=1),
    "nan-threshold": Case(((NAN, -INF, INF, 1.0),), threshold=-INF),
    "infinities": Case(((INF, -INF, 0.0, INF, -INF),), keep=3),
    "infinity-threshold": Case(((INF, 1.0),), threshold=INF),
    "counts": Case(((1.0, 3.0, 2.0), (1.0,), (5.0, 4.0)), keep=(2, 1, 0)),
    "counts-empty-image": Case(((), (1.0, 2.0), ()), keep=(0, 1, 0)),
    "counts-prefix": Case(((0.0, 3.0, 2.0), (0.0,)), keep=(2, 1), prefix=1),
    # shorter than the prefix: all of it is prefix
    "counts-short-image": Case(((0.0,), (0.0, 1.0, 5.0, 4.0)), keep=(1, 3), prefix=2),
    "counts-capacity": Case(((1.0, 3.0, 2.0), (1.0, 2.0)), keep=(1, 2), capacity=3),
    "counts-spare-capacity": Case(((1.0, 3.0),), keep=(1,), capacity=7),
    "threshold": Case(((0.25, 0.5, 0.75), (1.0, 0.0)), threshold=0.5),
    # no float holds 0.3: the threshold is rounded to the scores' dtype, as PyTorch does, and not exceeded
    "threshold-rounds": Case(((0.3, 0.31, 0.29),), threshold=0.3),
    "threshold-none-kept": Case(((1.0, 2.0), (3.0,)), threshold=8.0),
    "threshold-prefix": Case(((0.0, 0.5, 0.75), (0.0,), ()), threshold=0.5, prefix=1),
    "threshold-capacity": Case(((1.0, 0.0, 1.0), (0.0,)), threshold=0.5, capacity=2),
    "mask": Case(None, mask=((1, 0, 1), (0, 0), (1,))),
    "mask-prefix": Case(None, mask=((0, 0, 1), (0, 0), ()), prefix=1),
    "mask-scores": Case(((1.0, 2.0, 3.0, NAN), (2.0, 2.0)), mask=((1, 0, 1, 1), (1, 1))),
    "mask-none-kept": Case(None, mask=((0, 0), (0,))),
    "mask-capacity": Case(None, mask=((0, 1), (1, 0)), capacity=2),
    "rows": Case(((1.0, 4.0, 3.0), (5.0, 6.0)), keep=2, rows=(2, 3, 7, 10, 11)),
    # a list in score order stays a list: positions, not rows, break ties
    "rows-unsorted": Case(((1.0, 1.0, 1.0),), keep=2, rows=(8, 2, 5)),
    "all-empty": Case(((), ()), keep=0),
    "all-empty-threshold": Case(((), ()), threshold=0.0),
    "B0": Case((), keep=3),
    "B0-mask": Case(None, mask=()),
    "B0-dead": Case((), threshold=0.0, dead=3),
    # what lies behind the last image is neither kept nor dropped
    "capacity-dead": Case(((1.0, 2.0), (4.0, 3.0)), keep=1, dead=3, rows=(0, 1, 5, 6)),
    "capacity-dead-counts": Case(((1.0, 2.0), ()), keep=(1, 0), dead=2),
    "capacity-dead-mask": Case(None, mask=((1, 0), (0, 1)), dead=3),
    # more than one block of any sort
    "N197": Case(spread(197, 197, 197), keep=99, prefix=1),
    # a bound below the number of tokens: the edges of a tile, with one warp and with more
    "bound-16": Case(spread(15, 16, 7), keep=7, prefix=1, max_seqlen=16),
    "bound-17": Case(spread(17, 15, 16), keep=8, prefix=1, max_seqlen=17),
    "bound-256": Case(spread(255, 256), keep=100, prefix=2, max_seqlen=256),
    "bound-257": Case(spread(257, 3, 256), keep=(128, 3, 1), prefix=1, max_seqlen=257),
    "bound-577": Case(spread(577, 576), threshold=3.0, prefix=1, max_seqlen=577),
    "N4096": Case(spread(4096), keep=2000, prefix=1),
    # images longer than a tile are taken in pieces, and compared pair by pair
    "pieces": Case(spread(15, 16, 17, 0, 33), keep=(7, 16, 1, 0, 32), prefix=1, tile=16),
    "pieces-ties": Case(((2.0,) * 10 + (3.0,) * 10, (NAN,) * 17), keep=14, tile=16),
    "pieces-threshold": Case(spread(33, 0, 48), threshold=3.0, prefix=18, tile=16, dead=2),
    "pieces-mask": Case(spread(17, 33), mask=tuple(tuple(i % 3 for i in range(n)) for n in (17, 33)), tile=16),
    # offsets add up over more images than a tile of them holds, and what lies behind is longer than a tile
    "many-images": Case(spread(*(i % 2 for i in range(17))), threshold=0.0, tile=16, dead=20),
    # a threshold that float16 rounds to infinity
    "threshold-large": Case(((1.0, INF, -INF),), threshold=1e6),
}  # fmt: skip


def flat(table, fill, dead: int, dtype: torch.dtype, device: str) -> Tensor | None:
    if table is None:
        return None
    return torch.tensor([value for image in table for value in image] + [fill] * dead, dtype=dtype, device=device)


@pytest.mark.parametrize("order", ["ascending", "score"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_model(
    case: Case, order: str, backend: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.tile is not None and backend == "triton":
        from mtvit_ops.kernels import _launch

        for name in ("LONGEST_TILE", "PIECE", "RANKED", "BATCH_TILE"):
            monkeypatch.setattr(_launch, name, case.tile)
    images = case.mask if case.scores is None else case.scores
    lengths = [len(image) for image in images]
    scores = flat(case.scores, NAN, case.dead, dtype, device)
    mask = flat(case.mask, 1, case.dead, torch.bool, device)
    rows = None if case.rows is None else flat((case.rows,), 99, case.dead, torch.int32, device)
    keep = case.keep
    if isinstance(keep, tuple):
        keep = torch.tensor(keep, dtype=torch.int32, device=device)
    given = [value for value in (scores, mask, rows, keep) if isinstance(value, Tensor)]
    before = [value.clone() for value in given]

    got, again = (
        token_select(
            scores, rows, offsets(lengths, device), keep=keep, threshold=case.threshold, mask=mask,
            num_prefix_tokens=case.prefix, order=order, return_dropped=True, capacity=case.capacity,
            max_seqlen=case.max_seqlen,
        )
        for _ in range(2)
    )  # fmt: skip
    alone = token_select(
        scores, rows, offsets(lengths, device), keep=keep, threshold=case.threshold, mask=mask,
        num_prefix_tokens=case.prefix, order=order, capacity=case.capacity, max_seqlen=case.max_seqlen,
    )  # fmt: skip

    kept, dropped = select_model(
        lengths,
        None if scores is None else scores.tolist(),
        None if rows is None else rows.tolist(),
        keep=case.keep,
        threshold=None if case.threshold is None else torch.tensor(case.threshold, dtype=dtype).item(),
        mask=None if mask is None else mask.tolist(),
        num_prefix_tokens=case.prefix,
        by_score=order == "score",
    )
    tokens = sum(lengths) + case.dead
    fixed = len(lengths) * case.keep if isinstance(case.keep, int) else None
    room = case.capacity if case.capacity is not None else tokens if fixed is None else fixed
    for name, images_rows, length, found_rows, found_offsets in (
        ("kept", kept, room, got.rows, got.cu_seqlens),
        ("dropped", dropped, tokens if fixed is None else tokens - fixed, got.dropped_rows, got.dropped_cu_seqlens),
    ):
        listed = [row for image in images_rows for row in image]
        wanted = torch.tensor(listed + [-1] * (length - len(listed)), dtype=torch.int32, device=device)
        assert_equal(f"{name} rows", found_rows, wanted)
        assert_equal(f"{name} offsets", found_offsets, offsets([len(image) for image in images_rows], device))
    for name, first, second in zip(got._fields, got, again, strict=True):
        assert_equal(f"{name}, run again", second, first)
    assert_equal("rows without the dropped list", alone.rows, got.rows)
    assert_equal("offsets without the dropped list", alone.cu_seqlens, got.cu_seqlens)
    assert alone.dropped_rows is None
    assert alone.dropped_cu_seqlens is None
    for value, copy in zip(given, before, strict=True):
        assert_equal("an argument after the call", value, copy)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good() -> dict:
    return {"scores": torch.arange(5.0), "rows": None, "cu_seqlens": int32(0, 2, 5), "keep": 1}


BAD = {
    "no-scores": ({"scores": None}, ValueError, "scores must be given"),
    "scores-for-keep": ({"scores": None, "keep": None, "threshold": 1.0}, ValueError, "scores must be given"),
    "scores-rank": ({"scores": torch.zeros(5, 1)}, ValueError, r"scores must have shape \(T,\)"),
    "scores-integer": ({"scores": torch.zeros(5, dtype=torch.int64)}, TypeError, "scores must have dtype"),
    "rows-length": ({"rows": int32(0, 1)}, ValueError, r"rows must have shape \(5,\)"),
    "rows-dtype": ({"rows": torch.arange(5)}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": int32(0, 1, 2, 3, 4).to("meta")}, ValueError, "rows must be on cpu"),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens must have dtype int32"),
    "offsets-start": ({"cu_seqlens": int32(1, 5)}, ValueError, "cu_seqlens must start at 0"),
    "offsets-fall": ({"cu_seqlens": int32(0, 3, 2)}, ValueError, "cu_seqlens must not decrease"),
    "offsets-beyond": ({"cu_seqlens": int32(0, 6)}, ValueError, "cu_seqlens must end"),
    "nothing-said": ({"keep": None}, ValueError, "exactly one of keep, threshold and mask must be given, got none"),
    "keep-and-threshold": ({"threshold": 1.0}, ValueError, "exactly one of .* got keep and threshold"),
    "keep-and-mask": ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "exactly one of .* got keep and mask"),
    "keep-negative": ({"keep": -1}, ValueError, "keep must be >= 0"),
    "keep-float": ({"keep": 0.5}, TypeError, "keep must be an int"),
    "keep-larger-than-an-image": ({"keep": 2, "cu_seqlens": int32(0, 1, 5)}, ValueError, "keep must"),
    "keep-larger-than-all": ({"keep": 3}, ValueError, "keep must be at most"),
    "keep-below-prefix": ({"num_prefix_tokens": 2}, ValueError, "keep must be >= 2"),
    "keep-of-an-empty-image": ({"cu_seqlens": int32(0, 0, 5)}, ValueError, "keep must"),
    "counts-shape": ({"keep": int32(1)}, ValueError, r"keep must have shape \(2,\)"),
    "counts-dtype": ({"keep": torch.ones(2)}, TypeError, "keep must have dtype int32"),
    "counts-beyond": ({"keep": int32(1, 4)}, ValueError, "keep"),
    "counts-negative": ({"keep": int32(-1, 1)}, ValueError, "keep"),
    "counts-below-prefix": ({"keep": int32(1, 2), "num_prefix_tokens": 2}, ValueError, "keep"),
    "mask-dtype": ({"keep": None, "mask": torch.ones(5)}, TypeError, "mask must have dtype bool"),
    "mask-length": ({"keep": None, "mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask must have shape"),
    "threshold-tensor": ({"keep": None, "threshold": torch.tensor(1.0)}, TypeError, "threshold must be a number"),
    "threshold-nan": ({"keep": None, "threshold": math.nan}, ValueError, "threshold must be in"),
    "prefix-negative": ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be >= 0"),
    "order-unknown": ({"order": "random"}, ValueError, "order must be one of"),
    "longest-no-int": ({"max_seqlen": 2.0}, TypeError, "max_seqlen must be an int"),
    "longest-negative": ({"max_seqlen": -1}, ValueError, "max_seqlen must be >= 0"),
    "longest-too-small": ({"max_seqlen": 2}, ValueError, "max_seqlen"),
    "capacity-negative": ({"capacity": -1}, ValueError, "capacity must be >= 0"),
    "capacity-too-small": ({"capacity": 1}, ValueError, "capacity"),
    "capacity-too-small-counts": ({"keep": int32(2, 2), "capacity": 3}, ValueError, "capacity"),
    "capacity-too-small-threshold": ({"keep": None, "threshold": 1.5, "capacity": 2}, ValueError, "capacity"),
    "capacity-too-small-mask": (
        {"keep": None, "mask": torch.ones(5, dtype=torch.bool), "capacity": 4},
        ValueError,
        "capacity",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        token_select(**{**good(), **changes})
