"""MT-ViT's training: 1.4 of its specification, and the invariants of 1.8 that concern it, but for 12 (test_toy)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from model_cases import TINY, OpCounter, assert_rounding, build, in_float64, make_images
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.nn import VisionTransformer, checkpointed_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal
from mtvit_ops.train.mt_vit import (
    MTViTLoss,
    all_logits,
    chosen_logits,
    loss,
)

BATCH, LENGTHS, DEPTH = 6, (5, 10, 17), TINY["depth"]  # grids 2, 3 and 4
TARGET = torch.tensor([1, 4, 0, 7, 3, 3])
TERMS = {
    "dense": ["task", "tails", "distillation", "flops", "entropy"],
    "sparse": ["task", "flops", "entropy"],
    "tails": ["task", "distillation"],
}
MODES = pytest.mark.parametrize("mode", TERMS)
CHOOSING = pytest.mark.parametrize("mode", ["dense", "sparse"])
TASK_ALONE = {
    "dense": {"tails": 0.0, "distillation": 0.0, "flops": 0.0, "entropy": 0.0},
    "sparse": {"flops": 0.0, "entropy": 0.0},
}


def adaptive(device: str = "cpu", **options: Any) -> VisionTransformer:
    """Three tails, each of them the best for some of the images; no noise until ``train()``."""
    return build("mtvit", device=device, **({"predictor_size": 32} | options))


def drawing(device: str = "cpu") -> VisionTransformer:
    """In training mode, with scores of the noise's size."""
    model = adaptive(device).train()
    head = model.method.predictor.head
    with torch.no_grad():  # standardised for evaluation, the scores would be in the hundreds
        head.weight *= 2e-3
        head.bias *= 2e-3
    return model


class Step:
    """One loss with its terms and gradients."""

    def __init__(self, model: VisionTransformer, weights: MTViTLoss, images: Tensor | None = None, seed: int = 0):
        model.zero_grad()
        torch.manual_seed(seed)
        like = model.cls_token
        images = make_images(BATCH) if images is None else images
        total, terms = loss(model, images.to(like), TARGET[: len(images)].to(like.device), weights)
        total.backward()
        self.total = total.detach()
        self.terms = {name: term.detach() for name, term in terms.items()}
        # a twin's blocks are wrapped, its parameters are the model's
        grads = {name.replace(".block.", "."): value.grad for name, value in model.named_parameters()}
        self.grads = {name: grad for name, grad in grads.items() if grad is not None}


def best_tails(model: VisionTransformer) -> Tensor:
    with torch.no_grad():
        return model.method.predictor(make_images(BATCH).to(model.cls_token)).argmax(dim=1)


def forced(model: VisionTransformer, tail: int) -> VisionTransformer:
    """A copy that sends every image through one tail, without asking."""
    twin = copy.deepcopy(model)
    twin.method.config = dataclasses.replace(twin.method.config, force_tail=tail)
    return twin


@CHOOSING
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_of_the_predictor(mode: str, temperature: float, backend: str, device: str) -> None:
    # J v of 1.4, in sparse mode of the chosen column alone; summed over the images it is the gradient of the last bias
    model = in_float64(adaptive(device))
    images, target = make_images(BATCH).to(model.cls_token), TARGET.to(device)
    step = Step(model, MTViTLoss(mode, temperature=temperature, **TASK_ALONE[mode]))
    with torch.no_grad():
        soft = (model.method.predictor(images) / temperature).softmax(dim=1)
        every = all_logits(model, images)
        chosen = F.one_hot(soft.argmax(dim=1), 3).to(soft)
        out = torch.einsum("bk,kbc->bc", chosen, every)
        slope = (out.softmax(dim=1) - F.one_hot(target, out.shape[1])) / BATCH
        v = torch.einsum("bc,kbc->bk", slope, every)
        if mode == "sparse":
            v = v * chosen
        jacobian = (torch.diag_embed(soft) - soft[:, :, None] * soft[:, None]) / temperature
        want = (jacobian @ v[:, :, None])[:, :, 0].sum(dim=0)
    assert_rounding(step.grads["method.predictor.head.bias"], want)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_expected_loss_is_the_mean_of_what_draws_would_cost(temperature: float, backend: str, device: str) -> None:
    model = in_float64(adaptive(device))
    images, target = make_images(BATCH).to(model.cls_token), TARGET.to(device)
    terms = {"flops": 1.0, "tails": 0.0, "distillation": 0.0, "entropy": 0.0}
    weights = MTViTLoss(estimator="expected", temperature=temperature, cost_target=0.6, **terms)
    step = Step(model, weights)
    with torch.no_grad():
        soft = (model.method.predictor(images) / temperature).softmax(dim=1)
        worth = torch.stack([F.cross_entropy(each, target, reduction="none") for each in all_logits(model, images)])
        costs = torch.tensor(model.method.relative_costs, dtype=torch.float64, device=device)
        excess = soft.mean(dim=0) @ costs - 0.6
        slope = (worth.T + 2 * excess * costs) / BATCH
        jacobian = (torch.diag_embed(soft) - soft[:, :, None] * soft[:, None]) / temperature
        want = (jacobian @ slope[:, :, None])[:, :, 0].sum(dim=0)
    assert_rounding(step.terms["task"], (soft * worth.T).sum() / BATCH)
    assert_rounding(step.terms["flops"], excess.square())
    assert_rounding(step.grads["method.predictor.head.bias"], want)
    assert want.abs().max() > 1e-3


