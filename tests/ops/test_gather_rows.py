"""gather_rows, and its gradient, against indexing row by row."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops.ops.gather_rows import gather_rows
from mtvit_ops.testing import assert_equal, assert_matches_formula, random_rows, random_tensor


class Case(NamedTuple):
    num_rows: int
    live: int
    dim: int
    dead: int = 0
    rows: tuple[int, ...] | None = None  # a list written out instead of drawn
    strided: str | None = None  # "rows": x is the right part of a wider array, "columns": a transposed one


CASES = {
    "half": Case(8, 4, dim=24),
    "keep-all": Case(5, 5, dim=24),
    "ViT-S": Case(80, 50, dim=384),
    # a row that takes more than one round of its threads, in words of 16 bytes and of 2
    "wide": Case(6, 4, dim=1200),
    "wide-odd": Case(6, 4, dim=301),
    # words of every size: 16, 8, 4 and 2 bytes
    "D=1": Case(6, 3, dim=1),
    "D=2": Case(6, 3, dim=2),
    "D=4": Case(6, 3, dim=4),
    "D=7": Case(6, 3, dim=7),
    # more rows than one block of threads takes
    "many": Case(700, 300, dim=8, dead=5),
    "dead": Case(8, 3, dim=24, dead=4),
    "dead-only": Case(8, 0, dim=24, dead=4),
    "dead-between": Case(6, 4, dim=8, rows=(3, -1, 0, -1)),
    "score-order": Case(6, 4, dim=8, rows=(4, 0, 5, 2)),
    "no-entry": Case(6, 0, dim=8),
    "R=0-dead": Case(0, 0, dim=8, dead=2),
    "D=0": Case(6, 3, dim=0),
    # rows that start between two words of 16 bytes
    "strided": Case(8, 4, dim=24, strided="rows"),
    "strided-columns": Case(8, 4, dim=24, strided="columns"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_indexing(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    if case.rows is None:
        rows = random_rows(case.num_rows, case.live, case.dead, device)
    else:
        rows = torch.tensor(case.rows, dtype=torch.int32, device=device)
    if case.strided == "columns":
        x = random_tensor(case.dim, case.num_rows, dtype=dtype, device=device).T
    else:
        skipped = 1 if case.strided else 0
        x = random_tensor(case.num_rows, case.dim + skipped, dtype=dtype, device=device)[:, skipped:]

    def formula(x: Tensor) -> Tensor:
        parts = [x[row] if row >= 0 else x.new_zeros(case.dim) for row in rows.tolist()]
        return torch.stack(parts) if parts else x.new_zeros(0, case.dim)

    assert_matches_formula(lambda x: gather_rows(x, rows), formula, {"x": x})
    wanted = formula(x)
    assert_equal("rows, bit by bit", gather_rows(x, rows), wanted)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "x-rank": ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.zeros(4, 2).int()}, TypeError, "x must have dtype"),
    "rows-rank": ({"rows": int32(0)[None]}, ValueError, r"rows must have shape \(T,\)"),
    "rows-dtype": ({"rows": torch.arange(2)}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": int32(0, 1).to("meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": int32(0, 4)}, ValueError, r"rows must be in \[-1, 4\)"),
    "rows-below": ({"rows": int32(-2, 0)}, ValueError, r"rows must be in \[-1, 4\)"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        gather_rows(**{"x": torch.zeros(4, 2), "rows": int32(0, 1), **changes})
