"""What two of the methods promise, learnt from scratch on sets of two classes: little enough for a CPU's minute."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops import create_model
from mtvit_ops.nn import VisionTransformer
from mtvit_ops.train import compute_loss
from mtvit_ops.train.mt_vit import all_logits


def bright_quarter(batch: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright quarter somewhere, (batch, 3, 32, 32), and whether it is red or green."""
    target, places = torch.randint(2, (batch,)), 16 * torch.randint(2, (batch, 2))
    images = 0.5 * torch.randn(batch, 3, 32, 32)
    for image, channel, (row, column) in zip(images, target.tolist(), places.tolist()):
        image[channel, row : row + 16, column : column + 16] += 1.5
    return images, target


def train_quarters(model: VisionTransformer, steps: int, ponder: float, distribution: float) -> VisionTransformer:
    """The model itself, after as many steps at a falling rate."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        images, target = bright_quarter(32)
        optimizer.zero_grad()
        compute_loss(model, images, target, ponder=ponder, distribution=distribution, target_depth=2)[0].backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def mean_depth(model: VisionTransformer) -> tuple[float, float]:
    """Layers that a token lives, and the share of images classified rightly, over fresh images."""
    images, target = bright_quarter(500)
    logits, trace = model.eval()(images, return_trace=True)
    return trace.extras["counters"].float().mean().item(), accuracy(logits, target)


def accuracy(logits: Tensor, target: Tensor) -> float:
    return (logits.argmax(dim=1) == target).float().mean().item()


def test_a_vit_learns_to_halt() -> None:
    # seeds 1 to 3 do it, too
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 2}
    model = create_model("avit_tiny_patch16_224", **sizes, gate_scale=2.0, gate_center=5.0)
    train_quarters(model, 60, ponder=0.0, distribution=0.0)
    before, _ = mean_depth(model)
    # on from there: for nothing, to compare, and with time at a price
    free, _ = mean_depth(train_quarters(copy.deepcopy(model), 100, ponder=0.0, distribution=0.0))
    after, right = mean_depth(train_quarters(model, 100, ponder=0.05, distribution=2e-3))
    assert min(before, free) > 3.6
    assert after < 3.3
    assert right > 0.95


class Toy(NamedTuple):
    """Two classes, that half of the images show coarsely and half in small patches only."""

    images: Tensor  # (B, 3, 16, 16)
    target: Tensor  # (B,)
    fine: Tensor  # (B,) bool: it takes small patches


def red_or_stripes(batch: int) -> Toy:
    """Red, more or less; or, on blue, stripes along or across in one of 16 places."""
    target, fine = torch.arange(batch) % 2, torch.arange(batch) % 4 >= 2
    images = 0.1 * torch.randn(batch, 3, 16, 16)
    images[:, 0] += (2.0 * target - 1.0)[:, None, None] * ~fine[:, None, None]
    images[:, 2] += 1.0 * fine[:, None, None]
    # of either sign, in noise that drowns them in the image but not in their patch
    images[:, 1] *= 20
    ramp = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(4, 4)
    for image in fine.nonzero()[:, 0].tolist():
        row, column = (4 * torch.randint(4, (2,))).tolist()
        stripes = ramp if target[image] == 0 else ramp.T
        images[image, 1, row : row + 4, column : column + 4] += 3.5 * stripes * (2 * int(torch.randint(2, ())) - 1)
    return Toy(images, target, fine)


def test_mt_vit_learns_to_route() -> None:
    # 12 of its specification; seeds 1 to 3 do it, too
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2}
    model = create_model("mtvit_tiny_patch16_224", **sizes, grids=(1, 4), predictor_size=16)
    costs = model.method.relative_costs
    target_cost = sum(costs) / 2
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(260):
        images, target, _ = red_or_stripes(64)
        optimizer.zero_grad()
        compute_loss(model, images, target, cost_target=target_cost)[0].backward()
        optimizer.step()
    images, target, fine = red_or_stripes(1000)
    with torch.inference_mode():
        logits, trace = model.eval()(images, return_trace=True)
        every = all_logits(model, images)
    tail = trace.extras["tail"]
    right, cheap, dear = accuracy(logits, target), accuracy(every[0], target), accuracy(every[1], target)
    by_chance = tail[torch.randperm(len(tail))]  # the same costs
    chance = accuracy(every[by_chance, torch.arange(len(tail))], target)
    assert (tail[fine] == 1).float().mean() > 0.9
    assert (tail[~fine] == 0).float().mean() > 0.9
    cost = sum(costs[each] for each in tail.tolist()) / len(tail)
    assert cost == pytest.approx(target_cost, abs=0.02)
    assert right > 0.95
    # what the cheapest tail cannot give, nor half of the images at random
    assert cheap < 0.85
    assert right > chance + 0.05
    assert right > dear - 0.02
