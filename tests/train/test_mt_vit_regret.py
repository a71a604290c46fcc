"""MT-ViT's predictor alone: its scores learn how far each tail's prediction is from the dearest one's; and classes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from model_cases import assert_rounding, build, in_float64, make_images
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.nn import VisionTransformer
from mtvit_ops.testing import assert_equal
from mtvit_ops.train import compute_loss, mt_vit
from mtvit_ops.train.mt_vit import MTViTLoss, loss
from mtvit_ops.train.plan import make_plan

BATCH = 6
TARGET = torch.tensor([1, 4, 0, 7, 3, 3])
REGRET = MTViTLoss("regret")
PREDICTOR = "method.predictor."


def adaptive(device: str = "cpu", class_head: bool = False) -> VisionTransformer:
    return build("mtvit", device=device, predictor_size=32, class_head=class_head)


def distances(model: VisionTransformer, images: Tensor) -> Tensor:
    """Total variation between dearest and tail, (B, K), from a dense pass through each tail."""
    shares = []
    for tail in range(3):
        forced = copy.deepcopy(model)
        forced.method.config = dataclasses.replace(model.method.config, force_tail=tail)
        with torch.no_grad():
            shares.append(forced(images).softmax(dim=1))
    # the larger of two shares, summed, is 1 plus their distance
    return torch.stack([torch.maximum(shares[2], each).sum(dim=1) - 1 for each in shares], dim=1)


def test_the_loss_by_hand(backend: str, device: str) -> None:
    model = in_float64(adaptive(device))
    images = make_images(BATCH).to(model.cls_token)
    total, terms = loss(model, images, TARGET.to(device), REGRET)
    total.backward()
    twin = copy.deepcopy(model.method.predictor)
    twin.zero_grad()
    want = (twin(images) + distances(model, images)).square().sum() / (3 * BATCH)
    want.backward()
    assert list(terms) == ["regret"]
    assert_rounding(total.detach(), want.detach())
    assert_rounding(terms["regret"].detach(), want.detach())
    grads = dict(twin.named_parameters())
    for name, value in model.named_parameters():
        if name.startswith(PREDICTOR):
            assert value.grad is not None, name
            assert_rounding(value.grad, grads[name.removeprefix(PREDICTOR)].grad)
            assert bool((value.grad != 0).any()), name
        else:
            assert value.grad is None, name


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_classes_beside_it_by_hand(soft: bool) -> None:
    model = in_float64(adaptive(class_head=True))
    images = make_images(BATCH).to(torch.float64)
    target = torch.randn(BATCH, 10, dtype=torch.float64).softmax(dim=1) if soft else TARGET
    total, terms = loss(
        model, images, target, MTViTLoss("regret", class_task=0.3, label_smoothing=0.0 if soft else 0.1)
    )
    total.backward()
    twin = copy.deepcopy(model.method)
    twin.zero_grad()
    regret = (twin.predictor(images) + distances(model, images)).square().mean()
    logits = twin.predictor.head_cls(twin.predictor.look(images)).log_softmax(dim=1)
    shares = target if soft else 0.9 * F.one_hot(TARGET, 10).double() + 0.01
    classes = -(shares * logits).sum() / BATCH
    (regret + 0.3 * classes).backward()
    assert list(terms) == ["regret", "class_task"]
    assert_rounding(terms["regret"].detach(), regret.detach())
    assert_rounding(terms["class_task"].detach(), classes.detach())
    assert_rounding(total.detach(), (regret + 0.3 * classes).detach())
    grads = {f"method.{name}": value.grad for name, value in twin.named_parameters()}
    for name, value in model.named_parameters():
        if name.startswith(PREDICTOR):
            assert value.grad is not None, name
            assert_rounding(value.grad, grads[name])
            assert bool((value.grad != 0).any()), name
        else:
            assert value.grad is None, name


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_classes_alone_by_hand(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_float64(adaptive(class_head=True))
    images = make_images(BATCH).to(torch.float64)
    target = torch.randn(BATCH, 10, dtype=torch.float64).softmax(dim=1) if soft else TARGET
    monkeypatch.setattr(mt_vit, "all_logits", None)  # no tail runs
    total, terms = loss(model, images, target, MTViTLoss("classes", label_smoothing=0.0 if soft else 0.1))
    total.backward()
    twin = copy.deepcopy(model.method.predictor)
    twin.zero_grad()
    shares = target if soft else 0.9 * F.one_hot(TARGET, 10).double() + 0.01
    want = -(shares * twin.head_cls(twin.look(images)).log_softmax(dim=1)).sum() / BATCH
    want.backward()
    assert list(terms) == ["class_task"]
    assert_rounding(terms["class_task"].detach(), want.detach())
    assert_rounding(total.detach(), want.detach())
    grads = dict(twin.named_parameters())
    for name, value in model.named_parameters():
        own = name.removeprefix(PREDICTOR)
        if own == name or own.startswith("head."):
            assert value.grad is None, name
        else:
            assert value.grad is not None, name
            assert_rounding(value.grad, grads[own].grad)


def test_labels_say_nothing() -> None:
    model, images = adaptive(), make_images(BATCH)
    first = compute_loss(model, images, TARGET, mode="regret")[0].detach()
    assert_equal("loss", compute_loss(model, images, TARGET.flip(0), mode="regret")[0].detach(), first)


def test_nothing_waits_for_the_device() -> None:
    model = adaptive().train().to("meta")
    total, _ = loss(model, make_images(BATCH).to("meta"), TARGET.to("meta"), REGRET)
    total.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if name.startswith(PREDICTOR))


def test_autocast(backend: str, device: str) -> None:
    model = adaptive(device).train()
    with torch.autocast(device, dtype=torch.bfloat16):
        total, _ = loss(model, make_images(BATCH, device=device), TARGET.to(device), REGRET)
    total.backward()
    assert total.dtype == torch.float32
    grads = [value.grad for name, value in model.named_parameters() if name.startswith(PREDICTOR)]
    assert all(grad is not None and grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads)


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="class_task must be 0 in mode 'dense'"):
        MTViTLoss(class_task=1.0)
    with pytest.raises(ValueError, match="class_task must be 0 for a model whose predictor has no classifier"):
        loss(adaptive(), make_images(BATCH), TARGET, MTViTLoss("regret", class_task=1.0))
    with pytest.raises(ValueError, match="class_task must be 0 for a model whose predictor has no classifier"):
        loss(adaptive(), make_images(BATCH), TARGET, MTViTLoss("classes"))
    with pytest.raises(ValueError, match="flops must be 0 in mode 'regret'"):
        MTViTLoss("regret", flops=1.0)
    with pytest.raises(ValueError, match="estimator must be 'gumbel' in mode 'regret'"):
        MTViTLoss("regret", estimator="expected")
    model, images = adaptive(), make_images(BATCH)
    with pytest.raises(ValueError, match="target must have shape"):
        loss(model, images, TARGET[:2], REGRET)
    model.method.config = dataclasses.replace(model.method.config, force_tail=1)
    with pytest.raises(ValueError, match="force_tail must be None in mode 'regret'"):
        loss(model, images, TARGET, REGRET)


@pytest.mark.parametrize("mode", ["classes", "regret"])
def test_the_plan_lets_the_predictor_alone_learn(mode: str) -> None:
    model = adaptive(class_head=True).train()
    plan = make_plan(model, {"encoder_lr": 0.1})
    for progress in (0.0, 0.5, 1.0):
        assert plan.at(model, {"mode": mode}, progress) == {"mode": mode}
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        assert learning == {name for name, _ in model.named_parameters() if name.startswith(PREDICTOR)}
        assert {plan.lr_scale(name) for name in learning} == {1.0}


def test_scores_come_to_rank_the_images() -> None:
    model, images = adaptive().train(), make_images(32, seed=3)
    predictor = model.method.predictor
    with torch.no_grad():
        predictor.head.weight.zero_()
        predictor.head.bias.zero_()
    wanted = -distances(model, images)
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=1e-2)
    target, values = torch.zeros(32, dtype=torch.int64), []
    for _ in range(60):
        optimiser.zero_grad()
        total, _ = loss(model, images, target, REGRET)
        total.backward()
        optimiser.step()
        values.append(total.item())
    assert values[-1] < values[0] / 4
    with torch.no_grad():
        scores = predictor(images)
    for tail in range(2):
        assert torch.corrcoef(torch.stack((scores[:, tail], wanted[:, tail])))[0, 1] > 0.7
