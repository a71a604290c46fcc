"""Any weights at a chosen cost: a method's one knob, turned until the real cost fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_real
from .flops import count_batch_macs
from .methods import Dense, Life, MTViT
from .nn import VisionTransformer
from .nn.vision_transformer import check_flat

_STEPS = 30  # halvings of an interval
_CLOSE = 5e-4  # no cost nearer to the target is worth another run
_FAR = 1e4  # gate centres up to this, times the gate's slope, are searched


class Calibration(NamedTuple):
    """What ``calibrate`` reached."""

    field: str  # the configuration field that was set
    value: float  # what it was set to
    mac_ratio: float  # adaptive over dense multiply-accumulates on the given images
    target: float  # what was asked for


def calibrate(model: VisionTransformer, images: Tensor, mac_ratio: float = 0.65) -> Calibration:
    """Set the method's cost field so that these images cost a given share of the dense model's operations.

    The field is A-ViT's ``gate_center``, Evo-ViT's ``keep_ratios``, Life Regression's ``keep_ratio`` (its
    ``budgets`` are unset) and MT-ViT's ``cost_weight`` (its ``force_tail`` is unset). It ends at the nearest cost
    that can be reached on these images: token counts are whole numbers, and an MT-ViT has as many costs as images and
    tails allow. The rest of the configuration, and all weights, stay.

    Args:
        model: any model of this package but the dense one; changed in place.
        images: what to calibrate on, (B, in_chans, img_size, img_size), B >= 1.
        mac_ratio: wanted share of the dense model's multiply-accumulates, in (0, 1].

    Returns:
        Calibration(field, value, mac_ratio, target): what was set, and what it reached.

    Raises:
        ValueError, TypeError: a dense model, no image, or a ratio outside (0, 1].

    Runs the model some twenty times; waits for the device.
    """
    check_real("mac_ratio", mac_ratio, 0.0, 1.0, open_low=True)
    check_flat(model)
    field = model.method.cost_field
    if field is None:
        raise ValueError(f"model must have a cost to calibrate, got {type(model.method).__name__}")
    model.check_images(images)
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    dense = count_batch_macs(model.with_method(Dense(Dense.config_class())), images)

    tried: dict[float, float] = {}

    def ratio_at(value: float) -> float:
        if value not in tried:
            _set(model, field, value)
            tried[value] = count_batch_macs(model, images) / dense
        return tried[value]

    if isinstance(model.method, MTViT):
        _set(model, field, 0.0)
        _search(ratio_at, _tail_weights(model, images), mac_ratio)
    elif field == "gate_center":
        far = _FAR * max(1.0, abs(model.method.config.gate_scale))
        _bisect(ratio_at, -far, far, mac_ratio, 0.0)
    else:
        # a keep ratio is never 0, and one token is the smallest step
        _bisect(ratio_at, 1e-6, 1.0, mac_ratio, 0.25 / model.config.num_patches)
    # nearest; among equals the dearer, which drops less
    best = min(tried, key=lambda value: (abs(tried[value] - mac_ratio), -tried[value]))
    _set(model, field, best)
    return Calibration(field, best, tried[best], mac_ratio)


def _set(model: VisionTransformer, field: str, value: float) -> None:
    method = model.method
    changes: dict[str, object] = {field: value}
    if isinstance(method, Life):
        changes["budgets"] = None
    if isinstance(method, MTViT):
        changes["force_tail"] = None
    method.config = dataclasses.replace(method.config, **changes)
    method.attach(model)


def _bisect(ratio_at: Callable[[float], float], low: float, high: float, target: float, narrowest: float) -> None:
    """Halve the interval around the target; cost rises with the value."""
    if ratio_at(high) <= target or ratio_at(low) >= target:
        return
    for _ in range(_STEPS):
        middle = (low + high) / 2
        ratio = ratio_at(middle)
        if abs(ratio - target) < _CLOSE or high - low < narrowest:
            return
        if ratio < target:
            low = middle
        else:
            high = middle


def _search(ratio_at: Callable[[float], float], values: list[float], target: float) -> None:
    """Try values on both sides of the target; they rise, and cost falls with them."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if ratio_at(values[middle]) > target:
            low = middle + 1
        else:
            high = middle
    for index in (low - 1, low):
        ratio_at(values[max(index, 0)])


def _tail_weights(model: VisionTransformer, images: Tensor) -> list[float]:
    """One cost weight for every way in which these images can be divided among the tails."""
    method = model.method
    assert isinstance(method, MTViT)
    with torch.no_grad():
        scores = method.predictor(images).double()  # (B, K)
    costs = scores.new_tensor(method.relative_costs)
    # where two tails of an image are worth the same, its choice changes
    gaps = costs[:, None] - costs[None]
    crossings = (scores[:, :, None] - scores[:, None, :]) / gaps
    points = crossings[:, gaps > 0].flatten().unique().tolist()
    if not points:
        return [0.0]
    between = [(before + after) / 2 for before, after in zip(points, points[1:])]
    return [points[0] - 1.0, *between, points[-1] + 1.0]
