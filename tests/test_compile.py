"""Models whose counts the host knows are one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import TINY, assert_rounding, build, make_images

from mtvit_ops.nn import VisionTransformer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit-mean": ("vit", {"pool": "mean"}),
    "evovit-stage": ("evovit", {}),
    "evovit-layer": ("evovit", {"mode": "layer"}),
    "evovit-prune_cls": ("evovit", {"prune_cls": True}),
    "lifevit-budget": ("lifevit", {"base_block": 3}),
    "mtvit-tail0": ("mtvit", {"force_tail": 0}),
    "mtvit-tail2": ("mtvit", {"force_tail": 2}),
}


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch.compiler.reset()


def assert_same(model: VisionTransformer, compiled: Any) -> None:
    images = make_images(3)
    with torch.no_grad():
        assert_rounding(compiled(images), model(images))


@pytest.mark.parametrize("case", CASES)
def test_is_one_graph(case: str) -> None:
    method, options = CASES[case]
    model = build(method, **options)
    assert_same(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("case", ["vit", "evovit-stage"])
def test_gradients_through_the_graph(case: str) -> None:
    method, options = CASES[case]
    model, images = build(method, **options), make_images(2)
    grads = []
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        each(images).square().sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters()})
    for name, want in grads[0].items():
        assert_rounding(grads[1][name], want)


def test_other_batch_sizes_run() -> None:
    model = build("evovit")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5, 3):
        images = make_images(batch)
        with torch.no_grad():
            assert_rounding(compiled(images), model(images))


def test_inductor() -> None:
    model = build("evovit", depth=3)
    assert_same(model, torch.compile(model, fullgraph=True, backend="inductor"))


@pytest.mark.parametrize("case", ["vit", "evovit-stage", "lifevit-budget", "mtvit-tail0"])
def test_export(case: str) -> None:
    method, options = CASES[case]
    model = build(method, **options)
    with torch.no_grad():
        program = torch.export.export(model, (make_images(3),))
    assert_same(model, program.module())
    assert TINY["num_classes"] == program.module()(make_images(3)).shape[1]
