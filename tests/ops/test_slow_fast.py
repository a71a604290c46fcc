"""slow_fast_merge and slow_fast_update against sums and additions, image by image."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops.ops import slow_fast_merge, slow_fast_update
from mtvit_ops.testing import assert_matches_formula, offsets, poison_behind, random_rows, random_tensor, spans


class Case(NamedTuple):
    lengths: tuple[int, ...]  # listed tokens of each image
    num_rows: int | None = None  # None: no list, all rows
    dim: int = 24
    dead: int = 0  # entries behind the last image: row -1 (or, without a list, NaN rows), NaN weights
    normalize: bool = True
    float32_weights: bool = False
    strided: bool = False  # x is the left half of a wider array, rows and weights every other entry of longer ones
    slack: int = 0


CASES = {
    "all-rows": Case((3, 4)),
    "listed": Case((3, 4), num_rows=12),
    "sums-as-they-are": Case((3, 4), num_rows=12, normalize=False),
    "ViT-S": Case((48, 27), num_rows=80, dim=384),
    "D=1": Case((3, 2), num_rows=6, dim=1),
    "D=13": Case((3, 2), num_rows=6, dim=13, normalize=False),
    "one-token": Case((1,), num_rows=2),
    "last-row-only": Case((1,), num_rows=1),
    "zero-length": Case((0, 4, 0, 0, 3, 0), num_rows=9),
    "all-empty": Case((0, 0), num_rows=4),
    "B0": Case((), num_rows=4),
    "R=0": Case((0, 0)),
    "dead": Case((3, 4), num_rows=12, dead=5),
    "dead-sums": Case((3, 4), num_rows=12, dead=5, normalize=False),
    "dead-all-rows": Case((3, 4), dead=2),
    "dead-all-rows-sums": Case((3, 4), dead=2, normalize=False),
    "B0-dead": Case((), num_rows=4, dead=3),
    "slack": Case((3, 4), num_rows=12, slack=5),
    "float32-weights": Case((3, 4), num_rows=12, float32_weights=True),
    "strided": Case((3, 4), num_rows=12, strided=True),
    "strided-sums": Case((3, 4), num_rows=12, normalize=False, strided=True),
    # one below, at and above a tile of rows; exactly one tile of columns
    "row-tile-edges": Case((31, 32, 33), num_rows=110, dim=128),
    # a second tile of columns, with one column
    "two-column-tiles": Case((33, 5), num_rows=40, dim=129),
    # several tiles of rows and of weights in one image
    "long": Case((300, 257), num_rows=600, dim=5),
    # rows too wide for one tile
    "wide": Case((9, 3), num_rows=14, dim=1030),
}


def make_list(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None]:
    """x, whose unlisted or dead rows are NaN, and the list."""
    live = sum(case.lengths)
    num_rows = live + case.dead if case.num_rows is None else case.num_rows
    x = random_tensor(num_rows, 2 * case.dim if case.strided else case.dim, dtype=dtype, device=device)[:, : case.dim]
    if case.num_rows is None:
        return poison_behind(x, live), None
    rows = random_rows(num_rows, live, case.dead, device)
    return x, every_other(rows) if case.strided else rows


def every_other(values: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return values.repeat_interleave(2)[::2]


def listed(rows: Tensor | None, span: slice, device: str) -> Tensor:
    return torch.arange(span.start, span.stop, device=device) if rows is None else rows[span].long()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merge_matches_weighted_sums(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    x, rows = make_list(case, dtype, device)
    if rows is not None:  # what is not listed is not read
        unlisted = torch.ones(len(x), dtype=torch.bool, device=device)
        unlisted[rows[rows >= 0].long()] = False
        x[unlisted] = math.nan
    tokens = len(x) if rows is None else len(rows)
    kept = torch.float32 if case.float32_weights and dtype != torch.float64 else dtype
    weights = poison_behind((torch.rand(tokens) + 0.1).to(device=device, dtype=kept), sum(case.lengths))
    if case.strided:
        weights = every_other(weights)
    cu_seqlens, longest = offsets(case.lengths, device), max(case.lengths, default=0) + case.slack

    def formula(x: Tensor, weights: Tensor) -> Tensor:
        sums = [x.new_zeros(0, case.dim)]
        for span in spans(case.lengths):
            share = weights[span] / weights[span].sum() if case.normalize else weights[span]
            sums.append((share[:, None] * x[listed(rows, span, device)]).sum(dim=0, keepdim=True).to(x.dtype))
        return torch.cat(sums)

    assert_matches_formula(
        lambda x, weights: slow_fast_merge(x, weights, rows, cu_seqlens, longest, normalize=case.normalize),
        formula,
        {"x": x, "weights": weights},
    )


def test_merge_of_weights_that_sum_to_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    x, weights = torch.ones(3, 4, dtype=dtype, device=device), torch.zeros(3, dtype=dtype, device=device)
    weights.requires_grad_()
    merged = slow_fast_merge(x, weights, None, offsets((3,), device), 3)
    merged.sum().backward()
    assert not merged.any()
    assert not weights.grad.any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_update_matches_additions(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    x, rows = make_list(case._replace(dead=0) if case.num_rows is None else case, dtype, device)
    cu_seqlens, longest = offsets(case.lengths, device), max(case.lengths, default=0) + case.slack

    def formula(x: Tensor, increment: Tensor) -> Tensor:
        for image, span in enumerate(spans(case.lengths)):
            index = listed(rows, span, device)
            x = x.index_add(0, index, increment[image].expand(len(index), -1))
        return x * 1.0

    assert_matches_formula(
        lambda x, increment: slow_fast_update(x, rows, cu_seqlens, longest, increment),
        formula,
        {"x": x, "increment": random_tensor(len(case.lengths), case.dim, dtype=dtype, device=device)},
    )


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


LIST = {"x": torch.ones(6, 8), "rows": int32(0, 2, 3), "cu_seqlens": int32(0, 1, 3), "max_seqlen": 2}
OPS = {
    "merge": (slow_fast_merge, {**LIST, "weights": torch.ones(3)}),
    "update": (slow_fast_update, {**LIST, "increment": torch.ones(2, 8)}),
}
BAD_LIST = {
    "x-rank": ({"x": torch.ones(1, 6, 8)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.ones(6, 8).int()}, TypeError, "x must have dtype"),
    "rows-dtype": ({"rows": torch.arange(3)}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": int32(0, 2, 3).to("meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": int32(0, 2, 6)}, ValueError, "rows must"),
    "rows-below": ({"rows": int32(-2, 2, 3)}, ValueError, "rows must"),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0, 1, 3])}, TypeError, "cu_seqlens must have dtype int32"),
    "offsets-start": ({"cu_seqlens": int32(1, 1, 3)}, ValueError, "cu_seqlens must start at 0"),
    "offsets-fall": ({"cu_seqlens": int32(0, 3, 2)}, ValueError, "cu_seqlens must not decrease"),
    "offsets-beyond": ({"cu_seqlens": int32(0, 2, 4)}, ValueError, "cu_seqlens must end"),
    "longest-too-small": ({"max_seqlen": 1}, ValueError, "max_seqlen"),
    "longest-no-int": ({"max_seqlen": 2.0}, TypeError, "max_seqlen must be an int"),
}
BAD = {
    **{f"{op}-{name}": (op, *row) for op in OPS for name, row in BAD_LIST.items()},
    "merge-weights-length": ("merge", {"weights": torch.ones(6)}, ValueError, r"weights must have shape \(3,\)"),
    "merge-weights-dtype": ("merge", {"weights": torch.ones(3).half()}, TypeError, "weights must have dtype float32"),
    "update-increment-images": ("update", {"increment": torch.ones(3, 8)}, ValueError, "increment must have shape"),
    "update-increment-dim": ("update", {"increment": torch.ones(2, 7)}, ValueError, "increment must have shape"),
    "update-increment-dtype": (
        "update",
        {"increment": torch.ones(2, 8).half()},
        TypeError,
        "increment must have dtype",
    ),
}


@pytest.mark.parametrize(("op", "changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(op: str, changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    function, arguments = OPS[op]
    with pytest.raises(error, match=message):
        function(**{**arguments, **changes})
