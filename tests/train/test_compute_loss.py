"""The door, for every method there is."""

from __future__ import annotations

import pytest
import torch
from model_cases import ALL, build_case

from mtvit_ops.train import compute_loss

# its own way of stopping needs another forward than the loss has
REFUSED = {"avit-stop_with_class"}
WEIGHTS = {"mtvit": {"cost_target": 0.9}}  # the tiny model's tails are dear


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
@pytest.mark.parametrize("name", sorted(set(ALL) - REFUSED))
def test_every_method_has_a_loss(name: str, soft: bool) -> None:
    model = build_case(name, **({"class_head": True} if name.startswith("evovit") else {}))
    images, target = torch.randn(3, 3, 64, 64), torch.tensor([0, 4, 9])
    if soft:
        target = torch.softmax(torch.randn(3, 10), dim=1)
    loss, parts = compute_loss(model, images, target, **WEIGHTS.get(name, {}))
    assert loss.shape == ()
    assert loss.isfinite()
    assert parts
    assert all(part.shape == () and part.isfinite() for part in parts.values()), parts
    loss.backward()
    learned = [name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()]
    assert learned


@pytest.mark.parametrize("name", sorted(set(ALL) - REFUSED))
def test_an_unknown_weight_is_named(name: str) -> None:
    with pytest.raises(TypeError, match="has no weight 'pounder'; there are"):
        compute_loss(build_case(name), torch.randn(1, 3, 64, 64), torch.tensor([0]), pounder=1.0)
