"""scatter_residual_layer_norm, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import ops
from mtvit_ops.reference import scatter_residual_layer_norm as reference
from mtvit_ops.testing import assert_equal, random_tensor

# sums (a, a + 2) have variance 1; with eps 3 the reciprocal standard deviation is 1/2
X = [[1.0, 2.0], [0.0, 0.0], [7.0, 5.0]]
Y = [[1.0, 2.0], [2.0, 0.0], [9.0, 9.0]]
RISING, FALLING, DEAD = [0.0, 3.0], [2.0, -1.0], [0.0, 0.0]
TABLE = {  # out = (-0.5, 0.5) * weight (2, 4) + bias (1, 1), or (0.5, -0.5) * ...
    "all": (None, None, [[2.0, 4.0], [2.0, 0.0], [16.0, 14.0]], [RISING, FALLING, FALLING]),
    "listed": ([0, 1, -1], None, [[2.0, 4.0], [2.0, 0.0], [7.0, 5.0]], [RISING, FALLING, DEAD]),
    "layer-scale": ([1, -1, 2], [2.0, 2.0], [[1.0, 2.0], [2.0, 4.0], [25.0, 23.0]], [RISING, DEAD, FALLING]),
    "token-scale": ([2, 0, -1], [[4.0], [-0.5], [9.0]], [[0.0, 2.0], [0.0, 0.0], [11.0, 13.0]], [RISING, RISING, DEAD]),
}


@pytest.mark.parametrize(("rows", "scale", "new", "normed"), TABLE.values(), ids=TABLE)
def test_by_hand(rows: list[int] | None, scale: list | None, new: list, normed: list) -> None:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    scale = None if scale is None else torch.tensor(scale)
    x, rest = torch.tensor(X), (rows, torch.tensor(Y), torch.tensor([2.0, 4.0]), torch.ones(2), 3.0, scale)
    got = reference.scatter_residual_layer_norm(x, *rest)
    assert_equal("new x", got[0], torch.tensor(new))
    torch.testing.assert_close(got[1], torch.tensor(normed))
    torch.testing.assert_close(reference.scatter_residual_layer_norm_(x, *rest), torch.tensor(normed))
    assert_equal("x, in place", x, torch.tensor(new))


@pytest.mark.parametrize("scale", [None, (4,), (3, 1)], ids=["none", "layer", "token"])
@pytest.mark.parametrize("rows", [None, [4, 0, 2], [4, -1, 0]], ids=["all", "listed", "dead"])
def test_gradcheck(rows: list[int] | None, scale: tuple[int, ...] | None) -> None:
    num_rows = 3 if rows is None else 5
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    shapes = [shape for shape in ((num_rows, 4), (3, 4), (4,), (4,), scale) if shape is not None]
    torch.autograd.gradcheck(
        lambda x, y, weight, bias, factor=None: ops.scatter_residual_layer_norm(x, rows, y, weight, bias, 1e-2, factor),
        [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes],
    )