def test_the_expected_loss_draws_nothing() -> None:
    steps = [Step(drawing(), MTViTLoss(estimator="expected"), seed=seed) for seed in range(2)]
    assert list(steps[0].terms) == TERMS["dense"]
    assert_equal("loss", steps[0].total, steps[1].total)


# the passes


def test_all_tails_are_one_pass(backend: str, device: str) -> None:
    model, images = adaptive(device), make_images(BATCH, device=device)
    with torch.no_grad():
        with OpCounter() as counter:
            every = all_logits(model, images)
        for tail in range(3):
            assert_rounding(every[tail], forced(model, tail)(images))
    assert counter.calls["mtvit_ops::ragged_patch_embed"] == 1
    rows = [shape[0] for shape in counter.shapes["mtvit_ops::varlen_attention"]]
    assert rows == [BATCH * sum(LENGTHS)] * DEPTH


def test_chosen_tails_are_one_pass_without_the_others_tokens(backend: str, device: str) -> None:
    # rows of the attention's passes, forward and backward: removed tokens cost no training time
    model, images = adaptive(device), make_images(BATCH, device=device)
    tails = best_tails(model)
    assert set(tails.tolist()) == {0, 1, 2}, "not every tail is chosen: this would show less"
    with torch.no_grad():
        every = all_logits(model, images)
        got = chosen_logits(model, images, tails.to(torch.int32))
    assert_rounding(got, every[tails, torch.arange(BATCH, device=device)])
    with OpCounter() as counter:
        Step(model, MTViTLoss("sparse"))
    if device == "cpu":  # elsewhere only the device knows the count
        live = sum(LENGTHS[tail] for tail in tails.tolist())
        for name in ("varlen_attention", "varlen_attention_backward"):
            assert [shape[0] for shape in counter.shapes[f"mtvit_ops::{name}"]] == [live] * DEPTH
    assert (
        counter.calls["mtvit_ops::varlen_attention"] == counter.calls["mtvit_ops::varlen_attention_backward"] == DEPTH
    )


def test_sparse_is_dense_but_for_the_predictors_gradient(backend: str, device: str) -> None:
    # in float64 and with noise: the ragged pass against all tails with the choice as a mask
    model = in_float64(drawing(device))
    dense, sparse = (Step(model, MTViTLoss(mode, **TASK_ALONE[mode])) for mode in ("dense", "sparse"))
    assert_rounding(sparse.total, dense.total)
    for name in TERMS["sparse"]:
        assert_rounding(sparse.terms[name], dense.terms[name])
    assert set(sparse.grads) == set(dense.grads) == {name for name, _ in model.named_parameters()}
    for name, grad in sparse.grads.items():
        if "predictor" not in name:
            assert_rounding(grad, dense.grads[name])
    name = "method.predictor.head.bias"
    assert (sparse.grads[name] - dense.grads[name]).abs().max() > 1e-3


