"""varlen_attention, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtvit_ops import ops
from mtvit_ops.reference import varlen_attention as reference
from mtvit_ops.testing import offsets, random_tensor

INF = math.inf
# one head, d = 1, scale 1: the logits are q * (0, 1, 2); v is the unit matrix, so the output is the softmax row
TABLE = {
    # e^0, e^1, e^2 over their sum 11.107338
    "softmax": (None, [[0.090031, 0.244728, 0.665241]], [2.407606]),
    # a bias of log w weighs the keys: 1, 0.5 e, 0.25 e^2 over their sum 4.206405
    "weighted-softmax": ([0.0, math.log(0.5), math.log(0.25)], [[0.237733, 0.323112, 0.439155]], [1.436608]),
    # without the last key: 1, e over 3.718282
    "removed-key": ([0.0, 0.0, -INF], [[0.268941, 0.731059, 0.0]], [1.313262]),
    "all-removed": ([-INF, -INF, -INF], [[0.0, 0.0, 0.0]], [-INF]),
}


@pytest.mark.parametrize(("bias", "row", "lse"), TABLE.values(), ids=TABLE)
def test_by_hand(bias: list[float] | None, row: list[list[float]], lse: list[float]) -> None:
    out, log_sum, scores = reference.varlen_attention(
        torch.ones(1, 1, 1), torch.arange(3.0).reshape(3, 1, 1), torch.eye(3)[:, None], offsets((1,)), offsets((3,)),
        1, 3, 1.0, None if bias is None else torch.tensor(bias), reference.CLASS_SCORES,
    )  # fmt: skip
    close = {"atol": 1e-6, "rtol": 0}  # the literals have six digits
    torch.testing.assert_close(out[:, 0], torch.tensor(row), **close)
    torch.testing.assert_close(log_sum[:, 0], torch.tensor(lse), **close)
    torch.testing.assert_close(scores[:, 0], torch.tensor(row[0]), **close)


def test_mean_scores_by_hand() -> None:
    """Queries 1 and 0 of the weighted row; a second image with two keys and no query."""
    q, k = torch.tensor([1.0, 0.0]).reshape(2, 1, 1), torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0]).reshape(5, 1, 1)
    bias = torch.tensor([1.0, 0.5, 0.25, 1.0, 1.0]).log()
    _, _, scores = reference.varlen_attention(
        q, k, torch.ones(5, 1, 1), offsets((2, 0)), offsets((3, 2)), 2, 3, 1.0, bias, reference.MEAN_SCORES
    )
    # 1, 0.5, 0.25 over 1.75 is the second query's row
    rows = [[0.237733, 0.323112, 0.439155], [0.571429, 0.285714, 0.142857]]
    wanted = torch.cat((torch.tensor(rows).mean(dim=0), torch.zeros(2)))
    torch.testing.assert_close(scores[:, 0], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [None, "token", "head", "head-removed"])
def test_gradcheck(bias: str | None) -> None:
    q, k, v = (random_tensor(size, 2, dim, dtype=torch.float64) for size, dim in ((4, 3), (6, 3), (6, 2)))
    key_bias = None
    if bias is not None:
        key_bias = random_tensor(*((6,) if bias == "token" else (6, 2)), dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v, key_bias) if tensor is not None]
    removed = torch.zeros(6, 2, dtype=torch.float64)
    if bias == "head-removed":
        removed[1, 0] = removed[4, 1] = -INF

    def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        if bias == "head-removed":
            key_bias = key_bias + removed
        return ops.varlen_attention(q, k, v, offsets((1, 0, 3)), 3, offsets((2, 1, 3)), 3, key_bias=key_bias)

    torch.autograd.gradcheck(attend, inputs)
