"""The choice of a tail and the terms of MT-ViT's loss, each alone: 1.4 and 1.8 of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import assert_rounding
from torch.nn import functional as F

from mtvit_ops.methods.mt_vit import tail_macs
from mtvit_ops.nn import ViTConfig
from mtvit_ops.testing import assert_equal
from mtvit_ops.train.mt_vit import (
    MTViTLoss,
    choose,
    distillation_term,
    entropy_term,
    entropy_weight_at,
    flops_term,
    gumbel_noise,
    temperature_at,
)

BATCH = 6


def test_how_often_each_tail_is_drawn() -> None:
    # 5: 200 000 draws; the same noise draws the same tails at every temperature
    scores = torch.tensor([1.0, 0.0, -1.0]).expand(200_000, 3)
    noise = gumbel_noise(scores)
    tails = choose(scores, 1.0, noise).tail
    shares = [(tails == tail).double().mean().item() for tail in range(3)]
    assert shares == pytest.approx([0.6652, 0.2447, 0.0900], abs=0.004)
    for temperature in (0.1, 0.5, 5.0):
        assert_equal("tail", choose(scores, temperature, noise).tail, tails)


def test_gumbel_noise_is_standard() -> None:
    noise = gumbel_noise(torch.empty(200_000, dtype=torch.float64))
    assert noise.dtype == torch.float64
    assert bool(noise.isfinite().all())
    # mean: Euler's constant; deviation: pi / sqrt(6); four standard errors, the fourth central moment being 5.4 var^2
    deviation, error = math.pi / math.sqrt(6), math.pi / math.sqrt(6 * len(noise))
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * error)
    assert noise.var().item() == pytest.approx(deviation**2, abs=4 * deviation**2 * math.sqrt(4.4 / len(noise)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_a_choice_is_exactly_one_hot(temperature: float, dtype: torch.dtype) -> None:
    # 6
    scores = torch.randn(5000, 3, dtype=dtype)
    tail, weights = choose(scores, temperature, gumbel_noise(scores))
    assert_equal("weights", weights, F.one_hot(tail.long(), 3).to(dtype))


# 6: temperature, y, gradient of the scores
WORKED = {
    1.0: ((0.335391, 0.552967, 0.111642), (0.149291, -0.222647, 0.073356)),
    0.5: ((0.261159, 0.709904, 0.028937), (0.311145, -0.357886, 0.046742)),
}


@pytest.mark.parametrize("temperature", WORKED)
def test_worked_straight_through_gradient(temperature: float) -> None:
    soft, gradient = WORKED[temperature]
    scores = torch.tensor([[0.5, 0.2, -0.3]], requires_grad=True)
    noise = torch.tensor([[0.1, 0.9, -0.2]])
    tails = torch.diag(torch.tensor([2.0, 1.0, 3.0]))[:, None]  # (K, 1, C)
    choice = choose(scores, temperature, noise)
    # the slope of each weight is that of the softmax
    (slope,) = torch.autograd.grad(choice.weights[0, 1], scores, retain_graph=True)
    want = [soft[1] * ((place == 1) - soft[place]) / temperature for place in range(3)]
    assert slope[0].tolist() == pytest.approx(want, abs=2e-6)  # six decimals in the table
    value = F.cross_entropy((choice.weights.T[:, :, None] * tails).sum(dim=0), torch.tensor([1]))
    value.backward()
    assert choice.tail.tolist() == [1]
    assert value.item() == pytest.approx(0.551445, abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)
    assert scores.grad.sum().item() == pytest.approx(0.0, abs=1e-6)


def test_distillation() -> None:
    logits = torch.randn(3, BATCH, 10, dtype=torch.float64, requires_grad=True)
    value = distillation_term(logits)
    value.backward()
    teacher = logits[2].softmax(dim=1)
    want = sum((teacher * (teacher / logits[k].softmax(dim=1)).log()).sum(dim=1).mean() for k in range(2))
    assert_rounding(value.detach(), want.detach(), depth=1)
    assert_equal("the dearest tail's", logits.grad[2], torch.zeros_like(logits[2]))
    assert_rounding(logits.grad[:2], (logits[:2].softmax(dim=2) - teacher).detach() / BATCH, depth=1)
    assert distillation_term(logits[:1]) == 0  # a single tail has no one to teach


def test_cost_of_a_histogram() -> None:
    # 8: DeiT-S without its predictor
    sizes = ViTConfig(embed_dim=384, num_heads=6)
    macs = [tail_macs(sizes, grid, kernel) for grid, kernel in ((7, 32), (10, 23), (14, 16))]
    costs = tuple(each / macs[2] for each in macs)
    weights = F.one_hot(torch.tensor([0] * 5 + [1] * 3 + [2] * 2), 3).double()
    mean = sum(cost * share for cost, share in zip(costs, weights.mean(dim=0).tolist(), strict=True))
    assert mean == pytest.approx(0.474287, abs=1e-5)  # from GMACs with four decimals, of 4.5989
    assert mean * macs[2] / 1e9 == pytest.approx(2.1812, abs=1e-4)
    for target, one_sided, want in ((0.5, False, 6.611e-4), (0.5, True, 0.0)):
        assert flops_term(weights, costs, target, one_sided).item() == pytest.approx(want, rel=1e-3)
    # above the target both forms are the same
    assert flops_term(weights, costs, 0.4, True) == flops_term(weights, costs, 0.4, False) > 0
    # the specification's other target, two-sided and one-sided
    assert flops_term(weights, costs, 0.6).item() == pytest.approx(1.5804e-2, rel=1e-3)
    assert flops_term(weights, costs, 0.6, True) == 0


def test_cost_is_of_the_batch_and_not_of_each_image() -> None:
    # half the images at each end: at the target, and no gradient anywhere
    weights = torch.eye(2).repeat(4, 1).requires_grad_()
    value = flops_term(weights, (0.25, 1.0), 0.625)
    value.backward()
    assert value == 0
    assert_equal("gradient", weights.grad, torch.zeros(8, 2))


def test_entropy() -> None:
    assert entropy_term(torch.zeros(4, 3)).item() == pytest.approx(-math.log(3), rel=1e-6)
    # sure of itself, but balanced over the batch
    assert entropy_term(40 * torch.eye(2)).item() == pytest.approx(-math.log(2), rel=1e-6)
    collapsed = torch.tensor([[40.0, 0.0], [40.0, 0.0]], requires_grad=True)
    value = entropy_term(collapsed)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert bool(collapsed.grad.isfinite().all())


def test_schedules() -> None:
    assert [entropy_weight_at(progress) for progress in (0.0, 1 / 6, 1 / 3, 1.0)] == pytest.approx([0.01, 0.005, 0, 0])
    assert [temperature_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([5.0, math.sqrt(2.5), 0.5])
    for schedule in (entropy_weight_at, temperature_at):
        with pytest.raises(ValueError, match=r"progress must be in \[0.0, 1.0\], got 1.5"):
            schedule(1.5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mode": "soft"}, ValueError, "mode must be one of 'dense', 'sparse', 'tails', 'classes', 'regret', got"),
        ({"tails": -1.0}, ValueError, "tails must be in"),
        ({"flops": "2"}, TypeError, "flops must be a number, got str"),
        ({"entropy": float("nan")}, ValueError, "entropy must be in"),
        ({"mode": "sparse", "tails": 1.0}, ValueError, "tails must be 0 in mode 'sparse', which has no such weight"),
        ({"mode": "sparse", "distillation": 0.5}, ValueError, "distillation must be 0 in mode 'sparse'"),
        ({"mode": "tails", "tails": 1.0}, ValueError, "tails must be 0 in mode 'tails'"),
        ({"mode": "tails", "flops": 1.0}, ValueError, "flops must be 0 in mode 'tails'"),
        ({"mode": "classes", "class_task": 1.0}, ValueError, "class_task must be 0 in mode 'classes'"),
        (
            {"mode": "tails", "cost_target": 0.6},
            ValueError,
            r"cost_target must be 0\.5 in mode 'tails', which chooses no",
        ),
        ({"mode": "regret", "one_sided": True}, ValueError, "one_sided must be False in mode 'regret'"),
        ({"mode": "classes", "temperature": 2.0}, ValueError, r"temperature must be 1\.0 in mode 'classes'"),
        ({"cost_target": 0.0}, ValueError, "cost_target"),
        ({"cost_target": 1.5}, ValueError, "cost_target"),
        ({"one_sided": None}, ValueError, "one_sided must be one of True, False, got None"),
        ({"estimator": "mean"}, ValueError, "estimator must be one of 'gumbel', 'expected', got 'mean'"),
        ({"mode": "sparse", "estimator": "expected"}, ValueError, "estimator must be 'gumbel' in mode 'sparse'"),
        ({"mode": "tails", "estimator": "expected"}, ValueError, "estimator must be 'gumbel' in mode 'tails'"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    ],
)
def test_bad_weights(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MTViTLoss(**options)


def test_a_weight_of_0_for_a_term_that_is_not_there() -> None:
    assert MTViTLoss("classes", class_task=0.0, tails=0.0).of_terms() == {"class_task": 1.0}
    assert MTViTLoss("sparse", tails=0.0).of_terms() == {"task": 1.0, "flops": 2.0, "entropy": 0.01}
