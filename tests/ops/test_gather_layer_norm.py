"""gather_layer_norm against F.layer_norm on the listed rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import gather_layer_norm
from mtvit_ops.testing import assert_equal, assert_matches_formula, random_rows, random_tensor


class Case(NamedTuple):
    num_rows: int
    live: int | None = None  # None: all rows, without a list
    dim: int = 24
    dead: int = 0  # fillers of -1 behind the list
    rows: tuple[int, ...] | None = None  # a list written out instead of drawn
    float32_affine: bool = False
    strided: bool = False  # x is the left half of a wider array
    eps: float = 1e-6
    shift: float = 0.0  # added to x


CASES = {
    "all-rows": Case(5),
    "keep-all": Case(5, live=5),
    "half": Case(8, live=4),
    "ViT-S": Case(80, live=50, dim=384),
    # no vector width divides them
    "D=1": Case(6, live=3, dim=1),
    "D=7": Case(6, live=3, dim=7),
    "D=100": Case(6, live=3, dim=100),
    "D=257": Case(6, live=3, dim=257),
    "D=0": Case(6, live=3, dim=0),
    # rows as wide as a tile of registers, and one column more
    "D=1024": Case(6, live=3, dim=1024),
    "D=1025": Case(6, live=3, dim=1025),
    "D=4096": Case(4, live=2, dim=4096),
    # rows a tile holds (8, and twice 4 in the gradient), one fewer, one more
    "tile-1": Case(16, live=7, dim=384),
    "tile": Case(16, live=8, dim=384),
    "tile+1": Case(16, live=9, dim=384),
    # partial sums of several programs, the last of which has less to do
    "five-tiles": Case(80, live=70, dim=192, dead=4),
    "one-row": Case(1, live=1),
    "last-row-only": Case(6, rows=(5,)),
    "score-order": Case(6, rows=(4, 0, 5, 2)),
    "dead": Case(8, live=3, dead=4),
    "dead-only": Case(8, live=0, dead=4),
    # fillers need not stand behind: a list is read entry by entry
    "dead-between": Case(6, rows=(3, -1, 0, -1)),
    "no-entry": Case(6, live=0),
    "R=0": Case(0),
    "R=0-list": Case(0, live=0),
    "R=0-dead": Case(0, live=0, dead=2),
    "float32-affine": Case(8, live=4, float32_affine=True),
    "float32-affine-all-rows": Case(8, float32_affine=True),
    "strided-x": Case(8, live=4, strided=True),
    "strided-x-all-rows": Case(8, strided=True),
    "large-eps": Case(8, live=4, eps=0.5),
    # a mean far from 0 ruins E[x^2] - E[x]^2
    "shifted": Case(8, live=4, shift=100.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_layer_norm(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    x = random_tensor(case.num_rows, 2 * case.dim if case.strided else case.dim, dtype=dtype, device=device)
    x = (x + case.shift)[:, : case.dim]
    affine = torch.float32 if case.float32_affine and dtype != torch.float64 else dtype
    rows = None
    if case.rows is not None:
        rows = torch.tensor(case.rows, dtype=torch.int32, device=device)
    elif case.live is not None:
        rows = random_rows(case.num_rows, case.live, case.dead, device)
    if rows is not None:  # what is not listed is not read
        unlisted = torch.ones(case.num_rows, dtype=torch.bool, device=device)
        unlisted[rows[rows >= 0].long()] = False
        x[unlisted] = math.nan

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if rows is None:
            return F.layer_norm(x, (case.dim,), weight.to(x.dtype), bias.to(x.dtype), case.eps)
        live = rows >= 0
        picked = F.layer_norm(x[rows[live].long()], (case.dim,), weight.to(x.dtype), bias.to(x.dtype), case.eps)
        return x.new_zeros(len(rows), case.dim).index_put((live,), picked)

    assert_matches_formula(
        lambda x, weight, bias: gather_layer_norm(x, rows, weight, bias, case.eps),
        formula,
        {
            "x": x,
            "weight": random_tensor(case.dim, dtype=affine, device=device),
            "bias": random_tensor(case.dim, dtype=affine, device=device),
        },
    )


def test_any_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    """A turned ``x``, every other parameter and entry: layouts that a kernel may not read in place."""
    rows = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    x = random_tensor(9, 5, dtype=dtype, device=device)
    weight, bias = random_tensor(9, dtype=dtype, device=device), random_tensor(9, dtype=dtype, device=device)
    wide = torch.stack((weight, torch.full_like(weight, math.nan)), dim=1)[:, 0]
    assert_equal(
        "out",
        gather_layer_norm(x.T, rows.repeat_interleave(2)[::2], wide, bias.repeat_interleave(2)[::2]),
        gather_layer_norm(x.T.contiguous(), rows, weight, bias),
    )


def test_constant_rows_give_the_bias(backend: str, device: str, dtype: torch.dtype) -> None:
    """No variance: only eps keeps the division finite."""
    bias = random_tensor(16, dtype=dtype, device=device)
    rows = torch.arange(3, dtype=torch.int32, device=device)
    x = torch.full((3, 16), 1.5, dtype=dtype, device=device)
    out = gather_layer_norm(x, rows, torch.ones_like(bias), bias)
    assert_equal("out", out, bias.expand(3, 16))


def good() -> dict:
    return {
        "x": torch.zeros(4, 8),
        "rows": torch.tensor([0, 2], dtype=torch.int32),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }


BAD = {
    "x-rank": ({"x": torch.zeros(1, 4, 8)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.zeros(4, 8).int()}, TypeError, "x must have dtype"),
    "rows-dtype": ({"rows": torch.tensor([0, 2])}, TypeError, "rows must have dtype int32, got int64"),
    "rows-rank": ({"rows": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "rows must have shape"),
    "rows-device": ({"rows": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "rows must"),
    "rows-below": ({"rows": torch.tensor([-2, 1], dtype=torch.int32)}, ValueError, "rows must"),
    "weight-shape": ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\)"),
    "weight-dtype": ({"weight": torch.ones(8).half()}, TypeError, "weight must have dtype float32"),
    "weight-device": ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on cpu"),
    "bias-shape": ({"bias": torch.zeros(1, 8)}, ValueError, "bias must have shape"),
    "bias-dtype": ({"bias": torch.zeros(8).double()}, TypeError, "bias must have dtype float32"),
    "eps-zero": ({"eps": 0.0}, ValueError, "eps must be in"),
    "eps-nan": ({"eps": math.nan}, ValueError, "eps must be in"),
    "eps-tensor": ({"eps": torch.tensor(1e-6)}, TypeError, "eps must be a number"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        gather_layer_norm(**{**good(), **changes})
