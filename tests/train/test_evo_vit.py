"""Evo-ViT's training: two classifiers, two modes, and only selected tokens computed, backward too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GRADIENTS, LOGITS, assert_close, cases, load, sizes
from loss_cases import assert_slope, gradients, make_target, saved_bytes
from model_cases import NUM_TOKENS, TINY, OpCounter, assert_rounding, build, in_float64, make_images, permute_patches
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import create_method, create_model, load_checkpoint
from mtvit_ops.nn import VisionTransformer, checkpointed_twin, masked_twin
from mtvit_ops.testing import assert_equal, max_error
from mtvit_ops.train import compute_loss
from mtvit_ops.train.evo_vit import mode_at, set_mode

BATCH, DEPTH, WIDTH, CLASSES = 5, 6, 32, 10
assert (TINY["depth"], TINY["embed_dim"], TINY["num_classes"]) == (DEPTH, WIDTH, CLASSES)
VARIANTS: dict[str, dict[str, Any]] = {
    "stage": {},
    "layer": {"mode": "layer"},
    "prune_cls": {"prune_cls": True},
    "class-pool": {"pool": "class"},
    "nothing-dropped": {"keep_ratios": 1.0},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
HEAD = {"method.head_cls.weight", "method.head_cls.bias", "method.norm_cls.weight", "method.norm_cls.bias"}


def evo(variant: str = "stage", **options: Any) -> VisionTransformer:
    return build("evovit", **({"keep_ratios": 0.7, "class_head": True} | VARIANTS[variant] | options))


def own_names(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded gradients under our parameters' names: queries and keys first, then values."""
    found = {}
    for name, value in case.items():
        layer, _, kind = name.rpartition(".")
        parts = layer.split(".")
        if parts[0] == "qks":
            found[f"blocks.{parts[1]}.attn.qkv.{kind}"] = torch.cat((value, case[f"vs.{parts[1]}.v.{kind}"]))
        elif parts[0] in ("norms", "projs"):
            found[f"blocks.{parts[1]}.{'norm1' if parts[0] == 'norms' else 'attn.proj'}.{kind}"] = value
        elif parts[0] in ("head_cls", "norm_cls"):
            found[f"method.{name}"] = value
        elif parts[0] != "vs":
            found[name] = value
    return found


@pytest.mark.parametrize("name", cases("evo_deit_train"))
def test_recorded_training(name: str, golden: Path, backend: str, device: str) -> None:
    # E16
    case = load(golden, name)
    config, want = case.config, case.tensors
    options = {"keep_ratios": config["prune_ratio"], "tradeoffs": config["tradeoff"], "class_head": True}
    model = create_model("evovit_tiny_patch16_224", **sizes(config), **options)
    report = load_checkpoint(model, case.weights)
    assert report.ignored == report.untrained == ()
    model, images = model.to(device), want["image"].to(device)
    target = want["soft_target"].to(device)
    total, parts = compute_loss(model, images, target)
    assert_close(total, want["loss_total"], LOGITS)
    assert_close(parts["task"], F.cross_entropy(want["logits_avg"], want["soft_target"]), LOGITS)
    assert_close(parts["class_task"], F.cross_entropy(want["logits_cls"], want["soft_target"]), LOGITS)
    assert_close(model(images), want["logits_avg"], LOGITS)
    found = gradients(model, total)
    wanted = own_names({key[5:]: value for key, value in want.items() if key.startswith("grad/")})
    assert found.keys() == wanted.keys()
    for key, grad in found.items():
        assert_close(grad, wanted[key], GRADIENTS)


@EVERY_VARIANT
def test_removal_has_the_gradients_of_masking(variant: str) -> None:
    model, images, target = in_float64(evo(variant)), make_images(BATCH).double(), make_target(BATCH)
    total, parts = compute_loss(model, images, target)
    masked, masked_parts = compute_loss(masked_twin(model), images, target)
    assert_rounding(total.detach(), masked.detach())
    for name, value in parts.items():
        assert_rounding(value.detach(), masked_parts[name].detach())
    found, wanted = gradients(model, total), gradients(model, masked)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in found.items():
        assert max_error(grad, wanted[name]) <= 1e-12 * largest, name
        assert bool((grad != 0).any()), name


