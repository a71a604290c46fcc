"""Evo-ViT's soft selection: everyone goes on, weighed by a score that has a gradient, against softmax written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import assert_slope, gradients, make_target
from model_cases import NUM_TOKENS, TINY, assert_rounding, build, in_float64, make_images, permute_patches
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.nn import VisionTransformer, checkpointed_twin, drop_path_twin, masked_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal, max_error
from mtvit_ops.train import compute_loss, evo_soft
from mtvit_ops.train.evo_soft import log_soft_weights

BATCH, DEPTH, PATCHES = 5, TINY["depth"], NUM_TOKENS - 1
SOFT: dict[str, Any] = {"selection": "soft"}
VARIANTS: dict[str, dict[str, Any]] = {
    "stage": {"class_head": True},
    "layer": {"class_head": True, "mode": "layer"},
    "class-pool": {"pool": "class"},
    "one-selection": {"pool": "class", "keep_ratios": (1.0, 1.0, 1.0, 1.0, 0.4, 0.4)},
    "dense-between": {"mode": "layer", "pool": "class", "keep_ratios": (1.0, 1.0, 0.5, 1.0, 0.4, 1.0)},
    "none-kept": {"keep_ratios": 1e-6, "pool": "class"},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def evo(variant: str = "stage", device: str = "cpu", **options: Any) -> VisionTransformer:
    return build("evovit", device=device, **({"keep_ratios": 0.7, "tradeoffs": 0.8} | VARIANTS[variant] | options))


def weights_of(variant: str, **more: Any) -> dict[str, Any]:
    return SOFT | ({} if VARIANTS[variant].get("class_head") else {"task": 1.0, "class_task": 0.0}) | more


def plain_loss(model: VisionTransformer, images: Tensor, target: Tensor, temperature: float = 3.0) -> Tensor:
    """By hand: a softmax whose exponentials are weighed, in every block behind a selection."""
    method, heads = model.method, model.config.num_heads
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat((model.cls_token.expand(len(images), -1, -1), patches), dim=1) + model.pos_embed
    weights = torch.ones(len(images), NUM_TOKENS, dtype=images.dtype, device=images.device)
    score: Any = None
    for index, block in enumerate(model.blocks):
        keep = int(PATCHES * method.keep_ratios[index])
        selects = index in (DEPTH // 3, 2 * DEPTH // 3) if method.config.mode == "stage" else index > 0
        if selects:
            weights = torch.ones_like(weights)
        if selects and keep < PATCHES:
            logs = score[:, 1:].log()
            z = (logs - logs.mean(1, keepdim=True)) / logs.std(1, keepdim=True)
            ranked = z.detach().sort(dim=1, descending=True).values
            edge = (ranked[:, keep - 1] + ranked[:, keep]) / 2 if keep else ranked[:, 0]
            weights = torch.cat((weights[:, :1], torch.sigmoid(temperature * (z - edge[:, None]))), dim=1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        exponentials = (q @ k.transpose(2, 3) * block.attn.scale).exp() * weights[:, None, None, :]
        attention = exponentials / exponentials.sum(dim=3, keepdim=True)
        received = attention[:, :, 0].sum(dim=1)
        share = method.tradeoffs[index]
        score = received if score is None else (1 - share) * score + share * received
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    pooled = x[:, 0] if method.config.pool == "class" else x[:, 1:].mean(dim=1)
    task = F.cross_entropy(model.head(model.norm(pooled)), target)
    if not method.config.class_head:
        return task
    return (task + F.cross_entropy(method.head_cls(method.norm_cls(x[:, 0])), target)) / 2


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@EVERY_VARIANT
def test_a_weighted_softmax(variant: str, temperature: float, backend: str, device: str) -> None:
    model, images, target = evo(variant, device), make_images(BATCH, device=device), make_target(BATCH, device=device)
    got, _ = compute_loss(model, images, target, **weights_of(variant, temperature=temperature))
    plain = plain_loss(model, images, target, temperature)
    exact = in_float64(model)
    truth = plain_loss(exact, images.double(), target, temperature)
    assert_close_to_float64("loss", got.detach(), truth.detach(), plain.detach())
    found, by_hand, true = gradients(model, got), gradients(model, plain), gradients(exact, truth)
    for name, grad in found.items():
        assert_close_to_float64(name, grad, true[name], by_hand[name])


@EVERY_VARIANT
def test_gradients_are_slopes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # with every edge where it is in the first of the three passes: to the gradient it is a constant
    original, edges, calls = evo_soft.edge, [], 0

    def remembered(z: Tensor, keep: int) -> Tensor:
        nonlocal calls
        if len(edges) < selections:
            edges.append(original(z, keep))
        calls += 1
        return edges[(calls - 1) % selections]

    model = in_float64(evo(variant))
    selections = sum(model.method.selects)
    selections -= sum(model.method.selects[i] and model.method.keep_ratios[i] == 1 for i in range(DEPTH))
    monkeypatch.setattr(evo_soft, "edge", remembered)
    assert_slope(model, make_images(BATCH).double(), make_target(BATCH), **weights_of(variant))
    assert calls == 3 * selections > 0


def test_the_class_attention_learns() -> None:
    # what hard selection never tells it: the gradient of a block's class query by what the blocks behind select
    model, images, target = evo("one-selection"), make_images(BATCH), make_target(BATCH)
    soft, _ = compute_loss(model, images, target, **weights_of("one-selection"))
    blind, _ = compute_loss(model, images, target, **weights_of("one-selection", temperature=1e-6))
    assert not torch.equal(soft.detach(), blind.detach())
    name = "blocks.3.attn.qkv.weight"
    assert max_error(gradients(model, soft)[name], gradients(model, blind)[name]) > 1e-6


def test_hot_soft_weights_are_the_hard_selection() -> None:
    # one selection, read by the class token: nobody comes back, so hidden and waiting is the same
    model, images, target = in_float64(evo("one-selection")), make_images(BATCH).double(), make_target(BATCH)
    hard, _ = compute_loss(model, images, target, task=1.0, class_task=0.0)
    soft, _ = compute_loss(model, images, target, **weights_of("one-selection", temperature=1e6))
    assert_rounding(soft.detach(), hard.detach())
    other, _ = compute_loss(model, images, target, **weights_of("one-selection"))
    assert abs(float((other - hard).detach())) > 1e-6


@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_nothing_to_select(mode: str) -> None:
    model, images, target = evo(mode=mode, keep_ratios=1.0), make_images(BATCH), make_target(BATCH)
    hard, _ = compute_loss(model, images, target)
    soft, _ = compute_loss(model, images, target, **SOFT)
    assert_equal("loss", soft.detach(), hard.detach())


def test_soft_weights() -> None:
    scores = torch.tensor([[0.8, 0.05, 0.4, 0.1, 0.2], [0.3, 0.3, 0.3, 0.3, 0.3]], dtype=torch.float64)
    # logarithms two to one: z is symmetric about 0.2, and its deviation log(2) * sqrt(2.5)
    step = 2.5**-0.5
    want = [torch.tensor([2 - at, -2 - at, 1 - at, -1 - at, -at]) * step for at in (0.5, 2.0)]
    for keep, expected in ((2, want[0]), (0, want[1])):
        found = log_soft_weights(scores, keep, 3.0).exp()
        assert found[0].tolist() == pytest.approx(torch.sigmoid(3.0 * expected).tolist(), abs=1e-6)
        assert found[1].tolist() == [0.5] * 5  # equal patches are all on the edge
    sharp = log_soft_weights(scores[:1], 2, 1e6)
    assert bool(sharp.isfinite().all())
    assert (sharp.exp() == torch.tensor([[1, 0, 1, 0, 0]])).all()


@pytest.mark.parametrize("scores", [torch.zeros(2, 7), torch.full((2, 7), 0.1), torch.full((2, 1), 0.4)])
def test_equal_scores_have_a_finite_gradient(scores: Tensor) -> None:
    scores.requires_grad_()
    log_soft_weights(scores, 0, 3.0).sum().backward()
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("variant", ["stage", "layer"])
def test_permuted_patches_change_no_term(variant: str) -> None:
    model, images, target = in_float64(evo(variant)), make_images(BATCH).double(), make_target(BATCH)
    _, parts = compute_loss(model, images, target, **SOFT)
    twin, moved = permute_patches(model, images, torch.randperm(PATCHES))
    _, again = compute_loss(twin, moved, target, **SOFT)
    for name, value in parts.items():
        assert_rounding(again[name].detach(), value.detach())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@EVERY_VARIANT
def test_checkpointing_changes_no_bit(variant: str, autocast: bool) -> None:
    model, images, target = evo(variant), make_images(BATCH), make_target(BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, _ = compute_loss(model, images, target, **weights_of(variant))
        total, _ = compute_loss(checkpointed_twin(model), images, target, **weights_of(variant))
    assert_equal("loss", total.detach(), want.detach())
    wanted = gradients(model, want)
    for name, grad in gradients(model, total).items():
        assert_equal(name, grad, wanted[name])


def test_twins() -> None:
    model, images, target = evo(), make_images(BATCH), make_target(BATCH)
    want = compute_loss(model, images, target, **SOFT)[0].detach()
    assert_equal("masked", compute_loss(masked_twin(model), images, target, **SOFT)[0].detach(), want)
    dropping = drop_path_twin(model, 0.5)
    assert_equal("evaluating", compute_loss(dropping.eval(), images, target, **SOFT)[0].detach(), want)
    drawn = []
    for twin in (dropping, checkpointed_twin(dropping)):
        torch.manual_seed(0)
        drawn.append(compute_loss(twin.train(), images, target, **SOFT)[0].detach())
    assert not torch.equal(drawn[0], want)
    assert_equal("checkpointed", drawn[1], drawn[0])


def test_autocast() -> None:
    model, images, target = evo(), make_images(BATCH), make_target(BATCH)
    truth = plain_loss(in_float64(model), images.double(), target).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = compute_loss(model, images, target, **SOFT)
        plain = plain_loss(model, images, target).detach()
    assert got.dtype == torch.float32
    # a bfloat16 step of the loss, beside twice what plain PyTorch loses
    allowed = 2 * abs(float(plain) - float(truth)) + torch.finfo(torch.bfloat16).eps * float(truth)
    assert abs(float(got.detach()) - float(truth)) <= allowed
    assert all(bool(grad.isfinite().all()) for grad in gradients(model, got).values())


@EVERY_VARIANT
def test_stays_on_the_device(variant: str) -> None:
    # the meta device has no values to wait for
    model = evo(variant).to("meta")
    images, target = make_images(BATCH).to("meta"), make_target(BATCH).to("meta")
    total, parts = compute_loss(model, images, target, **weights_of(variant))
    assert all(value.is_meta for value in (*parts.values(), *gradients(model, total).values()))


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ({"selection": "softly"}, ValueError, "selection must be one of 'hard', 'soft', got 'softly'"),
        ({"temperature": 0.0}, ValueError, "temperature must be in"),
        ({"temperature": "3"}, TypeError, "temperature must be a number, got str"),
    ],
)
def test_bad_weights(weights: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compute_loss(evo(), make_images(BATCH), make_target(BATCH), **weights)
