"""Drop-path: timm's, image by image, on tokens that are packed; nothing of it in evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drop_path_cases import scripted_draws
from loss_cases import gradients, make_target
from model_cases import ALL, TINY, OpCounter, assert_rounding, build, build_case, in_float64, make_images
from torch import Tensor, nn
from torch.nn import functional as F

from mtvit_ops import RaggedTokens
from mtvit_ops._timm import import_timm
from mtvit_ops.nn import VisionTransformer, checkpointed_twin, drop_path_twin, masked_twin
from mtvit_ops.nn.drop_path import DropPathBlock
from mtvit_ops.testing import assert_close_to_float64, assert_equal

BATCH, RATE, DEPTH = 5, 0.6, TINY["depth"]
RATES = [RATE * index / (DEPTH - 1) for index in range(DEPTH)]


def timm_model(like: VisionTransformer) -> nn.Module:
    """timm's ViT with drop-path and the weights of ours."""
    timm = import_timm()
    model = timm.models.vision_transformer.VisionTransformer(patch_size=16, drop_path_rate=RATE, **TINY)
    model.load_state_dict(like.state_dict())
    for block, rate in zip(model.blocks, RATES, strict=True):
        for half in (block.drop_path1, block.drop_path2):
            # timm's rates pass through float32
            assert getattr(half, "drop_prob", 0.0) == pytest.approx(rate, rel=2**-23)
            half.drop_prob = rate
    return model.to(like.cls_token).train()