@MODES
def test_the_loss_by_hand(mode: str, backend: str, device: str) -> None:
    # in float64, from dense passes through one tail each, whose gradients add up
    model = in_float64(adaptive(device))
    target_cost = {} if mode == "tails" else {"cost_target": 0.6}
    weights = MTViTLoss(mode, **target_cost, label_smoothing=0.1)
    step = Step(model, weights)
    images, target = make_images(BATCH).to(model.cls_token), TARGET.to(device)
    copies = [forced(model, tail) for tail in range(3)]
    asked = copy.deepcopy(model)
    out = torch.stack([each(images) for each in copies])
    scores = asked.method.predictor(images)
    soft = scores.softmax(dim=1)
    choice = F.one_hot(scores.argmax(dim=1), 3) + soft - soft.detach()
    if mode == "sparse":  # of the weights only the chosen one's slope counts
        choice = torch.where(F.one_hot(scores.argmax(dim=1), 3) == 1, choice, choice.detach())

    def entropy_to(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=0.1)

    terms = {
        "task": entropy_to(torch.einsum("bk,kbc->bc", choice, out)),
        "tails": entropy_to(out[0]) + entropy_to(out[1]) + entropy_to(out[2]),
        "distillation": sum(
            (out[2].detach().softmax(1) * (out[2].detach().log_softmax(1) - out[k].log_softmax(1))).sum() / BATCH
            for k in range(2)
        ),
        "flops": (
            (scores.argmax(dim=1).bincount(minlength=3).double() / BATCH + (soft - soft.detach()).mean(dim=0))
            @ torch.tensor(model.method.relative_costs, dtype=torch.float64, device=device)
            - 0.6
        )
        ** 2,
        "entropy": (soft.mean(dim=0) * soft.mean(dim=0).log()).sum(),
    }
    if mode == "tails":
        terms["task"] = terms["tails"]
    assert list(step.terms) == TERMS[mode]
    factors = {"task": 1.0, "tails": 1.0, "distillation": 1.0, "flops": 2.0, "entropy": 0.01}
    total = sum(factors[name] * terms[name] for name in TERMS[mode])
    total.backward()
    assert_rounding(step.total, total.detach())
    for name, term in step.terms.items():
        assert_rounding(term, terms[name].detach())
    for name, value in model.named_parameters():
        summed = [dict(each.named_parameters())[name].grad for each in (*copies, asked)]
        want = torch.stack([grad for grad in summed if grad is not None] or [torch.zeros_like(value)]).sum(dim=0)
        have = step.grads.get(name, torch.zeros_like(value))
        assert_rounding(have, want)
        assert bool((want != 0).any()) == (mode != "tails" or "predictor" not in name)


def test_tails_that_are_not_chosen(backend: str, device: str) -> None:
    # 7: one image
    model = adaptive(device)
    (tail, *_) = best_tails(model).tolist()
    image = make_images(BATCH)[:1]
    names = {0: "method.projections.0.weight", 1: "method.projections.1.weight", 2: "patch_embed.proj.weight"}
    alone, with_all = (Step(model, MTViTLoss("dense", tails=beta, distillation=0.0), image) for beta in (0.0, 1.0))
    for each, name in names.items():
        assert bool((alone.grads[name] != 0).any()) == (each == tail)
        assert bool((with_all.grads[name] != 0).any())


@CHOOSING
def test_a_mean_cost_below_the_target(mode: str) -> None:
    # 8: punished on request only
    model = adaptive()
    assert sum(model.method.relative_costs[tail] for tail in best_tails(model).tolist()) / BATCH < 1
    below, free = (Step(model, MTViTLoss(mode, cost_target=1.0, one_sided=sided)) for sided in (False, True))
    assert below.terms["flops"] > 0
    assert free.terms["flops"] == 0


def test_a_term_without_weight_costs_no_backward_pass() -> None:
    calls = {}
    for name, weights in (("all", MTViTLoss()), ("task", MTViTLoss(**TASK_ALONE["dense"]))):
        with OpCounter() as counter:
            Step(adaptive(), weights)
        calls[name] = counter.calls["aten::_log_softmax_backward_data"]
    assert calls == {"all": 5, "task": 1}  # task, three tails and the distillation's two students at once


@CHOOSING
def test_noise_is_drawn_in_training_only(mode: str) -> None:
    # 9
    model, weights = adaptive(), MTViTLoss(mode)
    assert_equal("loss", Step(model, weights, seed=1).total, Step(model, weights, seed=2).total)
    model = drawing()
    values = [Step(model, weights, seed=seed).total.item() for seed in (1, 1, 2, 3)]
    assert values[0] == values[1]
    assert len(set(values)) == 3


