"""ragged_patch_embed against F.conv2d, image by image."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import ragged_patch_embed
from mtvit_ops.testing import assert_equal, assert_matches_formula, offsets, random_tensor


class Tail(NamedTuple):
    kernel: int
    stride: int
    padding: int = 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return tuple((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (height, width))


class Case(NamedTuple):
    tails: tuple[Tail, ...]
    chosen: tuple[int, ...]
    height: int = 12
    width: int = 12
    channels: int = 3
    prefix: int = 1
    dim: int = 10
    strided: bool = False  # channels last, and every tensor a view into a larger one


def shuffled(*counts: int) -> tuple[int, ...]:
    """Each tail for as many images as its count, mixed."""
    tails = [tail for tail, count in enumerate(counts) for _ in range(count)]
    return tuple(random.Random(0).sample(tails, len(tails)))


HALVES, THIRDS, OVERLAPPING = Tail(6, 6), Tail(4, 4), Tail(5, 3, 2)
CASES = {
    "one-tail": Case((HALVES,), (0, 0)),
    "two-tails": Case((HALVES, THIRDS), (0, 1, 1, 0)),
    "three-tails-overlapping": Case((HALVES, THIRDS, OVERLAPPING), (2, 0, 1)),
    # its parameters' gradients are zeros, not missing
    "unused-tail": Case((HALVES, THIRDS, OVERLAPPING), (1, 1)),
    "one-image": Case((HALVES, THIRDS), (1,)),
    "B0": Case((HALVES, THIRDS), ()),
    "one-patch": Case((Tail(12, 12), HALVES), (0, 1)),
    "no-prefix": Case((HALVES, THIRDS), (1, 0), prefix=0),
    "two-prefix-tokens": Case((HALVES, THIRDS), (1, 0), prefix=2),
    "one-channel-odd-dim": Case((HALVES, THIRDS), (1, 0), channels=1, dim=7),
    # pixels that no patch covers
    "remainder": Case((Tail(5, 5), THIRDS), (0, 1)),
    # grids that are not square; 2 x 8 patches could pass for 4 x 4
    "wide": Case((HALVES, THIRDS), (0, 1), width=24),
    "2x8-patches": Case((THIRDS,), (0, 0), height=8, width=32),
    "strided": Case((HALVES, OVERLAPPING), (1, 0, 1), strided=True),
    # tails with one token more, as many as and one less than a tile; more images than the plan sorts at once
    "tile-edges": Case((Tail(2, 2), Tail(1, 1), Tail(2, 2)), shuffled(129, 32, 127), 2, 2, channels=1, prefix=0),
    # patches enough for several spans of a weight's gradient, and some for none
    "spans": Case((Tail(2, 2), THIRDS, HALVES), shuffled(9, 2, 0), 16, 16),
    # several tiles of columns and of pixels, the last ones part empty
    "wide-tiles": Case((Tail(7, 7), HALVES), (0, 1), 14, 14, dim=200),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_conv2d(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    def draw(*shape: int) -> Tensor:
        if not case.strided:
            return random_tensor(*shape, dtype=dtype, device=device)
        larger = random_tensor(*(2 * size for size in shape[::-1]), dtype=dtype, device=device)
        return larger[tuple(slice(size) for size in shape[::-1])].permute(*range(len(shape))[::-1])

    inputs = {
        "images": draw(len(case.chosen), case.channels, case.height, case.width),
        "prefix": draw(case.prefix, case.dim),
    }
    for place, tail in enumerate(case.tails):
        inputs[f"weight{place}"] = draw(case.dim, case.channels, tail.kernel, tail.kernel)
        inputs[f"bias{place}"] = draw(case.dim)
        high, wide = tail.grid(case.height, case.width)
        inputs[f"table{place}"] = draw(case.prefix + high * wide, case.dim)
    chosen = torch.tensor(case.chosen, dtype=torch.int32, device=device)
    if case.strided:
        chosen = chosen.repeat_interleave(2)[::2]

    def lists(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
        return [[tensors[f"{kind}{place}"] for place in range(len(case.tails))] for kind in ("weight", "bias", "table")]

    def op(images: Tensor, prefix: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        strides, paddings = [tail.stride for tail in case.tails], [tail.padding for tail in case.tails]
        return ragged_patch_embed(images, chosen, prefix, *lists(tensors), strides, paddings)

    def formula(images: Tensor, prefix: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases, tables = lists(tensors)
        packed = [images.new_zeros(0, case.dim)]
        for image, place in zip(images, case.chosen, strict=True):
            tail = case.tails[place]
            patches = F.conv2d(image[None], weights[place], biases[place], tail.stride, tail.padding)[0]
            packed.append(torch.cat((prefix, patches.flatten(1).T)) + tables[place])
        lengths = [len(tokens) for tokens in packed[1:]]
        room = len(images) * max(len(table) for table in tables)
        packed.append(images.new_zeros(room - sum(lengths), case.dim))
        return torch.cat(packed), offsets(lengths, device)

    assert_matches_formula(op, formula, inputs)


def test_parameters_alone_have_the_same_gradients(backend: str, device: str, dtype: torch.dtype) -> None:
    """Training does not pay for the gradient of the images."""
    grads = []
    for images_too in (True, False):
        torch.manual_seed(0)
        images, *parameters = (
            random_tensor(*shape, dtype=dtype, device=device).requires_grad_()
            for shape in ((2, 3, 8, 8), (1, 5), (5, 3, 4, 4), (5,), (5, 5))
        )
        prefix, weight, bias, table = parameters
        chosen = torch.zeros(2, dtype=torch.int32, device=device)
        x, _ = ragged_patch_embed(
            images.requires_grad_(images_too), chosen, prefix, [weight], [bias], [table], [4], [0]
        )
        x.square().sum().backward()
        assert (images.grad is not None) == images_too
        grads.append([parameter.grad for parameter in parameters])
    for got, want in zip(*grads, strict=True):
        assert_equal("gradient", got, want)


def good() -> dict:
    return {
        "images": torch.ones(2, 3, 8, 8),
        "tails": torch.tensor([0, 1], dtype=torch.int32),
        "prefix": torch.ones(1, 5),
        "weights": [torch.ones(5, 3, 4, 4), torch.ones(5, 3, 8, 8)],
        "biases": [torch.ones(5), torch.ones(5)],
        "pos_embeds": [torch.ones(5, 5), torch.ones(2, 5)],
        "strides": [4, 8],
        "paddings": [0, 0],
    }


def at(name: str, place: int, value: object) -> dict:
    values = list(good()[name])
    values[place] = value
    return {name: values}


BAD = {
    "images-rank": ({"images": torch.ones(3, 8, 8)}, ValueError, r"images must have shape \(B, C, H, W\)"),
    "images-bytes": ({"images": torch.ones(2, 3, 8, 8).byte()}, TypeError, "images must have dtype"),
    "images-too-small": ({"images": torch.ones(2, 3, 3, 3)}, ValueError, "images must be at least as large"),
    "tails-count": ({"tails": torch.zeros(3, dtype=torch.int32)}, ValueError, r"tails must have shape \(2,\)"),
    "tails-dtype": ({"tails": torch.tensor([0, 1])}, TypeError, "tails must have dtype int32"),
    "tails-device": ({"tails": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "tails must be on cpu"),
    "tails-beyond": ({"tails": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, r"tails must be in \[0, 2\)"),
    "tails-negative": ({"tails": torch.tensor([0, -1], dtype=torch.int32)}, ValueError, "tails must be in"),
    "prefix-rank": ({"prefix": torch.ones(5)}, ValueError, "prefix must have shape"),
    "prefix-dtype": ({"prefix": torch.ones(1, 5).half()}, TypeError, "prefix must have dtype"),
    "no-tail": ({"weights": []}, ValueError, "weights must hold at least one tail"),
    "biases-too-few": ({"biases": [torch.ones(5)]}, ValueError, "biases must hold 2 entries"),
    "strides-too-few": ({"strides": [4]}, ValueError, "strides must hold 2 entries"),
    "weight-channels": (at("weights", 0, torch.ones(5, 1, 4, 4)), ValueError, r"weights\[0\] must have shape"),
    "weight-dtype": (at("weights", 1, torch.ones(5, 3, 8, 8).half()), TypeError, r"weights\[1\] must have dtype"),
    "bias-shape": (at("biases", 1, torch.ones(4)), ValueError, r"biases\[1\] must have shape"),
    "table-length": (at("pos_embeds", 0, torch.ones(4, 5)), ValueError, r"pos_embeds\[0\] must have shape \(5, 5\)"),
    "stride-0": (at("strides", 0, 0), ValueError, r"strides\[0\] must be >= 1"),
    "padding-negative": (at("paddings", 1, -1), ValueError, r"paddings\[1\] must be >= 0"),
    "stride-float": (at("strides", 0, 4.0), TypeError, r"strides\[0\] must be an int, got float"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        ragged_patch_embed(**{**good(), **changes})
