"""Calibration: the nearest cost that a method's knob reaches, found by brute force here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model_cases import build, build_case, make_images

from mtvit_ops import VisionTransformer, calibrate, count_macs, create_method
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.testing import assert_equal

BATCH = 3
FIELDS = {
    "avit": "gate_center",
    "avit-stop_with_class": "gate_center",
    "evovit-stage": "keep_ratios",
    "evovit-layer": "keep_ratios",
    "lifevit-budget": "keep_ratio",
    "lifevit-threshold": "keep_ratio",
    "mtvit": "cost_weight",
}


def ratio_of(model: VisionTransformer, images: torch.Tensor) -> float:
    dense = model.with_method(create_method("vit"))
    return count_macs(model, images).per_image / count_macs(dense, images).per_image


def reachable(name: str, images: torch.Tensor) -> list[float]:
    """Cost ratios over a fine sweep of the knob."""
    if name.startswith("avit"):
        values = torch.linspace(-5, 15, 161).tolist()
    elif name == "mtvit":
        values = torch.linspace(-8, 8, 161).tolist()
    else:
        # of at most 16 patches
        values = [step / 96 for step in range(1, 97)]
    model, ratios = build_case(name), set()
    dense = count_macs(model.with_method(create_method("vit")), images).per_image
    for value in values:
        model.method.config = dataclasses.replace(model.method.config, **{FIELDS[name]: value})
        model.method.attach(model)
        ratios.add(count_batch_macs(model, images) / dense)
    return sorted(ratios)


@pytest.fixture(scope="module")
def sweeps() -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("target", [0.05, 0.5, 0.65, 0.8, 1.0])
@pytest.mark.parametrize("name", FIELDS)
def test_reaches_the_nearest_ratio(name: str, target: float, sweeps: dict[str, list[float]]) -> None:
    model, images = build_case(name), make_images(BATCH)
    found = calibrate(model, images, mac_ratio=target)
    assert (found.field, found.target) == (FIELDS[name], target)
    assert getattr(model.method.config, found.field) == found.value
    # what it says is what the model, as it was left, costs
    assert ratio_of(model, images) == pytest.approx(found.mac_ratio, rel=1e-9)
    if name not in sweeps:
        sweeps[name] = reachable(name, images)
    nearest = min(abs(ratio - target) for ratio in sweeps[name])
    # a hit within 5e-4 is not searched on
    assert abs(found.mac_ratio - target) <= max(nearest, 5e-4) + 1e-9


@pytest.mark.parametrize("name", FIELDS)
def test_only_the_knob_is_turned(name: str) -> None:
    model, images = build_case(name), make_images(BATCH)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    config = dataclasses.asdict(model.method.config)
    calibrate(model, images, mac_ratio=0.7)
    for key, value in model.state_dict().items():
        assert_equal(key, value, weights[key])
    after = dataclasses.asdict(model.method.config)
    assert {key for key in config if config[key] != after[key]} <= {FIELDS[name]}
    assert not model.training


@pytest.mark.parametrize(
    ("name", "options", "unset"),
    [("lifevit", {"budgets": (9, 5, 2), "base_block": 3}, "budgets"), ("mtvit", {"force_tail": 0}, "force_tail")],
)
def test_fields_that_override_the_knob_are_unset(name: str, options: dict[str, Any], unset: str) -> None:
    model, images = build(name, **options), make_images(BATCH)
    found = calibrate(model, images, mac_ratio=0.8)
    assert getattr(model.method.config, unset) is None
    assert ratio_of(model, images) == pytest.approx(found.mac_ratio, rel=1e-9)


def test_a_mt_vit_that_prefers_nothing() -> None:
    # before training all images take one tail, so each tail's cost is all there is
    model, images = build("mtvit"), make_images(BATCH)
    with torch.no_grad():
        model.method.predictor.head.weight.zero_()
        model.method.predictor.head.bias.zero_()
    costs = model.method.relative_costs
    assert calibrate(model, images, mac_ratio=1.0).mac_ratio == pytest.approx(costs[2], rel=1e-6)
    assert calibrate(model, images, mac_ratio=0.1).mac_ratio == pytest.approx(costs[0], rel=1e-6)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_ratios_outside_the_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"mac_ratio must be in \(0.0, 1.0\], got"):
        calibrate(build("avit"), make_images(1), mac_ratio=ratio)


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(TypeError, match="mac_ratio must be a number, got str"):
        calibrate(build("avit"), make_images(1), mac_ratio="0.5")
    with pytest.raises(ValueError, match="model must have a cost to calibrate, got Dense"):
        calibrate(build("vit"), make_images(1))
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        calibrate(build("avit"), make_images(0))
    with pytest.raises(ValueError, match="images must have shape"):
        calibrate(build("avit"), make_images(1, 32))