def test_the_predictor_is_not_asked_before_it_trains() -> None:
    model = drawing()
    before = copy.deepcopy(model.method.predictor.state_dict())
    step = Step(model, MTViTLoss("tails"))
    assert not [name for name in step.grads if "predictor" in name]
    for name, value in model.method.predictor.state_dict().items():
        assert_equal(name, value, before[name])  # nor are its running statistics moved
    assert_equal("forced", Step(forced(model, 1), MTViTLoss("tails")).total, step.total)


@MODES
def test_nothing_waits_for_the_device(mode: str) -> None:
    # on the meta device there are no values to look at
    model = drawing().to("meta")
    total, _ = loss(model, make_images(BATCH).to("meta"), TARGET.to("meta"), MTViTLoss(mode))
    total.backward()
    assert total.is_meta
    asked = [value for name, value in model.named_parameters() if mode != "tails" or "predictor" not in name]
    assert all(value.grad.is_meta for value in asked)


@MODES
def test_activation_checkpointing(mode: str, backend: str, device: str) -> None:
    model = drawing(device)
    want, again = Step(model, MTViTLoss(mode)), Step(checkpointed_twin(model), MTViTLoss(mode))
    assert_equal("loss", again.total, want.total)
    assert set(again.grads) == set(want.grads)
    for name, grad in again.grads.items():  # the same operations in the same order
        assert_equal(name, grad, want.grads[name])


@MODES
def test_autocast(mode: str, backend: str, device: str) -> None:
    model = drawing(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        step = Step(model, MTViTLoss(mode))
    assert step.total.dtype == torch.float32
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in step.terms.values())
    for name, grad in step.grads.items():
        assert grad.dtype == torch.float32
        assert bool(grad.isfinite().all()), name


def test_autocast_is_as_good_as_dense_passes(backend: str, device: str) -> None:
    # without a choice, which rounding may change
    model = adaptive(device)
    images, target = make_images(BATCH, device=device), TARGET.to(device)
    weights = MTViTLoss("tails", distillation=0.0)

    def separately(each: VisionTransformer) -> tuple[Tensor, dict[str, Tensor]]:
        copies = [forced(each, tail) for tail in range(3)]
        wide = torch.float64 if each.cls_token.dtype == torch.float64 else torch.float32
        total = sum(F.cross_entropy(part(images.to(each.cls_token)).to(wide), target) for part in copies)
        total.backward()
        grads = {}
        for name, _ in each.blocks.named_parameters():
            grads[f"blocks.{name}"] = sum(dict(part.blocks.named_parameters())[name].grad for part in copies)
        return total.detach(), grads

    with torch.autocast(device, dtype=torch.bfloat16):
        step = Step(model, weights)
        plain, plain_grads = separately(model)
    truth, true_grads = separately(in_float64(model))
    # what is compared was rounded to bfloat16 on the way
    assert_close_to_float64("loss", step.total.bfloat16(), truth, plain)
    for name, grad in true_grads.items():
        assert_close_to_float64(name, step.grads[name].bfloat16(), grad, plain_grads[name])


def test_bad_calls() -> None:
    model, images = adaptive(), make_images(BATCH)
    with pytest.raises(TypeError, match="model must run MTViT, got Dense"):
        loss(build("vit"), images, TARGET, MTViTLoss())
    with pytest.raises(TypeError, match="images must have dtype float32, got float64"):
        loss(model, images.double(), TARGET, MTViTLoss())
    with pytest.raises(ValueError, match=r"target must have shape \(6,\), got \(5,\)"):
        loss(model, images, TARGET[:5], MTViTLoss())
    for mode in ("dense", "sparse"):
        with pytest.raises(ValueError, match=f"force_tail must be None in mode '{mode}'.* got 1"):
            loss(forced(model, 1), images, TARGET, MTViTLoss(mode))
        # 2: between the cheapest tail and 1
        with pytest.raises(ValueError, match=r"cost_target must be in \[0\.\d{4}, 1\]"):
            loss(model, images, TARGET, MTViTLoss(mode, cost_target=0.99 * model.method.relative_costs[0]))
        loss(model, images, TARGET, MTViTLoss(mode, cost_target=0.1, flops=0.0))
        loss(model, images, TARGET, MTViTLoss(mode, cost_target=1.0))
