"""A-ViT's training: its terms, its straight-through zeroing, and the authors' recorded gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GRADIENTS, HALTING_SCORES, LOGITS, assert_close, cases, load, sizes
from loss_cases import assert_slope, gradients, make_target, saved_bytes
from model_cases import (
    NUM_TOKENS,
    TINY,
    assert_rounding,
    build,
    build_case,
    in_float64,
    make_images,
    permute_patches,
)
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import VisionTransformer, create_method, create_model, load_checkpoint
from mtvit_ops.nn import checkpointed_twin, masked_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal, max_error
from mtvit_ops.train import compute_loss
from mtvit_ops.train.a_vit import AViTLoss, divergence, halting_prior, masked_pass, spread_over_depth

BATCH, DEPTH = 5, TINY["depth"]
STATISTICS = pytest.mark.parametrize("statistic", ["intended", "official"])
PRIOR = [1.648e-14, 2.979e-11, 1.981e-8, 4.848e-6, 4.364e-4, 0.0144519, 0.1760601, 0.7890467]
PRIOR += [1.3009181, 0.7890467, 0.1760601, 0.0144519]


@pytest.mark.parametrize("name", cases("avit_train"))
def test_recorded_training(name: str, golden: Path, backend: str, device: str) -> None:
    # A11
    case = load(golden, name)
    config, want = case.config, case.tensors
    gates = {key: config[key] for key in ("gate_scale", "gate_center", "eps")}
    model = create_model("avit_tiny_patch16_224", **sizes(config), **gates)
    load_checkpoint(model, case.weights)
    model, images = model.to(device), want["image"].to(device)
    total, parts = compute_loss(
        model,
        images,
        want["soft_target"].to(device),
        ponder=config["ponder_token_scale"],
        distribution=config["distr_prior_alpha"],
        statistic="official",
    )
    assert_close(total, want["loss_total"], LOGITS)
    assert_close(parts["task"], want["loss_task"], LOGITS)
    assert_close(config["ponder_token_scale"] * parts["ponder"], want["loss_ponder_scaled"], LOGITS)
    assert_close(parts["distribution"], want["kl_unscaled"], LOGITS)
    passed = masked_pass(model, images)
    assert_close(passed.logits, want["logits"], LOGITS)
    # sums of at most 12 scores
    assert_close(passed.ponder, want["rho_token"], 12 * HALTING_SCORES)
    assert_close(passed.scores, want["h"], HALTING_SCORES)
    spread = spread_over_depth(passed.scores, "official")
    assert_close(spread, want["halting_score_layer"], HALTING_SCORES)
    assert_close(halting_prior(12, 8, spread), want["distr_target"], HALTING_SCORES)
    found = gradients(model, total)
    wanted = {key.removeprefix("grad/"): value for key, value in want.items() if key.startswith("grad/")}
    assert found.keys() == wanted.keys()
    for key, grad in found.items():
        assert_close(grad, wanted[key], GRADIENTS)


def by_hand(model: VisionTransformer, images: Tensor, straight_through: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The specification's steps one by one: logits, ponder (B, K), scores (L, B, K)."""
    gate, heads = model.method.config, model.config.num_heads
    x = torch.cat((model.cls_token.expand(len(images), -1, -1), model.patch_embed(images)), dim=1) + model.pos_embed
    mask = torch.ones_like(x[:, :, 0])
    cumulative, left, ponder, output, scores = 0 * mask, mask, 0 * mask, 0 * x, []
    for index, block in enumerate(model.blocks):
        zeroed = x * mask[..., None]
        x = x + (zeroed - x).detach() if straight_through else zeroed
        z = block.norm1(x * mask[..., None]) * mask[..., None]
        q, k, v = block.attn.qkv(z).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, K, d) each
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 - 1000 * (1 - mask)[:, None, None]
        x = x + block.attn.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        z = block.norm2(x * mask[..., None]) * mask[..., None]
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(z)))
        score = torch.sigmoid(gate.gate_scale * x[:, :, 0] - gate.gate_center)
        scores.append(score)
        if index == DEPTH - 1:
            score = torch.ones_like(score)
        cumulative = cumulative + score
        reached = (cumulative > 1 - gate.eps) * mask
        going = (cumulative < 1 - gate.eps).to(x)
        output = output + x * (mask * left * reached)[..., None] + x * (mask * score * going)[..., None]
        ponder = ponder + mask + left * reached
        left = left - score * going
        mask = going
    return model.head(model.norm(output)[:, 0]), ponder, torch.stack(scores)


