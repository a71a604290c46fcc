"""MT-ViT's numeric invariants, items 1 to 4 and 9 to 11 of 1.8 of its specification."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model_cases import (
    TINY,
    OpCounter,
    assert_rounding,
    build,
    in_float64,
    make_images,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mtvit_ops import create_method, create_model
from mtvit_ops.methods import MTViTConfig
from mtvit_ops.methods.mt_vit import choose_tail, tail_geometry, tail_macs
from mtvit_ops.nn import VisionTransformer, ViTConfig
from mtvit_ops.testing import assert_close_to_float64, assert_equal

BATCH = 6
LENGTHS = (5, 10, 17)  # grids 2, 3 and 4


def adaptive(device: str = "cpu", **options: Any) -> VisionTransformer:
    return build("mtvit", device=device, **({"predictor_size": 32} | options))


def forced(model: VisionTransformer, tail: int) -> VisionTransformer:
    """The same weights, one tail for all."""
    return build("mtvit", predictor_size=32, force_tail=tail, device=str(model.cls_token.device))


# 1: kernel (and stride) and padding; 10 x 10 of 224 pixels is 23 with 3 around
GEOMETRY = {
    (224, 7): (32, 0),
    (224, 10): (23, 3),
    (224, 14): (16, 0),
    (384, 24): (16, 0),
    (64, 3): (22, 1),
    (64, 1): (64, 0),
    (5, 5): (1, 0),
}


@pytest.mark.parametrize(("side", "grid"), GEOMETRY)
def test_tail_geometry(side: int, grid: int) -> None:
    kernel, padding = tail_geometry(side, grid)
    assert (kernel, padding) == GEOMETRY[side, grid]
    image, weight = torch.zeros(1, 1, side, side), torch.zeros(1, 1, kernel, kernel)
    assert F.conv2d(image, weight, None, kernel, padding).shape[2:] == (grid, grid)


@pytest.mark.parametrize(("side", "grid"), [(4, 5), (1, 2)])
def test_a_grid_that_no_convolution_gives_is_refused(side: int, grid: int) -> None:
    # 1
    with pytest.raises(ValueError, match=f"grids must divide an image of {side} pixels into patches, got {grid}"):
        tail_geometry(side, grid)


def test_token_counts_at_224(backend: str, device: str) -> None:
    # 1
    for tail, tokens in enumerate((50, 101, 197)):
        model = build("mtvit", img_size=224, depth=2, force_tail=tail, device=device)
        with torch.inference_mode():
            _, trace = model(make_images(2, 224, device=device), return_trace=True)
        assert trace.tokens_per_block.tolist() == [[tokens] * 2] * 2


@pytest.mark.parametrize(
    ("size", "macs"),
    [("tiny", (0.3060, 0.6138, 1.2537)), ("small", (1.1429, 2.2999, 4.5989)), ("base", (4.4092, 8.8891, 17.5638))],
)
def test_costs_of_tails(size: str, macs: tuple[float, ...]) -> None:
    # 2; counted on real runs in test_flops.py
    dim, heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[size]
    config = ViTConfig(embed_dim=dim, num_heads=heads)
    have = [tail_macs(config, grid, tail_geometry(224, grid)[0]) / 1e9 for grid in (7, 10, 14)]
    assert have == pytest.approx(macs, rel=1e-3)


def test_relative_costs() -> None:
    # 2
    asking = create_model("mtvit_small_patch16_224").method
    free = dataclasses.replace(asking.config, force_tail=0)
    forced_tail = create_model("vit_small_patch16_224").with_method(type(asking)(free)).method
    assert forced_tail.relative_costs == pytest.approx((0.2485, 0.5001, 1.0), abs=5e-5)
    # asking costs every tail the predictor's operations
    extra = [have - bare for have, bare in zip(asking.relative_costs, forced_tail.relative_costs, strict=True)]
    assert extra == pytest.approx([asking.predictor.macs() / 4.5989e9] * 3, rel=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_the_predictors_operations_are_counted_right(width: int) -> None:
    predictor = adaptive(predictor_size=96, predictor_width=width).method.predictor
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predictor(make_images(1))
    assert counter.get_total_flops() == 2 * predictor.macs()


def test_extra_parameters() -> None:
    # 3; they do not depend on the depth
    method = create_model("mtvit_small_patch16_224", depth=1).method
    counts = {name: value.numel() for name, value in method.named_parameters() if not name.startswith("predictor")}
    assert counts == {
        "projections.0.weight": 1_180_032 - 384,
        "projections.0.bias": 384,
        "projections.1.weight": 609_792 - 384,
        "projections.1.bias": 384,
        "pos_embeds.0": 19_200,
        "pos_embeds.1": 38_784,
    }
    assert sum(counts.values()) == 1_847_808


def test_two_runs_are_bit_equal(backend: str, device: str) -> None:
    # 9: no noise
    model, images = adaptive(device), make_images(BATCH, device=device)
    with torch.inference_mode():
        (logits, trace), (again, trace_again) = (model(images, return_trace=True) for _ in range(2))
    assert_equal("logits", again, logits)
    assert_equal("predictor", trace_again.extras["predictor_logits"], trace.extras["predictor_logits"])


def test_each_image_alone_through_its_tail(backend: str, device: str) -> None:
    # 9 and 10: the packed batch against a dense pass over each image with the tail that it chose
    model, images = adaptive(device), make_images(BATCH, device=device)
    tails = [forced(model, tail) for tail in range(3)]
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        chosen = trace.extras["tail"].tolist()
        plain = torch.cat([tails[tail](image[None]) for tail, image in zip(chosen, images, strict=True)])
        exact = torch.cat(
            [in_float64(tails[tail])(image[None].double()) for tail, image in zip(chosen, images, strict=True)]
        )
    assert set(chosen) == {0, 1, 2}, "not every tail is chosen: this would show less"
    assert_close_to_float64("logits", logits, exact, plain)
    assert trace.tokens_per_block.tolist() == [[LENGTHS[tail] for tail in chosen]] * TINY["depth"]


@pytest.mark.parametrize("tail", [0, 1, 2])
def test_a_tail_is_a_dense_vit_on_its_own_patches(tail: int, backend: str, device: str) -> None:
    # the forward of 1.2, by hand
    model, images = adaptive(device, force_tail=tail), make_images(3, device=device)
    with torch.inference_mode():
        logits = model(images)
        if tail == 2:
            conv, table = model.patch_embed.proj, model.pos_embed
        else:
            conv, table = model.method.projections[tail], model.method.pos_embeds[tail]
        patches = conv(images).flatten(2).transpose(1, 2)
        x = torch.cat((model.cls_token.expand(3, -1, -1), patches), dim=1) + table
        for block in model.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, TINY["num_heads"], -1)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        by_hand = model.head(model.norm(x[:, 0]))
    assert_rounding(logits, by_hand)


@pytest.mark.parametrize("tail", [None, 0, 1, 2])
def test_one_pass_through_the_encoder(tail: int | None, backend: str, device: str) -> None:
    # 10: one attention a block, whatever the tails; without noise or groups
    model, images = adaptive(device, force_tail=tail), make_images(BATCH, device=device)
    with torch.inference_mode(), OpCounter() as counter:
        logits, trace = model(images, return_trace=True)
    assert counter.calls["mtvit_ops::varlen_attention"] == TINY["depth"]
    assert counter.calls["mtvit_ops::ragged_patch_embed"] == 1
    rows = int(trace.tokens_per_block[0].sum())
    assert {shape[0] for shape in counter.shapes["mtvit_ops::varlen_attention"]} == {rows}
    assert ("predictor_logits" in trace.extras) == (tail is None)
    if tail is not None:
        assert trace.extras["tail"].tolist() == [tail] * BATCH
    assert logits.shape == (BATCH, TINY["num_classes"])


def test_the_cost_weight(backend: str, device: str) -> None:
    # 11
    images = make_images(BATCH, device=device)
    tails, costs = {}, []
    weights = (-1e6, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 1e6)
    for weight in weights:
        model = adaptive(device, cost_weight=weight)
        with torch.inference_mode():
            _, trace = model(images, return_trace=True)
        tails[weight] = trace.extras["tail"]
        costs.append(sum(model.method.relative_costs[tail] for tail in tails[weight].tolist()))
    assert tails[1e6].tolist() == [0] * BATCH
    assert tails[-1e6].tolist() == [2] * BATCH
    assert_equal("no weight", tails[0.0], trace.extras["predictor_logits"].argmax(dim=1))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 3


# logits, weight, tail: equals go to the cheaper
TIES = [
    ((0.0, 0.0, 0.0), 0.0, 0),
    ((1.0, 2.0, 2.0), 0.0, 1),
    ((2.0, 1.0, 2.0), 0.0, 0),
    ((1.0, 2.0, 3.0), 0.0, 2),
    ((0.25, 0.5, 1.0), 1.0, 0),  # worth 0 each
    ((0.25, 0.75, 1.25), 1.0, 1),
    ((-1.0, -0.5, -0.5), 0.0, 1),
]


@pytest.mark.parametrize(("logits", "weight", "tail"), TIES)
def test_ties_go_to_the_cheaper_tail(logits: tuple[float, ...], weight: float, tail: int, device: str) -> None:
    values = torch.tensor([logits, logits], device=device)
    assert choose_tail(values, (0.25, 0.5, 1.0), weight).tolist() == [tail] * 2
    with torch.no_grad():  # a CPU then chooses in another way
        assert choose_tail(values, (0.25, 0.5, 1.0), weight).tolist() == [tail] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inference_chooses_as_training_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in (-1.0, 0.0, 0.3, 1 / 3, 7.0):
        logits = torch.randn(4096, 5, generator=generator).mul(4).round().div(4).to(dtype)  # with ties
        logits[::64, 2] = torch.inf
        logits[1::64, 3] = torch.nan
        costs = (0.1, 0.3, 0.35, 0.7, 1.0)
        with torch.no_grad():
            chosen = choose_tail(logits, costs, weight)
        assert_equal("tails", chosen, choose_tail(logits, costs, weight))
    with torch.no_grad():
        assert choose_tail(logits[:0], costs, 0.5).shape == (0,)


def test_before_training_every_image_takes_the_cheapest_tail() -> None:
    model = create_model("mtvit_tiny_patch16_224", **TINY, predictor_size=32).eval()
    with torch.inference_mode():
        _, trace = model(make_images(4), return_trace=True)
    assert bool((trace.extras["predictor_logits"] == 0).all())
    assert trace.extras["tail"].tolist() == [0] * 4


def test_the_predictor_sends_no_gradient_into_the_image() -> None:
    predictor, images = adaptive().method.predictor, make_images(2).requires_grad_()
    logits: Tensor = predictor(images)
    logits.sum().backward()
    assert images.grad is None
    assert predictor.head.weight.grad is not None


@pytest.mark.parametrize(
    ("side", "grids"), [(224, (7, 10, 14)), (384, (12, 17, 24)), (64, (2, 3, 4)), (16, (1,)), (32, (1, 2))]
)
def test_default_grids(side: int, grids: tuple[int, ...]) -> None:
    model = create_model("mtvit_tiny_patch16_224", **(TINY | {"img_size": side}))
    assert model.method.config.grids == grids


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"grids": 4}, TypeError, "grids must be a tuple, got int"),
        ({"grids": ()}, ValueError, "grids must rise and hold at least one tail"),
        ({"grids": (3, 2, 4)}, ValueError, "grids must rise"),
        ({"grids": (2, 2, 4)}, ValueError, "grids must rise"),
        ({"grids": (0, 4)}, ValueError, "grids must be >= 1, got 0"),
        ({"grids": (2.0, 4)}, TypeError, "grids must be an int, got float"),
        ({"grids": (2, 3)}, ValueError, "grids must end with the backbone's own grid 4, got 3"),
        ({"grids": (2, 3, 4), "force_tail": 3}, ValueError, r"force_tail must be in \[0, 2\], got 3"),
        ({"grids": (2, 3, 4), "force_tail": -1}, ValueError, "force_tail"),
        ({"grids": (2, 3, 4), "force_tail": 1.0}, TypeError, "force_tail"),
        ({"grids": (2, 3, 4), "predictor_size": 8}, ValueError, r"predictor_size must be in \[16, 4096\], got 8"),
        ({"grids": (2, 3, 4), "predictor_width": 0}, ValueError, "predictor_width must be >= 1, got 0"),
        ({"grids": (2, 3, 4), "class_head": "yes"}, ValueError, "class_head must be one of True, False, got 'yes'"),
        ({"grids": (2, 3, 4), "cost_weight": float("nan")}, ValueError, "cost_weight"),
    ],
)
def test_bad_configuration(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = build("vit")
    with pytest.raises(error, match=match):
        model.with_method(create_method("mtvit", **options))


def test_the_default_configuration_is_the_specifications() -> None:
    wanted = {"grids": (7, 10, 14), "predictor_size": 96, "force_tail": None, "cost_weight": 0.0}
    assert dataclasses.asdict(MTViTConfig()) == {**wanted, "predictor_width": 1, "class_head": False}
