"""The controls of the accuracy table: the same model, its choices replaced by draws in the same numbers."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model_cases import assert_rounding, build, make_images

from mtvit_ops.nn import VisionTransformer

BATCH = 6


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = Path(__file__).parents[1] / "bench"
    if not folder.is_dir():
        pytest.skip("no bench/ beside the tests")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("random_choice")


def answers(model: VisionTransformer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images in two batches, with the model's own answers as targets."""
    images = make_images(BATCH)
    with torch.inference_mode():
        targets = model(images).argmax(dim=1)
    return [(images[:4], targets[:4]), (images[4:], targets[4:])]


@pytest.mark.parametrize("kind", ["RandomEvoViT", "RandomLife"])
def test_as_many_tokens_and_none_comes_back(kind: str, controls: ModuleType) -> None:
    method = "evovit" if kind == "RandomEvoViT" else "lifevit"
    options: dict[str, Any] = {"keep_ratios": (1.0, 1.0, 0.6, 0.6, 0.3, 0.3)} if method == "evovit" else {}
    model = build(method, **options)
    twin = model.with_method(getattr(controls, kind)(model.method.config))
    images = make_images(BATCH)
    with torch.inference_mode():
        trace, drawn = model(images, return_trace=True)[1], twin(images, return_trace=True)[1]
    assert torch.equal(drawn.tokens_per_block, trace.tokens_per_block)
    chosen_alike = 0
    for image in range(BATCH):
        kept = [set(drawn.kept(block, image).tolist()) for block in range(6)]
        assert all(later <= earlier for earlier, later in zip(kept, kept[1:]))
        chosen_alike += kept[-1] == set(trace.kept(5, image).tolist())
    assert chosen_alike < BATCH


@pytest.mark.parametrize("method", ["avit", "mtvit"])
def test_choices_dealt_to_whom_they_were_of_are_the_models(
    method: str, controls: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(method)
    batches = answers(model)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    assert controls.right_at_random(model, batches, 0) == BATCH
    if method == "avit":
        with torch.inference_mode():
            for images, _ in batches:
                assert_rounding(controls._avit_at_random(model, images), model(images))
        return
    monkeypatch.setattr(torch, "randperm", lambda number: torch.arange(number).flip(0))
    assert controls.right_at_random(model, batches, 0) == 4  # one of six took the tail that answers otherwise


@pytest.mark.parametrize("method", ["avit", "evovit", "lifevit", "mtvit"])
def test_a_seed_fixes_the_draws_and_nothing_else_is_drawn(method: str, controls: ModuleType) -> None:
    model = build(method)
    batches = answers(model)
    state = torch.get_rng_state()
    counts = [controls.right_at_random(model, batches, seed) for seed in (0, 0)]
    assert counts[0] == counts[1]
    assert torch.equal(torch.get_rng_state(), state)