def loss_by_hand(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: AViTLoss, straight_through: bool = True
) -> Tensor:
    logits, ponder, scores = by_hand(model, images, straight_through)
    density = [math.exp(-((layer - 4) ** 2) / 2) for layer in range(DEPTH)]
    prior = scores.new_tensor([value * 0.98 / sum(density[:4]) for value in density])
    spread = (scores[:, 1:] if weights.statistic == "official" else scores[:, :, 1:]).mean(dim=(1, 2))
    # of one dimension: "batchmean" divides by the number of layers
    kl = F.kl_div((spread / spread.sum()).clamp(0.01, 0.99).log(), prior, reduction="batchmean")
    task = F.cross_entropy(logits, target.to(logits.dtype))
    return task + weights.ponder * ponder.mean() + weights.distribution * kl


# halted tokens' scores are near 0 at the authors' gates, and visible at low ones
GATES = {"low": (4.0, 3.0), "lower": (1.0, 1.0)}


@STATISTICS
@pytest.mark.parametrize(("scale", "center"), GATES.values(), ids=GATES)
def test_is_the_specification_step_by_step(scale: float, center: float, statistic: str) -> None:
    # quirk 2 of the specification: zeroed values, gradients that pass
    model = in_float64(build("avit", gate_scale=scale, gate_center=center))
    images, target = make_images(BATCH).double(), make_target(BATCH)
    weights = AViTLoss(ponder=0.3, distribution=0.5, statistic=statistic)
    total, parts = compute_loss(model, images, target, ponder=0.3, distribution=0.5, statistic=statistic)
    want = loss_by_hand(model, images, target, weights)
    assert_rounding(total.detach(), want.detach())
    torch.testing.assert_close(
        total, parts["task"] + 0.3 * parts["ponder"] + 0.5 * parts["distribution"], rtol=1e-15, atol=0
    )
    found, wanted = gradients(model, total), gradients(model, want)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    stopped = gradients(model, loss_by_hand(model, images, target, weights, straight_through=False))
    for name, grad in found.items():
        assert max_error(grad, wanted[name]) <= 1e-12 * largest, name
    assert max(max_error(stopped[name], wanted[name]) for name in wanted) > 1e-3 * largest


def test_the_two_statistics() -> None:
    # quirk 1: 2 layers, 2 images, class token and 2 patches
    scores = torch.tensor([[[0.9, 0.1, 0.2], [0.8, 0.3, 0.4]], [[0.7, 0.5, 0.6], [0.6, 0.7, 0.8]]])
    torch.testing.assert_close(spread_over_depth(scores, "intended"), torch.tensor([0.25, 0.65]))
    torch.testing.assert_close(spread_over_depth(scores, "official"), torch.tensor([0.5, 0.7]))


@STATISTICS
def test_the_official_statistic_leaves_the_first_image_out(statistic: str) -> None:
    model, images = build_case("avit"), make_images(BATCH).requires_grad_()
    _, parts = compute_loss(model, images, make_target(BATCH), statistic=statistic)
    (grad,) = torch.autograd.grad(parts["distribution"], images)
    assert bool((grad[1:].abs().amax(dim=(1, 2, 3)) > 0).all())
    assert bool((grad[0] == 0).all()) == (statistic == "official")


