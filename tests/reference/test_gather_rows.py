"""gather_rows, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops.ops.gather_rows import gather_rows
from mtvit_ops.reference import gather_rows as reference
from mtvit_ops.testing import assert_equal, random_tensor

X = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
TABLE = {
    "listed": ([2, 0], [[5.0, 6.0], [1.0, 2.0]]),
    "dead": ([1, -1, 0, -1], [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]),
    "none": ([], []),
}


@pytest.mark.parametrize(("rows", "wanted"), TABLE.values(), ids=TABLE)
def test_by_hand(rows: list[int], wanted: list[list[float]]) -> None:
    got = reference.gather_rows(torch.tensor(X), torch.tensor(rows, dtype=torch.int32))
    assert_equal("rows", got, torch.tensor(wanted).reshape(len(rows), 2))


def test_gradient_by_hand() -> None:
    grad = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]])
    got = reference.gather_rows_backward(grad, torch.tensor([2, -1, 0], dtype=torch.int32), 4)
    assert_equal("gradient", got, torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))


@pytest.mark.parametrize("rows", [[4, 0, 2], [4, -1, 0], []], ids=["listed", "dead", "none"])
def test_gradcheck(rows: list[int]) -> None:
    listed = torch.tensor(rows, dtype=torch.int32)
    x = random_tensor(5, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: gather_rows(x, listed), [x])