@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_nothing_dropped_learns_like_the_dense_model(mode: str) -> None:
    # E2
    model, images, target = evo("nothing-dropped", mode=mode), make_images(BATCH), make_target(BATCH)
    dense = model.with_method(create_method("vit", pool="mean"))
    total, _ = compute_loss(model, images, target, task=1.0, class_task=0.0)
    want, _ = compute_loss(dense, images, target)
    assert_equal("loss", total.detach(), want.detach())
    wanted = gradients(model, want)
    for name, grad in gradients(model, total).items():
        assert_equal(name, grad, wanted[name])


@EVERY_VARIANT
def test_gradients_are_slopes(variant: str) -> None:
    # scores only rank: through them goes no gradient
    assert_slope(in_float64(evo(variant)), make_images(BATCH).double(), make_target(BATCH))


@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_removed_tokens_cost_no_training_time(mode: str) -> None:
    # multiply-accumulates of the blocks' linear layers: one product forward, two backward, over live tokens alone
    model, images, target = evo(mode=mode), make_images(BATCH), make_target(BATCH)
    live = [NUM_TOKENS] * 2 + [1 + int(0.7 * (NUM_TOKENS - 1))] * 4
    found = 0
    original = torch.ops.aten.addmm.default, torch.ops.aten.mm.default

    class Products(OpCounter):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            if func in original:
                left, right = args[-2:]
                found += left.shape[0] * left.shape[1] * right.shape[1]
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Products():
        compute_loss(model, images, target)[0].backward()
    heads = 2 * BATCH * WIDTH * CLASSES
    assert found == 3 * (BATCH * sum(live) * 12 * WIDTH**2 + heads)


@pytest.mark.parametrize("variant", ["stage", "layer"])
def test_permuted_patches_change_no_term(variant: str) -> None:
    # E7
    model, images, target = in_float64(evo(variant)), make_images(BATCH).double(), make_target(BATCH)
    _, parts = compute_loss(model, images, target)
    twin, moved = permute_patches(model, images, torch.randperm(NUM_TOKENS - 1))
    _, again = compute_loss(twin, moved, target)
    for name, value in parts.items():
        assert_rounding(again[name].detach(), value.detach())


def test_both_heads_equal_is_the_task() -> None:
    # E8
    model, images, target = evo("class-pool"), make_images(BATCH), make_target(BATCH)
    model.method.norm_cls.load_state_dict(model.norm.state_dict())
    model.method.head_cls.load_state_dict(model.head.state_dict())
    total, parts = compute_loss(model, images, target)
    want = F.cross_entropy(model(images), target).detach()
    assert_rounding(total.detach(), want)
    assert_rounding(parts["class_task"].detach(), want)


@EVERY_VARIANT
def test_inference_does_not_read_the_second_head(variant: str) -> None:
    # E8
    model, images = evo(variant), make_images(BATCH)
    with torch.inference_mode():
        before = model(images)
    with torch.no_grad():
        for layer in (model.method.head_cls, model.method.norm_cls):
            layer.weight.normal_()
            layer.bias.normal_()
    with torch.inference_mode():
        assert_equal("logits", model(images), before)


def test_terms_and_weights() -> None:
    model, images, target = evo(), make_images(BATCH), make_target(BATCH, soft=False)
    first_rows, tokens, _ = model.encode(images)
    logits = model.method.head_cls(model.method.norm_cls(tokens.x[first_rows]))
    want = {
        "task": F.cross_entropy(model(images), target, label_smoothing=0.1),
        "class_task": F.cross_entropy(logits, target, label_smoothing=0.1),
    }
    total, parts = compute_loss(model, images, target, label_smoothing=0.1, task=0.25, class_task=2)
    assert list(parts) == list(want)
    for name, value in want.items():
        assert_rounding(parts[name].detach(), value.detach())
    assert_rounding(total.detach(), (0.25 * want["task"] + 2 * want["class_task"]).detach())
    alone, only = compute_loss(model, images, target, task=1.0, class_task=0.0)
    assert list(only) == ["task"]
    assert_equal("loss", alone.detach(), only["task"].detach())
    headless = model.with_method(create_method("evovit", keep_ratios=0.7))
    assert_equal("loss", compute_loss(headless, images, target, task=1, class_task=0)[0].detach(), alone.detach())


