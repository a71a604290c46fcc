"""Multiply-accumulates counted on real runs, against the specifications' tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ALL, TINY, build, build_case, make_images
from torch.utils.flop_counter import FlopCounterMode

from mtvit_ops import MacCount, VisionTransformer, count_macs, create_model, ops
from mtvit_ops.flops import register_flop_formulas
from mtvit_ops.methods.mt_vit import tail_geometry

CLOSE, TIGHT = 5e-3, 1e-3  # the specifications' own bounds: 0.5 %, and 0.1 % for MT-ViT's table

# name, overrides, side: GMACs; one image of noise, for counts that do not depend on it
TABLE: dict[str, tuple[str, dict[str, Any], int, float, float]] = {
    "vit-tiny": ("vit_tiny", {}, 224, 1.2537, CLOSE),
    "vit-small": ("vit_small", {}, 224, 4.5989, CLOSE),
    "vit-base": ("vit_base", {}, 224, 17.5638, CLOSE),
    "vit-small-384": ("vit_small", {"img_size": 384}, 384, 15.490, CLOSE),
    # A10: nothing halts
    "avit-tiny": ("avit_tiny", {"gate_center": 1e9}, 224, 1.2537, CLOSE),
    "avit-small": ("avit_small", {"gate_center": 1e9}, 224, 4.5989, CLOSE),
    # E14
    "evovit-tiny": ("evovit_tiny", {}, 224, 0.817754, CLOSE),
    "evovit-tiny-layer": ("evovit_tiny", {"mode": "layer"}, 224, 0.817754, CLOSE),
    "evovit-small": ("evovit_small", {}, 224, 3.033, CLOSE),
    "evovit-base": ("evovit_base", {}, 224, 11.658, CLOSE),
    "evovit-small-384": ("evovit_small", {"img_size": 384}, 384, 9.881, CLOSE),
    # Life, 2.7
    "lifevit-tiny-0.9": ("lifevit_tiny", {"keep_ratio": 0.9}, 224, 1.1064, CLOSE),
    "lifevit-tiny-0.8": ("lifevit_tiny", {"keep_ratio": 0.8}, 224, 0.9692, CLOSE),
    "lifevit-tiny-0.7": ("lifevit_tiny", {}, 224, 0.8576, CLOSE),
    "lifevit-small-0.9": ("lifevit_small", {"keep_ratio": 0.9}, 224, 4.0797, CLOSE),
    "lifevit-small-0.8": ("lifevit_small", {"keep_ratio": 0.8}, 224, 3.5857, CLOSE),
    "lifevit-small-0.7": ("lifevit_small", {}, 224, 3.1767, CLOSE),
    "lifevit-base-0.7": ("lifevit_base", {}, 224, 12.1998, CLOSE),
    # MT-ViT, 1.6
    "mtvit-tiny-7": ("mtvit_tiny", {"force_tail": 0}, 224, 0.3060, TIGHT),
    "mtvit-tiny-10": ("mtvit_tiny", {"force_tail": 1}, 224, 0.6138, TIGHT),
    "mtvit-tiny-14": ("mtvit_tiny", {"force_tail": 2}, 224, 1.2537, TIGHT),
    "mtvit-small-7": ("mtvit_small", {"force_tail": 0}, 224, 1.1429, TIGHT),
    "mtvit-small-10": ("mtvit_small", {"force_tail": 1}, 224, 2.2999, TIGHT),
    "mtvit-small-14": ("mtvit_small", {"force_tail": 2}, 224, 4.5989, TIGHT),
    "mtvit-base-7": ("mtvit_base", {"force_tail": 0}, 224, 4.4092, TIGHT),
}


@pytest.mark.parametrize("case", TABLE)
def test_tables(case: str) -> None:
    name, overrides, side, gmacs, bound = TABLE[case]
    model = create_model(f"{name}_patch16_224", **overrides).eval()
    assert count_macs(model, torch.randn(1, 3, side, side)).per_image / 1e9 == pytest.approx(gmacs, rel=bound)


def formula(model: VisionTransformer, counts: torch.Tensor) -> torch.Tensor:
    """Of each image from its tokens per block (L, B): A-ViT 1.5, without what a method adds of its own."""
    config = model.config
    dim, tokens = config.embed_dim, counts.double()
    blocks = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    embedding = config.num_patches * config.in_chans * config.patch_size**2 * dim
    return blocks.sum(dim=0) + embedding + config.num_classes * dim


@pytest.mark.parametrize("name", [name for name in ALL if "mtvit" not in name])
def test_every_image_costs_what_its_tokens_cost(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(5, device=device)
    counted = count_macs(model, images)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
    want = formula(model, trace.tokens_per_block.cpu())
    if "lifevit" in name:  # W c once and a product with every patch
        want += model.config.embed_dim**2 + model.config.num_patches * model.config.embed_dim
    assert counted.per_image_list == tuple(want.tolist())


def test_every_tail_costs_what_it_is(backend: str, device: str) -> None:
    model, images = build_case("mtvit", device=device), make_images(6, device=device)
    counted = count_macs(model, images)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
    method, dim = model.method, TINY["embed_dim"]
    for macs, tail, tokens in zip(
        counted.per_image_list, trace.extras["tail"].tolist(), trace.tokens_per_block[0].tolist(), strict=True
    ):
        kernel, _ = tail_geometry(TINY["img_size"], method.config.grids[tail])
        blocks = TINY["depth"] * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
        tail_macs = blocks + (tokens - 1) * 3 * kernel**2 * dim + TINY["num_classes"] * dim
        assert macs == tail_macs + method.predictor.macs()


@pytest.mark.parametrize("name", ALL)
def test_parts_add_up(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(4, device=device)
    counted = count_macs(model, images)
    assert isinstance(counted, MacCount)
    assert counted.per_image == pytest.approx(sum(counted.per_image_list) / 4, rel=1e-12)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
    tokens, dim = trace.tokens_per_block.double(), TINY["embed_dim"]
    per_block = (12 * tokens * dim**2 + 2 * tokens**2 * dim).mean(dim=1)
    assert counted.per_block == pytest.approx(per_block.tolist(), rel=1e-12)
    # the rest: embedding, classifier, and the few products of a method
    assert sum(counted.per_block) < counted.per_image


def test_an_image_is_counted_as_if_alone() -> None:
    model, images = build_case("avit"), make_images(4)
    together = count_macs(model, images).per_image_list
    assert together == tuple(count_macs(model, image[None]).per_image for image in images)
    assert len(set(together)) == 4


@pytest.mark.parametrize("name", ["vit", "avit", "mtvit"])
def test_counting_leaves_the_model_alone(name: str) -> None:
    model, images = build_case(name), make_images(2)
    before, kept = model(images).detach(), images.clone()
    count_macs(model, images)
    assert not model.training
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(model(images), before)
    assert torch.equal(images, kept)


def test_bad_images() -> None:
    model = build("vit")
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        count_macs(model, make_images(0))
    with pytest.raises(ValueError, match="images must have shape"):
        count_macs(model, make_images(1, 32))


@pytest.mark.parametrize("live", [0, 3, 5])
def test_ragged_layers_cost_their_live_rows(live: int) -> None:
    register_flop_formulas()
    x, a, weight = torch.zeros(5, 6), torch.zeros(5, 8, requires_grad=True), torch.zeros(6, 8)
    cu_seqlens = torch.tensor([0, live], dtype=torch.int32)
    with FlopCounterMode(display=False) as forward:
        out = ops.ragged_linear(a, weight, None, cu_seqlens, activation="gelu")
        ops.ragged_linear_residual(x, None, a, weight, None, cu_seqlens)
        with torch.no_grad():
            ops.ragged_linear_residual_(x, None, a, weight, None, cu_seqlens)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    macs = live * 6 * 8
    assert forward.get_total_flops() == 2 * 3 * macs
    assert backward.get_total_flops() == 2 * 3 * macs  # gradients of a and weight, and the GELU's input again
