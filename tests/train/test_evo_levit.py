"""Training of Evo-ViT on LeViT: four classifiers, and gradients of a recorded run and of the method as it is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases, load
from levit_cases import build_levit, by_sorting, from_case
from torch import Tensor, nn
from torch.nn import functional as F

from mtvit_ops import load_checkpoint
from mtvit_ops.methods._evo_levit_layout import from_evo_levit
from mtvit_ops.nn import LeViT
from mtvit_ops.testing import assert_equal
from mtvit_ops.train import compute_loss
from mtvit_ops.train.evo_vit import set_mode

LOGITS, GRADIENTS = 5e-4, 1e-3
BATCH = 4
TARGET = torch.tensor([1, 4, 0, 7])
ANSWERS = torch.tensor([1, 5, 0, 2])


def images(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, 3, 112, 112, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", cases("evo_levit_train"))
def test_recorded_training(name: str, golden: Path, backend: str, device: str, dtype: torch.dtype) -> None:
    # E12, E16
    case = load(golden, name)
    want = {key: value.to(dtype) for key, value in case.tensors.items()}
    model = from_case(case, class_head=True)
    report = load_checkpoint(model, case.weights)
    assert report.ignored == report.untrained == ()
    model = model.to(device, dtype).train()
    x, target = want["image"].to(device), want["soft_target"].to(device)
    total, parts = compute_loss(model, x, target, answers=want["teacher_logits"].argmax(dim=1).to(device))
    for term, logits in (("task", "head"), ("class_task", "head_cls")):
        recorded = F.cross_entropy(want[f"logits_{logits}"], want["soft_target"])
        torch.testing.assert_close(parts[term].cpu(), recorded, rtol=0, atol=LOGITS)
    torch.testing.assert_close((parts["task"] + parts["class_task"]).cpu() / 2, want["loss_base"], rtol=0, atol=LOGITS)
    distilled = (parts["distillation"] + parts["class_distillation"]).cpu() / 2
    torch.testing.assert_close(distilled, want["loss_dist"], rtol=0, atol=LOGITS)
    torch.testing.assert_close(total.cpu(), want["loss_total"], rtol=0, atol=LOGITS)
    total.backward()
    gradients = from_evo_levit({key[5:]: value for key, value in want.items() if key.startswith("grad/")})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        # batch norms of few images: by instruction set float32 runs differ by 7e-4 of a tensor's largest gradient
        scale = 1.0 if dtype == torch.float64 else 4 * gradients[key].abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(parameter.grad.cpu(), gradients[key], rtol=0, atol=GRADIENTS * scale)
    assert model.method.tradeoffs.grad[0] == 0
    moved = from_evo_levit({key[9:]: value for key, value in want.items() if key.startswith("bn_after/")})
    state = model.state_dict()
    for key, value in moved.items():
        torch.testing.assert_close(state[key].cpu(), value, rtol=0, atol=LOGITS)


VARIANTS: dict[str, dict[str, Any]] = {
    "stage": {},
    "layer": {"mode": "layer"},
    "layer, learned": {"mode": "layer", "learn_tradeoff": True},
    "ratios of stages": {"stage_keep_ratios": (0.9, 0.3, 0.2)},
    "nothing waits": {"keep_ratios": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_as_the_paper_tells_it(variant: str, backend: str) -> None:
    model = build_levit(class_head=True, **VARIANTS[variant]).double().train()
    twin, x = copy.deepcopy(model), images().double()
    total, parts = compute_loss(model, x, TARGET, answers=ANSWERS, label_smoothing=0.1, task=0.3, distillation=0.2)
    total.backward()
    tokens, _ = by_sorting(twin, x)
    pooled, seen = tokens[:, 1:].mean(dim=1), tokens[:, 0]
    want = {
        "task": F.cross_entropy(twin.head(pooled), TARGET, label_smoothing=0.1),
        "distillation": F.cross_entropy(twin.head_dist(pooled), ANSWERS),
        "class_task": F.cross_entropy(twin.method.head_cls(seen), TARGET, label_smoothing=0.1),
        "class_distillation": F.cross_entropy(twin.method.head_cls_dist(seen), ANSWERS),
    }
    assert list(parts) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(parts[name].detach(), value.detach(), rtol=1e-9, atol=1e-9)
    labels, answers = 0.3 * want["task"] + 0.5 * want["class_task"], 0.3 * want["distillation"]
    wanted = 0.8 * labels + 0.2 * (answers + 0.5 * want["class_distillation"])
    torch.testing.assert_close(total.detach(), wanted.detach(), rtol=1e-9, atol=1e-9)
    wanted.backward()
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        grad, other = parameter.grad, others[name].grad
        if other is None:
            assert grad is None or not grad.any(), name
        else:
            assert grad is not None, name
            torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-8)
    for name, value in model.state_dict().items():  # norms have seen the same
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-9, atol=1e-9)
    # trade-offs learn where a later selection or merge depends on them
    learned = variant in ("stage", "layer, learned", "ratios of stages")
    assert (
        bool((model.method.tradeoffs.grad != 0).any() if model.method.tradeoffs.grad is not None else False) == learned
    )


def test_the_mode_changes_in_between() -> None:
    stage, layer, x = build_levit(), build_levit(mode="layer"), images()
    with torch.no_grad():
        before = stage(x)
        set_mode(stage, "layer")
        assert_equal("layer", stage(x), layer(x))
        set_mode(stage, "stage")
        assert_equal("stage", stage(x), before)
        assert (before != layer(x)).any()


def test_one_classifier() -> None:
    # E8
    model = build_levit(distillation=False)
    x = images()
    total, parts = compute_loss(model, x, TARGET, task=1.0, class_task=0.0)
    torch.testing.assert_close(total, F.cross_entropy(model(x), TARGET))
    assert list(parts) == ["task"]
    soft = F.one_hot(TARGET, 10).float()
    torch.testing.assert_close(compute_loss(model, x, soft, task=1.0, class_task=0.0)[0], total)


def test_inference_does_not_read_the_class_token_s_classifiers() -> None:
    # E8
    model, x = build_levit(class_head=True), images()
    with torch.no_grad():
        before = model(x)
        for layer in (model.method.head_cls, model.method.head_cls_dist):
            nn.init.normal_(layer.l.weight)
        assert_equal("logits", model(x), before)


def test_drop_path() -> None:
    model, x = build_levit(drop_path=0.5, keep_ratios=1.0), images()
    plain = build_levit(keep_ratios=1.0)
    with torch.no_grad():
        assert_equal("evaluation", model(x), plain(x))
        for part in model.modules():  # norms as in evaluation, drops as in training
            part.training = isinstance(part, LeViT)
        draws = torch.stack([model.classify(model.method.run(model, model.embed(x), False)[0]) for _ in range(3)])
    assert (draws[0] != draws[1]).any()
    gained = torch.ones(2000, 1, 1)
    from mtvit_ops.methods.evo_levit import _drop_path

    values = _drop_path(model, gained).flatten().unique()
    assert values.tolist() == [0.0, 2.0]
    assert _drop_path(model.eval(), gained) is gained


@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_autocast(mode: str) -> None:
    model = build_levit(mode=mode, class_head=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = compute_loss(model, images(), TARGET, answers=ANSWERS)
    total.backward()
    assert total.dtype == torch.float32
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_it_learns() -> None:
    model = build_levit(distillation=False, class_head=True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, losses = images(), []
    for _ in range(25):
        optimiser.zero_grad()
        total, _ = compute_loss(model, x, TARGET)
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] / 3


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "class head": (
        {},
        {"answers": ANSWERS},
        ValueError,
        "class_task must be 0 for a model without classifiers on the class",
    ),
    "no answers": ({}, {"class_task": 0.0}, ValueError, "answers must be the teacher's for a model that is distilled"),
    "no share": (
        {},
        {"class_task": 0.0, "distillation": 0.0, "answers": ANSWERS},
        ValueError,
        "distillation must be above 0 for a model made with distillation=True, got 0",
    ),
    "a share": (
        {"distillation": False},
        {"class_task": 0.0, "distillation": 0.5},
        ValueError,
        r"distillation must be 0 for a model made with distillation=False, got 0\.5",
    ),
    "answers": (
        {"distillation": False},
        {"class_task": 0.0, "answers": ANSWERS},
        ValueError,
        "answers must be None for a model made with distillation=False",
    ),
    "shape": ({}, {"class_task": 0.0, "answers": ANSWERS[:2]}, ValueError, r"answers must have shape \(4,\)"),
    "dtype": ({}, {"class_task": 0.0, "answers": ANSWERS.float()}, TypeError, "answers must have dtype int64"),
    "unknown": ({}, {"ponder": 1.0}, TypeError, "EvoLeViTLoss has no weight 'ponder'; there are task, class_task"),
    "range": ({}, {"task": -1.0}, ValueError, "task must be in"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_use(case: str) -> None:
    options, weights, error, message = BAD[case]
    with pytest.raises(error, match=message):
        compute_loss(build_levit(**options), images(), TARGET, **weights)
