"""The task loss and the door of ``compute_loss``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import assert_slope, gradients, make_target
from model_cases import assert_rounding, build, build_case, in_float64, make_images
from torch.nn import functional as F

import mtvit_ops
from mtvit_ops.methods import AViT
from mtvit_ops.testing import assert_close_to_float64, assert_equal
from mtvit_ops.train import compute_loss
from mtvit_ops.train._task import task_loss
from mtvit_ops.train.dense import DenseLoss

BATCH = 4
# ln(e^2 + e^0 + e^-1) - 2 and ln 3, by hand
LOGITS = [[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
CASES: dict[str, tuple[Any, float, float]] = {
    "indices": ([0, 2], 0.0, (0.1698460 + 1.0986123) / 2),
    "soft": ([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], 0.0, (0.1698460 + 1.0986123) / 2),
    "half-and-half": ([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], 0.0, (0.5 * 0.1698460 + 0.5 * 2.1698460 + 1.0986123) / 2),
    # a third of the smoothing on each class: 0.1698460 + 0.3 * (0 + 2 + 3) / 3
    "smoothed": ([0, 2], 0.3, (0.1698460 + 0.5 + 1.0986123) / 2),
}


@pytest.mark.parametrize(("target", "smoothing", "want"), CASES.values(), ids=CASES)
def test_values_by_hand(target: Any, smoothing: float, want: float) -> None:
    found = task_loss(torch.tensor(LOGITS), torch.tensor(target), smoothing)
    assert found.dtype == torch.float32
    # the hand's last digit
    assert float(found) == pytest.approx(want, abs=1e-7 + 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
def test_is_computed_in_float32(dtype: torch.dtype, soft: bool) -> None:
    logits, target = torch.randn(BATCH, 10).to(dtype), make_target(BATCH, soft=soft)
    found = task_loss(logits, target.to(dtype) if soft else target)
    exact = F.cross_entropy(logits.double(), target.to(dtype).double() if soft else target)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = F.cross_entropy(logits.to(wide), target.to(dtype).to(wide) if soft else target)
    assert found.dtype == wide
    assert_close_to_float64("loss", found, exact, plain)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_dense_model_minimises_the_task(pool: str, soft: bool, backend: str, device: str) -> None:
    model, images = build("vit", pool=pool, device=device), make_images(BATCH, device=device)
    target = make_target(BATCH, soft=soft, device=device)
    total, parts = compute_loss(model, images, target, label_smoothing=0.1)
    want = F.cross_entropy(model(images), target, label_smoothing=0.1)
    assert list(parts) == ["task"]
    assert_equal("loss", total.detach(), want.detach())
    assert_equal("task", parts["task"].detach(), want.detach())
    wanted = gradients(model, want)
    for name, grad in gradients(model, total).items():
        assert_equal(name, grad, wanted[name])


def test_dense_gradients_are_slopes() -> None:
    assert_slope(in_float64(build("vit")), make_images(BATCH).double(), make_target(BATCH))


@pytest.mark.parametrize("name", ["vit", "avit", "evovit-class-pool"])
def test_is_a_score_without_gradients(name: str) -> None:
    model, images, target = build_case(name), make_images(BATCH), make_target(BATCH)
    weights = {"class_task": 0.0} if name.startswith("evovit") else {}
    total, parts = compute_loss(model, images, target, **weights)
    with torch.inference_mode():
        again, scored = compute_loss(model, images, target, **weights)
    assert total.requires_grad
    assert not again.requires_grad
    assert list(scored) == list(parts)
    # inference writes in place, through other kernels
    assert_rounding(again, total.detach())


class Halting(AViT):
    """A method of somebody else's."""


TARGET = torch.zeros(BATCH, dtype=torch.int64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-model": ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a VisionTransformer or LeViT, got Linear"),
    "unknown-weight": ({"ponder": 1.0}, TypeError, "DenseLoss has no weight 'ponder'; there are label_smoothing"),
    "bad-weight": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
    "weight-of-another-kind": ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
    "small-images": ({"images": torch.zeros(BATCH, 3, 32, 32)}, ValueError, "images must have shape"),
    "no-images": ({"images": torch.zeros(0, 3, 64, 64), "target": TARGET[:0]}, ValueError, "at least one image"),
    "too-few-targets": ({"target": TARGET[:2]}, ValueError, r"target must have shape \(4,\), got \(2,\)"),
    "too-few-classes": ({"target": torch.ones(BATCH, 9)}, ValueError, r"target must have shape \(4, 10\)"),
    "soft-targets-in-a-row": ({"target": torch.ones(BATCH)}, ValueError, r"target must have shape \(4, 10\)"),
    "int32-target": ({"target": TARGET.int()}, TypeError, "target must have dtype int64, got int32"),
    "target-beyond": ({"target": TARGET + 10}, ValueError, r"target must be in \[0, 10\), got 10"),
    "target-below": ({"target": TARGET - 100}, ValueError, r"target must be in \[0, 10\), got -100"),
    "no-tensor": ({"target": [0, 1, 2, 3]}, TypeError, "target must be a tensor, got list"),
}


@pytest.mark.parametrize(("changes", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"model": build("vit"), "images": make_images(BATCH), "target": TARGET} | changes
    with pytest.raises(error, match=match):
        compute_loss(**given)


def test_a_method_without_a_loss() -> None:
    model = build("avit")
    stranger = model.with_method(Halting(model.method.config))
    with pytest.raises(TypeError, match="one of the methods Dense, AViT, EvoViT, EvoLeViT, Life, MTViT, got Halting"):
        compute_loss(stranger, make_images(BATCH), TARGET)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_bad_smoothing(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        DenseLoss(smoothing)
    with pytest.raises(ValueError, match="label_smoothing"):
        task_loss(torch.tensor(LOGITS), torch.tensor([0, 1]), smoothing)


def test_the_package_imports_no_training() -> None:
    code = "import sys, mtvit_ops; assert not [name for name in sys.modules if name.startswith('mtvit_ops.train')]"
    root = Path(mtvit_ops.__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["vit", "avit", "evovit-class-pool"])
def test_models_of_half_precision(name: str, backend: str, device: str) -> None:
    # decisions may differ after rounding, so no closeness: every term in float32, every gradient there
    model = build_case(name, device=device).bfloat16()
    weights = {"class_task": 0.0} if name.startswith("evovit") else {}
    images, target = make_images(BATCH, device=device).bfloat16(), make_target(BATCH, device=device)
    total, parts = compute_loss(model, images, target, **weights)
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in (total, *parts.values()))
    for key, grad in gradients(model, total).items():
        assert grad.dtype == torch.bfloat16
        assert bool(grad.isfinite().all()), key
        assert bool((grad != 0).any()), key
