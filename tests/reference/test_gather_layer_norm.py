"""gather_layer_norm, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import ops
from mtvit_ops.reference import gather_layer_norm as reference
from mtvit_ops.testing import random_tensor

# a row (a, a + 2) has variance 1; with eps 3 the reciprocal standard deviation is 1/2
X = [[1.0, 3.0], [0.0, 2.0], [7.0, 5.0]]
TABLE = {  # out = (-0.5, 0.5) * weight (2, 4) + bias (1, 1), or (0.5, -0.5) * ...
    "all": (None, [[0.0, 3.0], [0.0, 3.0], [2.0, -1.0]], [2.0, 1.0, 6.0], [0.5, 0.5, 0.5]),
    "listed": ([2, 0], [[2.0, -1.0], [0.0, 3.0]], [6.0, 2.0], [0.5, 0.5]),
    "dead": ([1, -1], [[0.0, 3.0], [0.0, 0.0]], [1.0, 0.0], [0.5, 0.0]),
}


@pytest.mark.parametrize(("rows", "out", "mean", "rstd"), TABLE.values(), ids=TABLE)
def test_by_hand(rows: list[int] | None, out: list, mean: list[float], rstd: list[float]) -> None:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    got = reference.gather_layer_norm(torch.tensor(X), rows, torch.tensor([2.0, 4.0]), torch.ones(2), 3.0)
    for value, wanted in zip(got, (out, mean, rstd), strict=True):
        torch.testing.assert_close(value, torch.tensor(wanted))


@pytest.mark.parametrize("rows", [None, [3, 0], [3, -1, 1]], ids=["all", "listed", "dead"])
def test_gradcheck(rows: list[int] | None) -> None:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    inputs = [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 5), (5,), (5,))]
    torch.autograd.gradcheck(lambda x, weight, bias: ops.gather_layer_norm(x, rows, weight, bias, 1e-2), inputs)
