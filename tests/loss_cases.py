"""What the tests of training share: targets, gradients by name, and slopes."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TINY
from torch import Tensor

from mtvit_ops.nn import VisionTransformer
from mtvit_ops.train import compute_loss


def make_target(batch: int, *, soft: bool = True, device: str = "cpu") -> Tensor:
    """Soft targets (B, 10), float32, or class indices (B,)."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(batch, TINY["num_classes"], generator=generator)
    return (scores.softmax(dim=1) if soft else scores.argmax(dim=1)).to(device)


def gradients(model: VisionTransformer, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter of ``model``, which may have run as a twin; zeros where there is none."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(parameters.items(), found, strict=True)
    }


def assert_slope(model: VisionTransformer, images: Tensor, target: Tensor, **weights: Any) -> None:
    """The gradients of a float64 model against the central difference along one random direction of all parameters.

    Both are exact but for the third derivative times the step squared, and rounding over the step: 1e-6 of the slope
    leaves room for either at a step of 1e-5.
    """
    step, generator = 1e-5, torch.Generator().manual_seed(4)
    parameters = dict(model.named_parameters())
    directions = {
        name: torch.randn(value.shape, generator=generator).to(value) * value.std().nan_to_num()
        for name, value in parameters.items()
    }
    grads = gradients(model, compute_loss(model, images, target, **weights)[0])
    slope = sum(float((grads[name] * directions[name]).detach().sum()) for name in parameters)
    ends = []
    for factor in (step, -2 * step):
        with torch.no_grad():
            for name, value in parameters.items():
                value.add_(directions[name], alpha=factor)
        # with gradients on, so that the very same operators run
        ends.append(float(compute_loss(model, images, target, **weights)[0].detach()))
    found = (ends[0] - ends[1]) / (2 * step)
    assert slope != 0
    assert abs(found - slope) <= 1e-6 * abs(slope), f"slope {found:.10e}, gradients say {slope:.10e}"


def saved_bytes(model: VisionTransformer, images: Tensor, target: Tensor, **weights: Any) -> int:
    """What a forward pass keeps for its gradient, parameters included; what is computed again is not seen."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_loss(model, images, target, **weights)
    return total
