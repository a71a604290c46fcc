"""A-ViT's halting, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtvit_ops import ops
from mtvit_ops.reference import halting_step as reference
from mtvit_ops.testing import offsets, random_tensor

# a token scores the same in every layer; channel 1 is 1, 10, 100, ... so that the output spells the layers' weights
TABLE = {  # score, layers; layers lived, ponder, output
    "0.3-of-5": (0.3, 5, 4, 4.1, 0.3 + 3 + 30 + 100),  # weights .3, .3, .3, .1
    "0.5-of-5": (0.5, 5, 2, 2.5, 0.5 + 5),  # weights .5, .5
    "0.995-of-5": (0.995, 5, 1, 2.0, 1.0),  # halts at once with all it has
    # the last layer takes what is left
    "0.1-of-3": (0.1, 3, 3, 3.8, 0.1 + 1 + 80),  # weights .1, .1, .8
}


@pytest.mark.parametrize(("score", "layers", "lived", "ponder", "output"), TABLE.values(), ids=TABLE)
def test_by_hand(score: float, layers: int, lived: int, ponder: float, output: float) -> None:
    """Two tokens a layer, the second of which is read out."""
    x = torch.full((2, 2), math.log(score / (1 - score)))
    rows, cu_seqlens = torch.tensor([0, 1], dtype=torch.int32), offsets((2,))
    readout = torch.tensor([1], dtype=torch.int32)
    sums = (torch.zeros(2), torch.ones(2), torch.zeros(2), torch.ones(2, dtype=torch.int32), torch.zeros(1, 2))
    for layer in range(layers):
        x[:, 1] = 10.0**layer
        *sums, _, rows, cu_seqlens = reference.halting_step(
            x, rows, cu_seqlens, readout, *sums, 1.0, 0.0, 0.01, layer == layers - 1
        )
        alive = 2 if layer + 1 < lived else 0
        assert rows.tolist() == [0, 1][:alive] + [-1] * (2 - alive)
        assert cu_seqlens.tolist() == [0, alive]
    assert sums[3].tolist() == [lived, lived]
    torch.testing.assert_close(sums[2], torch.full((2,), ponder))
    torch.testing.assert_close(sums[4][0, 1], torch.tensor(output))


@pytest.mark.parametrize("last", [False, True], ids=["layer", "last"])
@pytest.mark.parametrize("rows", [None, [0, 2, 3, -1]], ids=["all", "listed"])
def test_gradcheck(rows: list[int] | None, last: bool) -> None:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    readout = torch.tensor([0, 3], dtype=torch.int32)
    counters = torch.ones(5, dtype=torch.int32)
    # sums of 0.1 and 0.9, far from the threshold: who halts is a constant
    spent = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.1], dtype=torch.float64)
    inputs = [random_tensor(5, 3, dtype=torch.float64) * 0.3, spent, 1 - spent, 2 * spent]
    inputs.append(random_tensor(2, 3, dtype=torch.float64))

    def step(x: Tensor, cumulative: Tensor, remainder: Tensor, ponder: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        state = ops.HaltingState(cumulative, remainder, ponder, counters, output)
        found = ops.halting_step(
            x, rows, offsets((2, 1) if rows is not None else (3, 2)), readout, state,
            gate_scale=1.0, gate_center=0.0, last=last,
        )  # fmt: skip
        sums = found.state
        return sums.cumulative, sums.remainder, sums.ponder, sums.output, found.scores

    torch.autograd.gradcheck(step, [tensor.requires_grad_() for tensor in inputs])
