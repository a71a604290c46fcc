"""class_attention, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from mtvit_ops import ops
from mtvit_ops.reference import class_attention as reference
from mtvit_ops.testing import offsets, random_tensor

# d = 1, scale 1: logits 0, 1, 2 in the first image and 0, 0 in the third; the second is empty, one entry is dead
TABLE = {
    "softmax": (None, [0.090031, 0.244728, 0.665241, 0.5, 0.5, 0.0]),
    # a bias of log w weighs the keys: 1, 0.5 e, 0.25 e^2 over 4.206405; 3 against 1
    "weighted-softmax": ([1.0, 0.5, 0.25, 3.0, 1.0, 7.0], [0.237733, 0.323112, 0.439155, 0.75, 0.25, 0.0]),
    "removed-keys": ([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], [0.268941, 0.731059, 0.0, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("weights", "row"), TABLE.values(), ids=TABLE)
def test_by_hand(weights: list[float] | None, row: list[float]) -> None:
    q_class, k = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0, math.nan])
    bias = None if weights is None else torch.tensor(weights).log()
    got = reference.class_attention(
        q_class.reshape(3, 1, 1), k.reshape(6, 1, 1), offsets((3, 0, 2)), 3, 1.0, bias
    )  # fmt: skip
    torch.testing.assert_close(got[:, 0], torch.tensor(row), atol=1e-6, rtol=0)  # six digits


@pytest.mark.parametrize("bias", [(), (6,), (6, 2)], ids=["none", "token", "head"])
def test_gradcheck(bias: tuple[int, ...]) -> None:
    inputs = [random_tensor(3, 2, 3, dtype=torch.float64), random_tensor(6, 2, 3, dtype=torch.float64)]
    inputs += [random_tensor(*bias, dtype=torch.float64)] if bias else []
    torch.autograd.gradcheck(
        lambda q, k, key_bias=None: ops.class_attention(q, k, offsets((2, 0, 3)), 3, key_bias=key_bias),
        [tensor.requires_grad_() for tensor in inputs],
    )
