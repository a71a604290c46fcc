"""Life Regression's training: 2.4 of its specification, and the invariants of 2.9 that concern it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import NUM_TOKENS, TINY, OpCounter, assert_rounding, build, in_float64, make_images
from torch import Tensor
from torch.nn import functional as F

import mtvit_ops
from mtvit_ops.nn import VisionTransformer, checkpointed_twin, masked_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal, max_error
from mtvit_ops.train.life import LifeLoss, freeze, log_soft_weights, loss, soft_logits

BATCH, BASE, DEPTH = 4, 3, TINY["depth"]
TARGET = torch.tensor([1, 4, 0, 7])
ACTIVATIONS, GRADIENTS = 5e-5, 3e-4  # golden/README.md: of the largest reference, of the largest gradient
STAGES = pytest.mark.parametrize("stage", [1, 2])


def life(stage: int | None = None, device: str = "cpu", **options: Any) -> VisionTransformer:
    """A tiny model, of which only what learns in the stage requires a gradient; None: everything does."""
    model = build("lifevit", device=device, **({"base_block": BASE} | options)).train()
    if stage is not None:
        freeze(model, stage)
    return model


def run(model: VisionTransformer, weights: LifeLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on fixed images, and the gradients of what requires one."""
    model.zero_grad()
    device, dtype = model.cls_token.device, model.cls_token.dtype
    total, parts = loss(model, make_images(BATCH).to(device, dtype), TARGET.to(device), weights)
    assert list(parts) == ["task"]
    assert_equal("task", parts["task"].detach(), total.detach())
    total.backward()
    # a twin's blocks are wrapped, its parameters are the model's
    grads = {name.replace(".block.", "."): value.grad for name, value in model.named_parameters()}
    return total.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def plain_soft_logits(model: VisionTransformer, images: Tensor) -> Tensor:
    """2.4 by hand: all tokens through every block, and a softmax whose exponentials are weighed."""
    method, heads = model.method, model.config.num_heads
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat((model.cls_token.expand(len(images), -1, -1), patches), dim=1) + model.pos_embed
    for index, block in enumerate(model.blocks):
        if index == BASE:
            lives = F.pad(method.lives(x), (1, 0), value=float(DEPTH))
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        exponentials = (q @ k.transpose(2, 3) * block.attn.scale).exp()
        if index >= BASE:
            weights = torch.sigmoid(method.config.temperature * (lives - index))
            exponentials = exponentials * weights[:, None, None, :].to(exponentials.dtype)
        attention = exponentials / exponentials.sum(dim=3, keepdim=True)
        x = x + block.attn.proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x[:, 0]))


def plain_soft_run(model: VisionTransformer) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = plain_soft_logits(model, make_images(BATCH).to(model.cls_token))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, TARGET.to(logits.device), label_smoothing=0.1)
    total.backward()
    return total.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


# 4: life 8, at blocks 4 to 11
SOFT_WEIGHTS = {
    1.0: (0.9820, 0.9526, 0.8808, 0.7311, 0.5, 0.2689, 0.1192, 0.0474),
    4.0: (1.0000, 1.0000, 0.9997, 0.9820, 0.5, 0.0180, 0.0003, 0.0000),
}


@pytest.mark.parametrize("temperature", SOFT_WEIGHTS)
def test_soft_weights(temperature: float) -> None:
    life_8 = torch.tensor([8.0])
    have = [log_soft_weights(life_8, block, temperature).exp().item() for block in range(4, 12)]
    assert have == pytest.approx(SOFT_WEIGHTS[temperature], abs=5e-5)  # four decimals


