"""What every method owes, whatever it drops: removal is masking, a batch is its images, nothing dropped is dense."""

from __future__ import annotations

import pytest
import torch
from model_cases import (
    ALL,
    DENSE,
    DROPS_NOTHING,
    METHODS,
    NUM_TOKENS,
    TINY,
    assert_rounding,
    build,
    build_case,
    in_float64,
    make_images,
)

from mtvit_ops import VisionTransformer, create_method
from mtvit_ops.nn import masked_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal, max_error

BATCH = 6
# counts that are known before the images are
FIXED_COUNTS = [name for name in METHODS if name.startswith(("evovit", "lifevit-budget"))]
UNEQUAL_COUNTS = [name for name in METHODS if name not in FIXED_COUNTS]


def same_sets(model: VisionTransformer, other: VisionTransformer, images: torch.Tensor) -> list[bool]:
    """For each image, whether both models keep the same tokens in every block."""
    with torch.inference_mode():
        traces = [each(images.to(each.cls_token.dtype), return_trace=True)[1] for each in (model, other)]
    return [
        all(
            torch.equal(traces[0].kept(block, image), traces[1].kept(block, image))
            for block in range(model.config.depth)
        )
        for image in range(len(images))
    ]


@pytest.mark.parametrize("name", METHODS)
def test_removal_is_masking(name: str, backend: str, device: str) -> None:
    # A6 of A-ViT, 8 of Life Regression
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    twin, truth = masked_twin(model), masked_twin(in_float64(model))
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        masked, masked_trace = twin(images, return_trace=True)
        exact = truth(images.double())
    assert_equal("tokens per block", trace.tokens_per_block, masked_trace.tokens_per_block)
    assert all(same_sets(model, twin, images))
    assert_close_to_float64("logits", logits, exact, masked)
    for key, value in trace.extras.items():
        if value.is_floating_point():
            assert_rounding(value, masked_trace.extras[key])
        else:
            assert_equal(key, value, masked_trace.extras[key])


@pytest.mark.parametrize("name", METHODS)
def test_fewer_tokens_are_computed_than_in_the_dense_model(name: str, backend: str, device: str) -> None:
    with torch.inference_mode():
        _, trace = build_case(name, device=device)(make_images(BATCH, device=device), return_trace=True)
    counts = trace.tokens_per_block
    assert counts.max() <= NUM_TOKENS
    assert counts[-1].float().mean() < NUM_TOKENS - 1
    if name in FIXED_COUNTS:
        assert bool((counts == counts[:, :1]).all())
    else:
        # what a padded batch would pay for
        assert int(counts[-1].max() - counts[-1].min()) >= 4


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_images_one_by_one(name: str, backend: str, device: str) -> None:
    # A12 of A-ViT, E17 of Evo-ViT, 12 of Life Regression, 9 of MT-ViT
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        alone = [model(image[None], return_trace=True) for image in images]
    assert_rounding(logits, torch.cat([each for each, _ in alone]))
    assert_equal("counts", trace.tokens_per_block, torch.cat([each.tokens_per_block for _, each in alone], dim=1))
    for image, (_, single) in enumerate(alone):
        for block in range(model.config.depth):
            assert_equal("kept", trace.kept(block, image), single.kept(block, 0))