def test_the_prior() -> None:
    # A5
    prior = halting_prior(12, 8, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(prior, torch.tensor(PRIOR).double(), rtol=5e-4, atol=5e-8)  # the digits printed
    assert float(prior.sum()) == pytest.approx(3.2604770, abs=1e-6)  # summed in float32 there
    assert float(prior[:8].sum()) == pytest.approx(0.98, abs=1e-15)


SPREADS = {"uniform": (torch.ones(12), 0.6110674), "prior": (torch.tensor(PRIOR), 0.3190024)}
SPREADS["first-layer"] = (torch.eye(12)[0], 1.1871566)


@pytest.mark.parametrize(("spread", "want"), SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_the_divergence(spread: Tensor, want: float, dtype: torch.dtype) -> None:
    # A5; only the shares count
    for factor in (1.0, 0.03):
        assert float(divergence(factor * spread.to(dtype), 8)) == pytest.approx(want, abs=1e-6)


def test_gradient_of_the_divergence() -> None:
    spread = torch.rand(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: divergence(value, 8), (spread,))
    # no gradient where a share is clamped: two layers hold all but 0.004
    spread = torch.tensor([0.001, 0.5, 0.001, 0.496, 0.001, 0.001], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: divergence(value, 4), (spread,))


@pytest.mark.parametrize(("center", "ponder"), [(1e9, 13.0), (-1e9, 2.0)], ids=["never", "at-once"])
def test_the_ends_of_the_gate(center: float, ponder: float) -> None:
    # A3
    model, images, target = build("avit", gate_center=center, depth=12), make_images(2), make_target(2)
    for distribution in (0.0, 1e-3):
        with torch.no_grad():
            _, parts = compute_loss(model, images, target, distribution=distribution)
        assert float(parts["ponder"]) == ponder
    # scores that are all 1 are uniform, scores that are all 0 have no spread: the least share everywhere
    nothing = sum(value * (math.log(value) - math.log(0.01)) for value in PRIOR) / 12
    assert float(parts["distribution"]) == pytest.approx(0.6110674 if center < 0 else nothing, abs=1e-6)


@pytest.mark.parametrize("distribution", [0.0, 1e-3], ids=["removed", "masked"])
def test_what_never_halts_learns_the_task_like_the_dense_model(distribution: float) -> None:
    # A2
    model, images, target = in_float64(build("avit", gate_center=1e9)), make_images(BATCH).double(), make_target(BATCH)
    dense = model.with_method(create_method("vit"))
    _, parts = compute_loss(model, images, target, distribution=distribution)
    want, _ = compute_loss(dense, images, target)
    assert_rounding(parts["task"].detach(), want.detach())
    wanted = gradients(model, want)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in gradients(model, parts["task"]).items():
        assert max_error(grad, wanted[name]) <= 1e-12 * largest, name


# A4: sums of .3 pass .99 with the fourth; .995 alone does
@pytest.mark.parametrize(("score", "ponder"), [(0.3, 4.1), (0.5, 2.5), (0.995, 2.0)])
def test_ponder_of_constant_scores(score: float, ponder: float) -> None:
    model = build("avit", gate_scale=0.0, gate_center=-math.log(score / (1 - score)))
    passed = masked_pass(model, make_images(BATCH))
    torch.testing.assert_close(passed.ponder, torch.full((BATCH, NUM_TOKENS), ponder), rtol=1e-6, atol=0)
    # every layer scores the same, halted or not
    torch.testing.assert_close(passed.scores, torch.full((DEPTH, BATCH, NUM_TOKENS), score), rtol=1e-6, atol=0)


def test_masking_is_removal(backend: str, device: str) -> None:
    # A6, in training
    model, images = build_case("avit", device=device), make_images(BATCH, device=device)
    passed = masked_pass(model, images)
    with torch.no_grad():
        exact = by_hand(in_float64(model), images.double(), True)
        plain = by_hand(model, images, True)
        logits, trace = model(images, return_trace=True)
    assert_close_to_float64("logits", passed.logits.detach(), exact[0], plain[0])
    assert_close_to_float64("ponder", passed.ponder.detach(), exact[1], plain[1])
    assert_close_to_float64("scores", passed.scores.detach(), exact[2], plain[2])
    assert_rounding(passed.logits.detach(), logits)
    assert_rounding(passed.ponder.detach(), trace.extras["ponder"])
    # where a token lived, the scores are those of inference
    lived = torch.arange(DEPTH, device=device)[:, None, None] < trace.extras["counters"]
    assert_rounding(passed.scores.detach()[lived], trace.extras["halting_scores"][lived])


def test_without_the_prior_removal_has_the_gradients_of_masking() -> None:
    model, images, target = in_float64(build_case("avit")), make_images(BATCH).double(), make_target(BATCH)
    total, parts = compute_loss(model, images, target, ponder=0.3, distribution=0)
    assert list(parts) == ["task", "ponder"]
    passed = masked_pass(model, images)
    masked = F.cross_entropy(passed.logits, target.double()) + 0.3 * passed.ponder.mean()
    twin, _ = compute_loss(masked_twin(model), images, target, ponder=0.3, distribution=0)
    found = gradients(model, total)
    largest = max(float(grad.abs().max()) for grad in found.values())
    for want in (masked, twin):
        assert_rounding(total.detach(), want.detach())
        for name, grad in gradients(model, want).items():
            assert max_error(found[name], grad) <= 1e-12 * largest, name
    # the scores of halted tokens are all that masking is for
    prior, _ = compute_loss(masked_twin(model), images, target)
    assert_equal("loss", prior.detach(), compute_loss(model, images, target)[0].detach())


def test_gradients_are_slopes() -> None:
    # not with the prior: what goes straight through is not the slope
    model = in_float64(build_case("avit"))
    assert_slope(model, make_images(BATCH).double(), make_target(BATCH), ponder=0.3, distribution=0)


@STATISTICS
def test_gradients_with_the_prior_are_slopes_where_nothing_halts(statistic: str) -> None:
    model = in_float64(build("avit", gate_scale=0.1, gate_center=4.0))
    images = make_images(BATCH).double()
    assert bool((masked_pass(model, images).ponder > DEPTH).all())
    assert_slope(model, images, make_target(BATCH), ponder=0.3, distribution=0.5, statistic=statistic)


def test_permuted_patches_change_no_term() -> None:
    # A7
    model, images, target = in_float64(build_case("avit")), make_images(BATCH).double(), make_target(BATCH)
    _, parts = compute_loss(model, images, target)
    twin, moved = permute_patches(model, images, torch.randperm(NUM_TOKENS - 1))
    _, again = compute_loss(twin, moved, target)
    for name, value in parts.items():
        assert_rounding(again[name].detach(), value.detach())


def test_images_that_halt_as_a_whole() -> None:
    model = build("avit", gate_center=-20.0)
    total, _ = compute_loss(model, make_images(BATCH), make_target(BATCH))
    assert all(bool(grad.isfinite().all()) for grad in gradients(model, total).values())


@pytest.mark.parametrize("distribution", [0.0, 0.5], ids=["removed", "masked"])
def test_autocast(distribution: float) -> None:
    # nothing halts, so that rounding changes no decision; what the dense model loses, twice
    model, images, target = build("avit", gate_scale=0.1, gate_center=4.0), make_images(BATCH), make_target(BATCH)
    dense = model.with_method(create_method("vit"))
    total, parts = compute_loss(model, images, target, distribution=distribution)
    plain, _ = compute_loss(dense, images, target)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_parts = compute_loss(model, images, target, distribution=distribution)
        lost = max_error(compute_loss(dense, images, target)[0], plain)
    assert half.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in half_parts.values())
    eps = torch.finfo(torch.bfloat16).eps
    assert max_error(half_parts["task"], parts["task"]) <= 2 * lost + eps * float(parts["task"].detach())
    assert max_error(half, total) <= 2 * lost + eps * float(total.detach())
    assert all(bool(grad.isfinite().all()) for grad in gradients(model, half).values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("distribution", [0.0, 0.5], ids=["removed", "masked"])
def test_checkpointing_changes_no_bit(distribution: float, autocast: bool) -> None:
    model, images, target = build_case("avit"), make_images(BATCH), make_target(BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, _ = compute_loss(model, images, target, distribution=distribution)
        total, _ = compute_loss(checkpointed_twin(model), images, target, distribution=distribution)
    assert_equal("loss", total.detach(), want.detach())
    wanted = gradients(model, want)
    for name, grad in gradients(model, total).items():
        assert_equal(name, grad, wanted[name])
    kept = [saved_bytes(each, images, target, distribution=distribution) for each in (checkpointed_twin(model), model)]
    assert kept[0] < kept[1] / 2


def test_stays_on_the_device() -> None:
    # the meta device has no values to wait for
    model, images = build_case("avit").to("meta"), make_images(BATCH).to("meta")
    for distribution in (0.0, 0.5):
        for target in (make_target(BATCH).to("meta"), make_target(BATCH, soft=False).to("meta")):
            total, parts = compute_loss(model, images, target, distribution=distribution)
            assert all(value.is_meta for value in (*parts.values(), *gradients(model, total).values()))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ponder": ({"ponder": -1.0}, ValueError, "ponder"),
    "distribution": ({"distribution": math.nan}, ValueError, "distribution"),
    "statistic": ({"statistic": "fixed"}, ValueError, "statistic must be one of 'intended', 'official', got 'fixed'"),
    "target_depth-0": ({"target_depth": 0}, ValueError, "target_depth must be >= 1, got 0"),
    "target_depth-real": ({"target_depth": 4.0}, TypeError, "target_depth must be an int, got float"),
    "target_depth-beyond": ({"target_depth": 7}, ValueError, r"target_depth must be in \[1, 6\], got 7"),
    "unknown": ({"ponder_scale": 1.0}, TypeError, "AViTLoss has no weight 'ponder_scale'; there are ponder, distrib"),
}


@pytest.mark.parametrize(("weights", "error", "match"), BAD.values(), ids=BAD)
def test_bad_weights(weights: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compute_loss(build("avit"), make_images(BATCH), make_target(BATCH), **weights)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="stop_with_class must be False in training"):
        compute_loss(build_case("avit-stop_with_class"), make_images(BATCH), make_target(BATCH))
    with pytest.raises(ValueError, match="images must hold two images for the official statistic"):
        compute_loss(build("avit"), make_images(1), make_target(1), statistic="official")