def dropped(
    model: nn.Module, images: Tensor, autocast: bool = False, rate: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, always with the same draws; a rate asks for our twin."""
    target = make_target(BATCH, device=images.device.type)
    with scripted_draws(5), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        run = drop_path_twin(model, rate) if rate else model
        loss = F.cross_entropy(run(images.to(next(model.parameters()).dtype)), target)
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_equals_timm(autocast: bool, backend: str, device: str) -> None:
    model, images = build("vit", device=device).train(), make_images(BATCH, device=device)
    plain, double = timm_model(model), timm_model(in_float64(model))
    got, grads = dropped(model, images, autocast, RATE)
    want, wanted = dropped(plain, images, autocast)
    truth, true_grads = dropped(double, images)
    rounded = (lambda x: x.bfloat16()) if autocast else (lambda x: x)  # what is compared was rounded so on the way
    assert_close_to_float64("loss", rounded(got), truth, want)
    for name, grad in true_grads.items():
        assert_close_to_float64(name, rounded(grads[name]), grad, wanted[name])
    undropped, _ = dropped(model, images)
    assert (undropped - truth).abs() > 10 * (got - truth).abs()


def test_draws_as_timm_does() -> None:
    """A seed means the same masks as in timm, on the CPU: the same numbers are asked for in the same order."""
    model, images = in_float64(build("vit")).train(), make_images(BATCH).double()
    results = []
    for each in (drop_path_twin(model, RATE), timm_model(model)):
        torch.manual_seed(3)
        results.append((each(images).detach(), torch.get_rng_state()))
    assert_rounding(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ALL)
def test_removal_equals_masking(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device).train(), make_images(BATCH, device=device)
    found = []
    for twin in (drop_path_twin(model, 0.3), drop_path_twin(masked_twin(model), 0.3)):
        with scripted_draws(2):
            logits, trace = twin(images, return_trace=True)
        grads = gradients(model, logits.square().sum())
        found.append((logits.detach(), trace, grads))
    (logits, trace, grads), (want, wanted_trace, wanted) = found
    assert_equal("tokens per block", trace.tokens_per_block, wanted_trace.tokens_per_block)
    assert_rounding(logits, want)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in grads.items():
        assert_rounding(grad / largest, wanted[key] / largest)
    assert not torch.equal(logits, model(images))


def ragged_tokens() -> tuple[RaggedTokens, Tensor]:
    """Three images with some of their rows alive, and the image of each live row."""
    lengths, rows = torch.tensor([3, 1, 4]), torch.tensor([5, 0, 2, 8, 20, 14, 15, 16], dtype=torch.int32)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    x = torch.randn(21, TINY["embed_dim"])
    return RaggedTokens(x, rows, offsets, 4), torch.arange(3).repeat_interleave(lengths)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "all"])
@pytest.mark.parametrize("half", ["attend", "feed_forward"])
def test_a_skip_is_the_identity_of_its_image_alone(half: str, listed: bool) -> None:
    tokens, image = ragged_tokens()
    if not listed:
        tokens = tokens._replace(x=tokens.packed(), rows=None)
    block = build("vit").train().blocks[0]
    rows = torch.arange(len(image)) if tokens.rows is None else tokens.rows.long()
    plain = block.attend(tokens)[0] if half == "attend" else block.feed_forward(tokens)
    skips = set()
    for seed in range(20):
        torch.manual_seed(seed)
        dropping = DropPathBlock(block, 0.5, training=True)
        after = dropping.attend(tokens)[0] if half == "attend" else dropping.feed_forward(tokens)
        torch.manual_seed(seed)
        factor = dropping.draw(tokens.x, 3)[image, None]
        skipped = rows[factor[:, 0] == 0]
        assert torch.equal(after.x[skipped], tokens.x[skipped])
        # twice what is gained, by one rounding more, and what is not alive stays
        gain = torch.zeros_like(tokens.x).index_copy(0, rows, (plain.x - tokens.x)[rows] * factor)
        assert_rounding(after.x.detach(), (tokens.x + gain).detach(), depth=1)
        dead = torch.ones(len(tokens.x), dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(after.x[dead], tokens.x[dead])
        skips.add(tuple(factor[:, 0].tolist()))
    assert len(skips) == 8  # every way in which three images can go


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_mean_over_draws_is_the_branch(rate: float) -> None:
    """A factor has mean 1 and variance rate / (1 - rate): five standard deviations of a mean over so many images."""
    images, block = 20000, build("vit").blocks[0]
    one = torch.randn(3, TINY["embed_dim"])
    tokens = RaggedTokens.from_dense(one.expand(images, -1, -1))
    allowed = 5 * math.sqrt(rate / (1 - rate) / images)
    dropping = DropPathBlock(block, rate, training=True)
    with torch.no_grad():
        gains = [
            (after.x.reshape(images, 3, -1) - one).double()
            for after in (dropping.attend(tokens)[0], dropping.feed_forward(tokens))
        ]
        single = RaggedTokens.from_dense(one[None])
        wanted = [(after.x - one).double() for after in (block.attend(single)[0], block.feed_forward(single))]
    for gain, want in zip(gains, wanted):
        error = (gain.mean(dim=0) - want).abs()
        # float32 sums of a gain and its row beside the draws
        assert bool((error <= allowed * want.abs() + 1e-5 * (one.abs() + want.abs())).all())
        skipped = (gain == 0).all(dim=(1, 2)).double().mean()
        assert abs(float(skipped) - rate) <= 5 * math.sqrt(rate * (1 - rate) / images)
    both = [(gain == 0).all(dim=(1, 2)) for gain in gains]
    assert abs(float((both[0] & both[1]).double().mean()) - rate**2) <= 5 * math.sqrt(rate**2 / images)  # independent


@pytest.mark.parametrize("name", ALL)
def test_no_trace_in_evaluation_or_without_a_rate(name: str) -> None:
    model, images = build_case(name), make_images(BATCH)
    state = torch.get_rng_state()
    for mode, rate in ((False, 0.5), (True, 0.0)):
        twin = drop_path_twin(model.train(mode), rate)
        with OpCounter() as ours:
            logits = twin(images)
        with OpCounter() as plain:
            want = model(images)
        assert torch.equal(logits, want)
        assert ours.shapes == plain.shapes
        wanted = gradients(model, want.square().sum())
        assert all(torch.equal(grad, wanted[key]) for key, grad in gradients(model, logits.square().sum()).items())
    assert torch.equal(torch.get_rng_state(), state)
    # a mode of its own
    twin = drop_path_twin(model.eval(), 0.5)
    assert not any(module.training for module in twin.blocks)
    twin.train()
    assert all(module.training for module in twin.blocks)
    assert not twin.eval().blocks[1].training


def test_shares_weights_and_holds_the_rates() -> None:
    model = build("vit").train()
    for twin in (
        drop_path_twin(model, RATE),
        checkpointed_twin(drop_path_twin(model, RATE)),
        drop_path_twin(checkpointed_twin(model), RATE),
        checkpointed_twin(masked_twin(drop_path_twin(model, RATE))),
    ):
        assert [value.data_ptr() for value in twin.parameters()] == [value.data_ptr() for value in model.parameters()]
        # the draws stand outside, or a block computed again would be drawn again
        assert [block.rate for block in twin.blocks[1:]] == RATES[1:]
        assert not isinstance(twin.blocks[0], DropPathBlock)
    assert not any(isinstance(module, DropPathBlock) for module in model.modules())
    single = build("vit", depth=1).train()
    assert torch.equal(drop_path_twin(single, 0.5)(make_images(2)), single(make_images(2)))


def test_inference_without_gradients_drops_too() -> None:
    model, images = build_case("evovit-stage").train(), make_images(BATCH)
    twin = drop_path_twin(model, RATE)
    with scripted_draws(1):
        want = twin(images)
    with scripted_draws(1), torch.no_grad():
        assert_rounding(twin(images), want.detach())


def test_a_half_model_stays_one() -> None:
    model, images = build("vit").train().bfloat16(), make_images(BATCH).bfloat16()
    with scripted_draws(1):
        logits = drop_path_twin(model, RATE)(images)
    with scripted_draws(1):
        truth = drop_path_twin(in_float64(model), RATE)(images.double())
    with scripted_draws(1):
        plain = timm_model(model)(images)
    assert logits.dtype == torch.bfloat16
    assert_close_to_float64("logits", logits.detach(), truth.detach(), plain.detach())


@pytest.mark.parametrize("name", ["vit", "avit", "evovit-stage", "lifevit-budget", "mtvit"])
def test_nothing_waits_for_the_device(name: str) -> None:
    # the meta device has no values to wait for
    twin = drop_path_twin(build_case(name).to("meta").train(), 0.3)
    logits = twin(make_images(3).to("meta"))
    logits.sum().backward()
    assert logits.is_meta


@pytest.mark.parametrize("dead", [0, 3])
def test_every_token_gets_its_image_s_value(dead: int) -> None:
    for lengths in ([2, 0, 3, 0], [0, 1], [0, 0], [1]):
        total = sum(lengths)
        rows = torch.cat((torch.arange(total), torch.full((dead,), -1))).to(torch.int32)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        values = torch.arange(1.0, len(lengths) + 1)
        tokens = RaggedTokens(torch.zeros(total, 4), rows, offsets, max(lengths))
        got = tokens.per_token(values)
        assert got.shape == (total + dead, 1)
        assert_equal("values", got[:total, 0], values.repeat_interleave(torch.tensor(lengths)))
    empty = RaggedTokens(torch.zeros(0, 4), None, torch.zeros(1, dtype=torch.int32), 0)
    assert empty.per_token(torch.zeros(0)).shape == (0, 1)
    assert drop_path_twin(build("vit").train(), RATE)(make_images(0)).shape == (0, 10)


@pytest.mark.parametrize(
    ("rate", "error", "what"),
    [
        (1.0, ValueError, "rate must be below 1, or nothing is left to learn from, got 1"),
        (-0.1, ValueError, r"rate must be in \[0.0, 1.0\], got -0.1"),
        (1.5, ValueError, r"rate must be in \[0.0, 1.0\], got 1.5"),
        (float("nan"), ValueError, r"rate must be in \[0.0, 1.0\], got nan"),
        ("0.1", TypeError, "rate must be a number, got str"),
        (True, TypeError, "rate must be a number, got bool"),
    ],
)
def test_bad_rates(rate: Any, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        drop_path_twin(build("vit"), rate)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model must be a VisionTransformer, got Linear"):
        drop_path_twin(nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]
    twin = drop_path_twin(build("vit"), 0.1)
    for each in (twin, checkpointed_twin(twin), masked_twin(twin)):
        with pytest.raises(ValueError, match="model must be without drop-path, got a twin that has it"):
            drop_path_twin(each, 0.1)