def test_soft_weights_of_any_life_are_finite() -> None:
    lives = torch.tensor([-1e6, -30.0, 40.0, 1e6], requires_grad=True)
    logs = log_soft_weights(lives, 4, 8.0)
    logs.sum().backward()
    assert bool(logs.isfinite().all())
    # by the formula: -softplus(-temp (life - t)), which is its argument far below 0
    assert logs.tolist() == pytest.approx([8 * (-1e6 - 4), 8 * (-30 - 4), 0.0, 0.0])
    assert lives.grad.tolist() == pytest.approx([8.0, 8.0, 0.0, 0.0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_stage_1_is_a_weighted_softmax(temperature: float, backend: str, device: str) -> None:
    # 5: loss and every gradient, those of what a run would freeze too
    model = life(device=device, temperature=temperature)
    got, grads = run(model, LifeLoss())
    plain, plain_grads = plain_soft_run(model)
    truth, true_grads = plain_soft_run(in_float64(model))
    assert_close_to_float64("loss", got, truth, plain)
    assert set(grads) == set(true_grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        assert_close_to_float64(name, grad, true_grads[name], plain_grads[name])


def test_the_gradient_is_the_slope() -> None:
    # gradcheck along one random direction of all parameters, in float64
    model = in_float64(life())
    _, grads = run(model, LifeLoss())
    directions = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in moved.named_parameters():
                value += sign * step * directions[name]
        ends.append(run(moved, LifeLoss())[0].item())
    slope = sum((grads[name] * direction).sum().item() for name, direction in directions.items())
    # central differences: the square of the step, and the loss's rounding over it
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-16 / step * 10)


def test_hot_soft_weights_are_the_threshold() -> None:
    # sigma(temp (life - t)) becomes [life > t]: the soft run is then the hard one that removes the rest
    model = life(temperature=1e6)
    hard = model.with_method(mtvit_ops.create_method("lifevit", base_block=BASE, mode="threshold"))
    hard.method.load_state_dict(model.method.state_dict())
    images = make_images(BATCH)
    with torch.no_grad():
        _, trace = hard(images, return_trace=True)
        assert_rounding(soft_logits(model, images), hard(images))
    assert len(set(trace.tokens_per_block[-1].tolist())) > 1
    assert (trace.extras["lives"][..., None] - torch.arange(BASE, DEPTH)).abs().min() > 1e-4, "a tie would be neither"


def test_the_authors_stage_1(golden: Path, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "life_train_stage1_t1"
    if not (golden / f"{name}.npz").is_file():
        pytest.skip(f"no recorded run {name} in {golden}")
    with np.load(golden / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    config = json.loads((golden / f"{name}.json").read_text())["config"]
    sizes = {key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}
    model = mtvit_ops.create_model(
        "lifevit_tiny_patch16_224",
        **sizes,
        budgets=config["num_patches_reserved"],
        base_block=config["layer_indices"][0],
        temperature=config["temperature"],
    )
    mtvit_ops.load_checkpoint(model, {key[2:]: value for key, value in arrays.items() if key.startswith("w/")})
    learning = freeze(model.to(device), 1)
    images, labels = arrays["t/image"].to(device), arrays["t/labels"].to(device)
    affine = {
        f"blocks.plugin_norm_layer.{kind}": torch.full((sizes["embed_dim"],), value, device=device, requires_grad=True)
        for kind, value in (("weight", 1.0), ("bias", 0.0))
    }
    with_affine = SimpleNamespace(layer_norm=lambda x, shape: F.layer_norm(x, shape, *affine.values()))
    with monkeypatch.context() as patched:
        patched.setattr("mtvit_ops.methods.life.F", with_affine)
        total, _ = loss(model, images, labels, LifeLoss(label_smoothing=config["label_smoothing"]))
    total.backward()

    def close(got: Tensor, want: Tensor, share: float) -> None:
        torch.testing.assert_close(got.detach().cpu(), want, rtol=0, atol=share * want.abs().max().item())

    close(soft_logits(model, images), arrays["t/logits"], ACTIVATIONS)
    close(total.reshape(arrays["t/loss"].shape), arrays["t/loss"], ACTIVATIONS)
    lives = arrays["t/life"]
    weights = [log_soft_weights(lives, block, 1.0).exp() for block in range(config["layer_indices"][0], sizes["depth"])]
    close(torch.stack(weights), arrays["t/soft_weights"], ACTIVATIONS)
    assert [value is model.method.weight for value in learning] == [True]
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["method.weight"]
    # the authors' norm before the scores has an affine that no optimiser of theirs moves: ours has none
    for name, value in (("blocks.patch_life_predictor.W", model.method.weight), *affine.items()):
        close(value.grad.reshape(arrays[f"t/grad/{name}"].shape), arrays[f"t/grad/{name}"], GRADIENTS)
    assert {f"t/grad/{name}" for name in affine} | {"t/grad/blocks.patch_life_predictor.W"} == {
        key for key in arrays if key.startswith("t/grad/")
    }


def test_numbers_that_learn_in_the_small_model() -> None:
    # 10
    with torch.device("meta"):
        model = mtvit_ops.create_model("lifevit_small_patch16_224")
    assert sum(value.numel() for value in freeze(model, 1)) == 384**2 == 147_456
    assert sum(value.numel() for value in freeze(model, 2)) == 8 * (12 * 384**2 + 13 * 384) == 14_195_712


@STAGES
def test_who_learns(stage: int, backend: str, device: str) -> None:
    # 10
    model = life(stage, device)
    _, grads = run(model, LifeLoss(stage))
    names = [name for name, _ in model.named_parameters()]
    blocks = tuple(f"blocks.{index}." for index in range(BASE, DEPTH))
    assert set(grads) == ({"method.weight"} if stage == 1 else {name for name in names if name.startswith(blocks)})
    assert all(bool((grad != 0).any()) for grad in grads.values())
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    assert set(grads) == learning


@pytest.mark.parametrize("mode", ["budget", "threshold"])
def test_removal_trains_like_masking(mode: str, backend: str, device: str) -> None:
    # 8, in float64: losses and gradients of removed tokens' twin, which masks them
    model = in_float64(life(2, device, mode=mode))
    got, grads = run(model, LifeLoss(2))
    want, masked = run(masked_twin(model), LifeLoss(2))
    assert_rounding(got, want)
    assert set(grads) == set(masked)
    for name, grad in grads.items():
        assert_rounding(grad, masked[name])


def test_removed_tokens_cost_no_training_time(backend: str, device: str) -> None:
    # rows of the attention's and the linear layers' passes, forward and backward
    model = life(2, device)
    with OpCounter() as counter:
        run(model, LifeLoss(2))
    counts = [NUM_TOKENS] * BASE + [
        model.method.budgets[model.method.starts.index(index)] for index in range(BASE, DEPTH)
    ]
    assert counts[-1] < NUM_TOKENS
    rows = [BATCH * count for count in counts]
    forward = [shape[0] for shape in counter.shapes["mtvit_ops::varlen_attention"]]
    backward = [shape[0] for shape in counter.shapes["mtvit_ops::varlen_attention_backward"]]
    assert forward == rows
    assert backward == rows[: BASE - 1 : -1]  # frozen blocks have none


def test_stage_2_ignores_the_temperature_and_stage_1_the_budgets() -> None:
    for stage, options in ((2, {"temperature": 8.0}), (1, {"mode": "threshold"})):
        want, grads = run(life(stage), LifeLoss(stage))
        got, same_grads = run(life(stage, **options), LifeLoss(stage))
        assert_equal("loss", got, want)
        assert all(torch.equal(same_grads[name], grad) for name, grad in grads.items())


@STAGES
def test_soft_targets_and_smoothing(stage: int) -> None:
    model, images = life(stage), make_images(BATCH)
    one_hot = F.one_hot(TARGET, TINY["num_classes"]).float()
    smooth = one_hot * 0.9 + 0.1 / TINY["num_classes"]
    hard, _ = loss(model, images, TARGET, LifeLoss(stage))
    for target, smoothing in ((one_hot, 0.1), (smooth, 0.0)):
        soft, _ = loss(model, images, target, LifeLoss(stage, smoothing))
        assert_rounding(soft.detach(), hard.detach(), depth=1)
    bare, _ = loss(model, images, TARGET, LifeLoss(stage, 0.0))
    assert bare != hard


@STAGES
@pytest.mark.parametrize("mode", ["budget", "threshold"])
def test_nothing_waits_for_the_device(mode: str, stage: int) -> None:
    # on the meta device there are no values to look at
    model = life(stage, mode=mode).to("meta")
    total, _ = loss(model, make_images(BATCH).to("meta"), TARGET.to("meta"), LifeLoss(stage))
    total.backward()
    assert total.is_meta
    assert all(value.grad.is_meta for value in model.parameters() if value.requires_grad)


@STAGES
def test_activation_checkpointing(stage: int, backend: str, device: str) -> None:
    model = life(stage, device)
    want, grads = run(model, LifeLoss(stage))
    got, again = run(checkpointed_twin(model), LifeLoss(stage))
    assert_equal("loss", got, want)
    for name, grad in again.items():  # the same operations in the same order
        assert_equal(name, grad, grads[name])
    assert len(again) == len(grads)


def under_autocast(device: str, run_it: Any) -> Any:
    with torch.autocast(device, dtype=torch.bfloat16):
        return run_it()


def test_autocast_in_stage_1(backend: str, device: str) -> None:
    model = life(1, device)
    got, grads = under_autocast(device, lambda: run(model, LifeLoss()))
    plain, plain_grads = under_autocast(device, lambda: plain_soft_run(model))
    truth, true_grads = plain_soft_run(in_float64(model))
    assert got.dtype == grads["method.weight"].dtype == torch.float32
    allowed = 2 * max_error(plain, truth) + torch.finfo(torch.bfloat16).eps * truth.abs()
    assert (got - truth).abs() <= allowed
    name, eps = "method.weight", torch.finfo(torch.bfloat16).eps
    allowed = 2 * max_error(plain_grads[name], true_grads[name]) + eps * true_grads[name].abs().max()
    assert max_error(grads[name], true_grads[name]) <= allowed


def test_autocast_in_stage_2(backend: str, device: str) -> None:
    # held to the masked twin, which removes nothing, in the same precision
    model = life(2, device)
    got, grads = under_autocast(device, lambda: run(model, LifeLoss(2)))
    plain, plain_grads = under_autocast(device, lambda: run(masked_twin(model), LifeLoss(2)))
    truth, true_grads = run(in_float64(model), LifeLoss(2))
    eps = torch.finfo(torch.bfloat16).eps
    assert (got - truth).abs() <= 2 * max_error(plain, truth) + eps * truth.abs()
    for name, grad in grads.items():
        masked = plain_grads[name]
        assert grad.dtype == torch.float32
        allowed = 2 * max_error(masked, true_grads[name]) + eps * true_grads[name].abs().max()
        assert max_error(grad, true_grads[name]) <= allowed, name


def test_autocast_does_not_round_the_lives(backend: str, device: str) -> None:
    method, x = life(device=device).method, torch.randn(BATCH, NUM_TOKENS, 32, device=device)
    assert_equal("lives", under_autocast(device, lambda: method.lives(x)), method.lives(x))


def test_equal_scores_have_a_finite_gradient() -> None:
    model = life(1)
    with torch.no_grad():
        model.method.weight.zero_()
    _, grads = run(model, LifeLoss())
    assert bool(grads["method.weight"].isfinite().all())


def test_evaluation_without_gradients_gives_the_same_loss(backend: str, device: str) -> None:
    model, images, target = life(1, device), make_images(BATCH, device=device), TARGET.to(device)
    for stage in (1, 2):
        want, _ = loss(model, images, target, LifeLoss(stage))
        with torch.inference_mode():
            got, _ = loss(model, images, target, LifeLoss(stage))
        assert_rounding(got, want.detach())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stage": 0}, ValueError, r"stage must be in \[1, 2\], got 0"),
        ({"stage": 3}, ValueError, r"stage must be in \[1, 2\], got 3"),
        ({"stage": True}, TypeError, "stage must be an int, got bool"),
        ({"stage": 1.0}, TypeError, "stage must be an int, got float"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
    ],
)
def test_bad_weights(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LifeLoss(**options)


def test_bad_calls() -> None:
    model, images = life(), make_images(BATCH)
    with pytest.raises(TypeError, match="model must run Life, got Dense"):
        loss(build("vit"), images, TARGET, LifeLoss())
    with pytest.raises(TypeError, match="model must run Life, got Dense"):
        freeze(build("vit"), 1)
    with pytest.raises(ValueError, match=r"stage must be in \[1, 2\], got 3"):
        freeze(model, 3)
    for stage in (1, 2):
        with pytest.raises(TypeError, match="images must have dtype float32, got float64"):
            loss(model, images.double(), TARGET, LifeLoss(stage))
        with pytest.raises(ValueError, match=r"target must have shape \(4,\), got \(3,\)"):
            loss(model, images, TARGET[:3], LifeLoss(stage))
