"""slow_fast_merge and slow_fast_update, computed by hand, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops import ops
from mtvit_ops.reference import slow_fast as reference
from mtvit_ops.testing import assert_equal, offsets, random_tensor

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
ROWS = torch.tensor([1, 3, 0, -1], dtype=torch.int32)  # two entries of the first image, none, one, a dead one
OFFSETS = offsets((2, 0, 1))
TABLE = {
    # (1 (3, 4) + 3 (7, 8)) / 4
    "normalized": (True, [[6.0, 7.0], [0.0, 0.0], [1.0, 2.0]]),
    "as-they-are": (False, [[24.0, 28.0], [0.0, 0.0], [2.0, 4.0]]),
}


@pytest.mark.parametrize(("normalize", "wanted"), TABLE.values(), ids=TABLE)
def test_merge_by_hand(normalize: bool, wanted: list) -> None:
    weights = torch.tensor([1.0, 3.0, 2.0, 50.0])
    got = reference.slow_fast_merge(X, weights, ROWS, OFFSETS, 2, normalize)
    assert_equal("merged", got, torch.tensor(wanted))


def test_update_by_hand() -> None:
    increment = torch.tensor([[10.0, 20.0], [7.0, 7.0], [100.0, 200.0]])
    got = reference.slow_fast_update(X, ROWS, OFFSETS, 2, increment)
    assert_equal("x", got, torch.tensor([[101.0, 202.0], [13.0, 24.0], [5.0, 6.0], [17.0, 28.0]]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [ROWS, None], ids=["listed", "all"])
def test_merge_gradcheck(rows: torch.Tensor | None, normalize: bool) -> None:
    x, weights = random_tensor(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    torch.autograd.gradcheck(
        lambda x, weights: ops.slow_fast_merge(x, weights, rows, OFFSETS, 2, normalize=normalize),
        [x.requires_grad_(), weights.requires_grad_()],
    )


@pytest.mark.parametrize("rows", [ROWS, None], ids=["listed", "all"])
def test_update_gradcheck(rows: torch.Tensor | None) -> None:
    inputs = [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (3, 3))]
    torch.autograd.gradcheck(
        lambda x, increment: ops.slow_fast_update(x, rows, OFFSETS, 2, increment), inputs
    )  # fmt: skip