def test_layers_first_then_stages() -> None:
    assert [mode_at(epoch) for epoch in (0, 199, 200, 299)] == ["layer", "layer", "stage", "stage"]
    assert [mode_at(epoch, 0) for epoch in (0, 1)] == ["stage", "stage"]
    model, images, target = evo("layer", tradeoffs=0.9), make_images(BATCH), make_target(BATCH)
    parameters = list(model.parameters())
    for mode in ("stage", "layer"):
        set_mode(model, mode)
        assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))
        fresh = evo(mode=mode, tradeoffs=0.9)
        fresh.load_state_dict(model.state_dict())
        assert_equal(
            mode, compute_loss(model, images, target)[0].detach(), compute_loss(fresh, images, target)[0].detach()
        )
        assert model.method.config == fresh.method.config
    stage, layer = evo(tradeoffs=0.9), evo("layer", tradeoffs=0.9)
    with torch.inference_mode():
        assert not torch.equal(stage(images), layer(images)), "both modes choose alike: this would show nothing"


def test_the_second_head_in_files() -> None:
    trained = evo()
    assert set(trained.state_dict()) == set(build("evovit").state_dict()) | HEAD
    # into a model for inference, which leaves it out
    model = build("evovit", keep_ratios=0.7, seed=1)
    report = load_checkpoint(model, trained.state_dict())
    assert set(report.ignored) == HEAD
    with torch.inference_mode():
        assert_equal("logits", model(make_images(BATCH)), trained(make_images(BATCH)))
    # and back into one for training, with a head or without
    assert load_checkpoint(evo(seed=1), trained.state_dict()).ignored == ()
    fresh = evo(seed=1)
    kept = fresh.method.head_cls.weight.detach().clone()
    assert set(load_checkpoint(fresh, model.state_dict()).untrained) == HEAD
    assert_equal("head_cls.weight", fresh.method.head_cls.weight.detach(), kept)


def test_autocast() -> None:
    # nothing dropped, so that rounding changes no decision; what the dense model loses, twice
    model, images, target = evo("nothing-dropped"), make_images(BATCH), make_target(BATCH)
    dense = model.with_method(create_method("vit", pool="mean"))
    _, parts = compute_loss(model, images, target)
    plain, _ = compute_loss(dense, images, target)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_parts = compute_loss(model, images, target)
        lost = max_error(compute_loss(dense, images, target)[0], plain)
        dropping, _ = compute_loss(evo(), images, target)
    assert half.dtype == dropping.dtype == torch.float32
    assert max_error(half_parts["task"], parts["task"]) <= 2 * lost + torch.finfo(torch.bfloat16).eps * float(
        plain.detach()
    )
    assert all(bool(grad.isfinite().all()) for grad in gradients(model, half).values())
    assert bool(dropping.isfinite())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@EVERY_VARIANT
def test_checkpointing_changes_no_bit(variant: str, autocast: bool) -> None:
    model, images, target = evo(variant), make_images(BATCH), make_target(BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, _ = compute_loss(model, images, target)
        total, _ = compute_loss(checkpointed_twin(model), images, target)
    assert_equal("loss", total.detach(), want.detach())
    wanted = gradients(model, want)
    for name, grad in gradients(model, total).items():
        assert_equal(name, grad, wanted[name])
    assert saved_bytes(checkpointed_twin(model), images, target) < saved_bytes(model, images, target) / 2


def test_stays_on_the_device() -> None:
    # the meta device has no values to wait for
    for variant in VARIANTS:
        model = evo(variant).to("meta")
        total, parts = compute_loss(model, make_images(BATCH).to("meta"), make_target(BATCH).to("meta"))
        assert all(value.is_meta for value in (*parts.values(), *gradients(model, total).values()))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "task": ({"task": -0.5}, ValueError, "task must be in"),
    "class_task": ({"class_task": "0.5"}, TypeError, "class_task must be a number, got str"),
    "unknown": ({"ponder": 1.0}, TypeError, "EvoViTLoss has no weight 'ponder'; there are task, class_task, label_sm"),
}


@pytest.mark.parametrize(("weights", "error", "match"), BAD.values(), ids=BAD)
def test_bad_weights(weights: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compute_loss(evo(), make_images(BATCH), make_target(BATCH), **weights)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"class_task must be 0 for a model without a second classifier .* got 0\.5"):
        compute_loss(build("evovit"), make_images(BATCH), make_target(BATCH))
    with pytest.raises(TypeError, match="model must run EvoViT or EvoLeViT, got Dense"):
        set_mode(build("vit"), "layer")
    with pytest.raises(ValueError, match="mode must be one of 'stage', 'layer', got 'stages'"):
        set_mode(evo(), "stages")
    for epoch in (-1, 0.5):
        with pytest.raises((ValueError, TypeError), match="epoch"):
            mode_at(epoch)  # type: ignore[arg-type]
