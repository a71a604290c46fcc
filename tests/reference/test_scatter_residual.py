"""scatter_residual, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import ops
from mtvit_ops.reference import scatter_residual as reference
from mtvit_ops.testing import assert_equal, random_tensor

X = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
Y = [[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]
TABLE = {
    "all": (None, None, [[2.0, 3.0], [5.0, 6.0], [14.0, 15.0]]),
    "listed": ([2, 0, -1], None, [[3.0, 4.0], [3.0, 4.0], [6.0, 7.0]]),
    "layer-scale": ([2, 0, -1], [10.0, 100.0], [[21.0, 202.0], [3.0, 4.0], [15.0, 106.0]]),
    "token-scale": ([2, 0, -1], [[2.0], [3.0], [7.0]], [[7.0, 8.0], [3.0, 4.0], [7.0, 8.0]]),
}


@pytest.mark.parametrize(("rows", "scale", "wanted"), TABLE.values(), ids=TABLE)
def test_by_hand(rows: list[int] | None, scale: list | None, wanted: list) -> None:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    scale = None if scale is None else torch.tensor(scale)
    x = torch.tensor(X)
    assert_equal("functional", reference.scatter_residual(x, rows, torch.tensor(Y), scale), torch.tensor(wanted))
    reference.scatter_residual_(x, rows, torch.tensor(Y), scale)
    assert_equal("in place", x, torch.tensor(wanted))


@pytest.mark.parametrize("scale", [None, (4,), (3, 1)], ids=["none", "layer", "token"])
@pytest.mark.parametrize("rows", [None, [4, 0, 2], [4, -1, 0]], ids=["all", "listed", "dead"])
def test_gradcheck(rows: list[int] | None, scale: tuple[int, ...] | None) -> None:
    num_rows = 3 if rows is None else 5
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    shapes = [shape for shape in ((num_rows, 4), (3, 4), scale) if shape is not None]
    torch.autograd.gradcheck(
        lambda x, y, factor=None: ops.scatter_residual(x, rows, y, factor),
        [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes],
    )
