"""ragged_patch_embed, computed by hand, and its gradient against finite differences."""

from __future__ import annotations

import torch
from torch import Tensor

from mtvit_ops import ops
from mtvit_ops.reference import ragged_patch_embed as reference
from mtvit_ops.testing import random_tensor


def test_by_hand() -> None:
    """D = 1; tail 0 sums 2 x 2 pixels, tail 1 doubles each pixel."""
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    x, cu_seqlens = reference.ragged_patch_embed(
        images,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([[100.0]]),
        [torch.ones(1, 1, 2, 2), torch.full((1, 1, 1, 1), 2.0)],
        [torch.tensor([0.5]), torch.tensor([0.25])],
        [torch.tensor([[1000.0], [2000.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])],
        [2, 1],
        [0, 0],
    )
    assert cu_seqlens.tolist() == [0, 2, 7]
    assert x[:, 0].tolist() == [1100.0, 2010.5, 101.0, 4.25, 5.25, 6.25, 7.25, 0.0, 0.0, 0.0]


def test_gradcheck() -> None:
    chosen = torch.tensor([1, 0, 1], dtype=torch.int32)
    shapes = ((3, 2, 4, 6), (1, 3), (3, 2, 2, 2), (3, 2, 3, 3), (3,), (3,), (7, 3), (7, 3))
    inputs = [random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def embed(images: Tensor, prefix: Tensor, *lists: Tensor) -> Tensor:
        return ops.ragged_patch_embed(
            images, chosen, prefix, lists[:2], lists[2:4], lists[4:], strides=[2, 2], paddings=[0, 1]
        )[0]

    torch.autograd.gradcheck(embed, inputs)
