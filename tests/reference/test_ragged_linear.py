"""ragged_linear, computed by hand, and its gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtvit_ops import ops
from mtvit_ops.reference import ragged_linear as reference
from mtvit_ops.testing import assert_equal, offsets, random_tensor

A = [[1.0, 2.0], [3.0, -1.0], [math.nan, math.nan]]
WEIGHT = [[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]]
BIAS = [10.0, 20.0, 30.0]
LINEAR = {  # live count, bias: the result
    "two": (2, BIAS, [[11.0, 23.0, 26.0], [13.0, 22.0, 32.0], [0.0, 0.0, 0.0]]),
    "one": (1, BIAS, [[11.0, 23.0, 26.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    "none": (0, BIAS, [[0.0, 0.0, 0.0]] * 3),
    "no-bias": (2, None, [[1.0, 3.0, -4.0], [3.0, 2.0, 2.0], [0.0, 0.0, 0.0]]),
}
X = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0]]
RESIDUAL = {  # rows, scale: the result for two live entries
    "all": (None, None, [[12.0, 24.0, 27.0], [15.0, 24.0, 34.0], X[2], X[3]]),
    "listed": ([3, 0, -1], None, [[14.0, 23.0, 33.0], X[1], X[2], [15.0, 27.0, 30.0]]),
    "loose": ([3, 0, 1], None, [[14.0, 23.0, 33.0], X[1], X[2], [15.0, 27.0, 30.0]]),
    "hole": ([-1, 0, 1], None, [[14.0, 23.0, 33.0], X[1], X[2], X[3]]),
    "layer": ([3, 0, -1], [1.0, 10.0, 0.0], [[14.0, 221.0, 1.0], X[1], X[2], [15.0, 234.0, 4.0]]),
    "token": ([3, 0, -1], [[2.0], [0.5], [math.nan]], [[7.5, 12.0, 17.0], X[1], X[2], [26.0, 50.0, 56.0]]),
}


def tensor(values: list | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(("live", "bias", "wanted"), LINEAR.values(), ids=LINEAR)
def test_by_hand(live: int, bias: list | None, wanted: list) -> None:
    out = reference.ragged_linear(tensor(A), tensor(WEIGHT), tensor(bias), offsets((live,)), False)
    assert_equal("out", out, tensor(wanted))


def test_gelu_by_hand() -> None:
    # x * P(Z <= x) of a standard normal Z, from a printed table: 0.841345, 0.977250, 0.158655
    a = torch.tensor([[1.0], [2.0], [-1.0], [math.nan]])
    out = reference.ragged_linear(a, torch.ones(1, 1), None, offsets((1, 2)), True)
    torch.testing.assert_close(out, torch.tensor([[0.841345], [1.954500], [-0.158655], [0.0]]), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("rows", "scale", "wanted"), RESIDUAL.values(), ids=RESIDUAL)
def test_residual_by_hand(rows: list | None, scale: list | None, wanted: list) -> None:
    x, arguments = tensor(X), (tensor(A), tensor(WEIGHT), tensor(BIAS), offsets((1, 1)), tensor(scale))
    rows = tensor(rows, torch.int32)
    assert_equal("functional", reference.ragged_linear_residual(x, rows, *arguments), tensor(wanted))
    assert_equal("x", x, tensor(X))
    reference.ragged_linear_residual_(x, rows, *arguments)
    assert_equal("in place", x, tensor(wanted))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck(bias: bool, activation: str | None) -> None:
    shapes = [(4, 3), (2, 3), (2,)][: 2 + bias]
    torch.autograd.gradcheck(
        lambda a, weight, bias=None: ops.ragged_linear(a, weight, bias, offsets((2, 1)), activation=activation),
        [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes],
    )


@pytest.mark.parametrize("scale", [None, (2,), (4, 1)], ids=["none", "layer", "token"])
@pytest.mark.parametrize("rows", [None, [4, 0, 2, 1], [4, -1, 0, -1]], ids=["all", "loose", "dead"])
def test_residual_gradcheck(rows: list[int] | None, scale: tuple[int, ...] | None) -> None:
    shapes = [shape for shape in ((5, 2), (4, 3), (2, 3), (2,), scale) if shape is not None]
    rows = tensor(rows, torch.int32)
    torch.autograd.gradcheck(
        lambda x, a, weight, bias, scale=None: ops.ragged_linear_residual(
            x, rows, a, weight, bias, offsets((2, 1)), scale
        ),
        [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes],
    )