@pytest.mark.parametrize("name", ALL)
def test_a_permuted_batch_permutes_the_outputs(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        moved, moved_trace = model(images[order], return_trace=True)
    assert_rounding(moved, logits[order])
    assert_equal("counts", moved_trace.tokens_per_block, trace.tokens_per_block[:, order])


@pytest.mark.parametrize("name", DROPS_NOTHING)
def test_nothing_dropped_is_the_dense_model(name: str, backend: str, device: str) -> None:
    # A2 of A-ViT, E2 of Evo-ViT, 9 of Life Regression, 4 of MT-ViT
    method, overrides, pool = DROPS_NOTHING[name]
    model, images = build(method, device=device, **overrides), make_images(BATCH, device=device)
    dense = model.with_method(create_method("vit", pool=pool))
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        exact, plain = in_float64(dense)(images.double()), dense(images)
    assert bool((trace.tokens_per_block == NUM_TOKENS).all())
    assert_close_to_float64("logits", logits, exact, plain)


@pytest.mark.parametrize("trace", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch(name: str, trace: bool, backend: str, device: str) -> None:
    model = build_case(name, device=device)
    with torch.inference_mode():
        result = model(make_images(0, device=device), return_trace=trace)
    logits = result[0] if trace else result
    assert logits.shape == (0, TINY["num_classes"])
    if trace:
        assert result[1].tokens_per_block.shape == (TINY["depth"], 0)
        for key, value in result[1].extras.items():
            assert value.numel() == 0, key


# an image that keeps its class token, or nothing, in a batch with one that keeps all it can
EVERY_PATCH_DROPPED = {
    "avit": ("avit", {"gate_scale": 1.0, "gate_center": -1e4}, 0),
    "evovit": ("evovit", {"keep_ratios": 1e-6, "pool": "class"}, 1),
    "evovit-mean": ("evovit", {"keep_ratios": 1e-6}, 1),
    "evovit-prune_cls": ("evovit", {"keep_ratios": 1e-6, "prune_cls": True}, 1),
    "evovit-layer": ("evovit", {"keep_ratios": 1e-6, "mode": "layer"}, 1),
    "lifevit": ("lifevit", {"budgets": (1, 1, 1), "base_block": 3}, 1),
    "mtvit-one-patch": ("mtvit", {"grids": (1, 4), "force_tail": 0}, 2),
}


@pytest.mark.parametrize("name", EVERY_PATCH_DROPPED)
def test_an_image_whose_every_patch_is_dropped(name: str, backend: str, device: str) -> None:
    method, overrides, left = EVERY_PATCH_DROPPED[name]
    model, images = build(method, device=device, **overrides), make_images(3, device=device)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        exact = masked_twin(in_float64(model))(images.double())
        plain = masked_twin(model)(images)
    assert trace.tokens_per_block[-1].tolist() == [left] * 3
    assert trace.kept(TINY["depth"] - 1, 0).tolist() == list(range(left))
    assert_close_to_float64("logits", logits, exact, plain)


def test_images_of_very_different_counts_share_a_batch(backend: str, device: str) -> None:
    model, images = build_case("avit", device=device), make_images(BATCH, device=device)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
    ends = trace.tokens_per_block[-1].tolist()
    # one image has nothing left, another more than a third of its tokens
    assert min(ends) == 0
    assert max(ends) >= 6
    assert len(set(ends)) >= 4


@pytest.mark.parametrize("name", ALL)
def test_gradients_do_not_change_the_result(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    kept = images.clone()
    with torch.inference_mode():
        written_in_place, again = model(images), model(images)
    functional = model(images)
    assert_equal("logits, run again", again, written_in_place)
    assert_rounding(functional.detach(), written_in_place)
    functional.sum().backward()
    grads = {key: value.grad for key, value in model.named_parameters()}
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads.values())
    assert grads["patch_embed.proj.weight"].abs().max() > 0
    assert grads["blocks.0.attn.qkv.weight"].abs().max() > 0
    assert_equal("images", images, kept)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("name", ALL)
def test_autocast(name: str, grad: bool, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    with torch.set_grad_enabled(grad), torch.autocast(device, dtype=torch.bfloat16):
        logits = model(images)
    assert logits.shape == (BATCH, TINY["num_classes"])
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device).bfloat16()
    half = build_case(name, device=device).bfloat16()
    model.load_state_dict(half.state_dict())  # the same numbers in float32
    dense = create_method("vit", pool=getattr(model.method.config, "pool", "class"))
    with torch.inference_mode():
        logits, trace = model(images.float(), return_trace=True)
        rounded, half_trace = half(images, return_trace=True)
        plain = max_error(half.with_method(dense)(images), model.with_method(dense)(images.float()))
    assert rounded.dtype == torch.bfloat16
    assert bool(rounded.isfinite().all())
    if name in FIXED_COUNTS or name in DENSE:
        assert_equal("counts", half_trace.tokens_per_block, trace.tokens_per_block)
    # what the dense model loses in bfloat16, twice, on images where rounding changed no decision
    same = same_sets(model, half, images.float())
    assert sum(same) >= (BATCH if name in DENSE else 1)
    assert max_error(rounded[same], logits[same]) <= 2 * plain + torch.finfo(torch.bfloat16).eps * logits.abs().max()
