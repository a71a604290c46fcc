"""Models by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model_cases import NUM_TOKENS, TINY

from mtvit_ops import ViTConfig, create_method, create_model, list_models
from mtvit_ops.methods import AViTConfig, DenseConfig, EvoViTConfig, LifeConfig, MTViTConfig

SIZES = ("base", "small", "tiny")
CONFIGS: dict[str, type] = {
    "avit": AViTConfig,
    "evovit": EvoViTConfig,
    "lifevit": LifeConfig,
    "mtvit": MTViTConfig,
    "vit": DenseConfig,
}


def test_names() -> None:
    names = [f"{method}_{size}_patch16_224" for method in CONFIGS for size in SIZES]
    levits = [f"evolevit_{size}_{side}" for size in ("128s", "128", "192", "256", "384") for side in (224, 384)]
    assert list_models() == sorted([*names, *levits, "vit_large_patch16_384"])


BACKBONE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 5,
    "num_heads": 3,
    "num_classes": 7,
    "in_chans": 1,
    "mlp_ratio": 2.0,
    "norm_eps": 1e-5,
}
# every field of every method, none at its default
OPTIONS: dict[str, dict[str, Any]] = {
    "avit": {"gate_scale": 5.0, "gate_center": 7.0, "eps": 0.02, "stop_with_class": True},
    "evovit": {
        "keep_ratios": 0.25,
        "tradeoffs": 0.75,
        "mode": "layer",
        "prune_cls": True,
        "pool": "class",
        "class_head": True,
    },
    "lifevit": {
        "keep_ratio": 0.6,
        "budgets": (15, 10, 5),
        "base_block": 2,
        "mode": "threshold",
        "temperature": 2.0,
    },
    "mtvit": {
        "grids": (1, 4),
        "predictor_size": 16,
        "force_tail": 0,
        "cost_weight": 0.5,
        "predictor_width": 2,
        "class_head": True,
    },
    "vit": {"pool": "mean"},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_can_be_overridden(method: str) -> None:
    assert set(BACKBONE) == {field.name for field in dataclasses.fields(ViTConfig)}
    assert set(OPTIONS[method]) == {field.name for field in dataclasses.fields(CONFIGS[method])}
    defaults = CONFIGS[method]()
    assert all(getattr(defaults, name) != value for name, value in OPTIONS[method].items())
    model = create_model(f"{method}_tiny_patch16_224", **BACKBONE, **OPTIONS[method])
    assert model.training
    assert dataclasses.asdict(model.config) == BACKBONE
    assert dataclasses.asdict(model.method.config) == OPTIONS[method]
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.blocks[0].mlp.fc1.out_features == 48
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-5


@pytest.mark.parametrize("method", CONFIGS)
def test_defaults(method: str) -> None:
    model = create_model(f"{method}_small_patch16_224", depth=6)
    assert model.config == ViTConfig(depth=6)
    assert model.method.config == CONFIGS[method]()


def test_lists_serve_as_tuples() -> None:
    model = create_model("lifevit_tiny_patch16_224", **TINY, base_block=3, budgets=[9, 5, 2])
    assert model.method.config.budgets == (9, 5, 2)
    ratios = [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert create_model("evovit_tiny_patch16_224", **TINY, keep_ratios=ratios).method.config.keep_ratios == tuple(
        ratios
    )


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        (
            "vit_tiny",
            {},
            ValueError,
            r"name must be one of list_models\(\), got 'vit_tiny'; close are .*vit_tiny_patch16_224",
        ),
        ("avit_smal_patch16_224", {}, ValueError, "close are .*avit_small_patch16_224"),
        ("resnet", {}, ValueError, r"got 'resnet'$"),
        (3, {}, ValueError, "got 3"),
        (
            "vit_tiny_patch16_224",
            {"gate_center": 3.0},
            TypeError,
            "vit has no option 'gate_center'; .*method's are pool",
        ),
        (
            "avit_tiny_patch16_224",
            {"gate_centre": 3.0},
            TypeError,
            "avit has no option 'gate_centre'; the backbone's are depth, .* are eps, gate_center, gate_scale",
        ),
        ("avit_tiny_patch16_224", {"keep_ratio": 0.5}, TypeError, "avit has no option 'keep_ratio'"),
        (
            "vit_tiny_patch16_224",
            {"embed_dim": 100},
            ValueError,
            "embed_dim must be a multiple of num_heads 3, got 100",
        ),
    ],
)
def test_bad_names_and_options(name: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("dense", {}, ValueError, "name must be one of vit, avit, evovit, lifevit, mtvit, got 'dense'"),
        ("avit", {"depth": 3}, TypeError, "avit has no option 'depth': it belongs to the backbone"),
        ("avit", {"budgets": 3}, TypeError, "avit has no option 'budgets'"),
    ],
)
def test_bad_methods(name: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        create_method(name, **options)


PARAMETERS = {"tiny": (192, 5_717_416), "small": (384, 22_050_664), "base": (768, 86_567_656)}


def count(name: str, **options: Any) -> int:
    with torch.device("meta"):  # shapes only
        return sum(value.numel() for value in create_model(name, **options).parameters())


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size: str) -> None:
    dim, dense = PARAMETERS[size]
    for method in ("vit", "avit", "evovit"):
        assert count(f"{method}_{size}_patch16_224") == dense
    # one matrix
    assert count(f"lifevit_{size}_patch16_224") == dense + dim**2


def test_parameter_counts_at_384() -> None:
    assert count("evovit_small_patch16_224", img_size=384) == 22_196_584
    assert count("evovit_base_patch16_224", img_size=384) == 86_859_496
    # timm's vit_large_patch16_384
    assert count("vit_large_patch16_384") == 304_715_752


def test_parameter_count_of_mt_vit() -> None:
    with torch.device("meta"):
        model = create_model("mtvit_small_patch16_224")
    own = {name: value.numel() for name, value in model.named_parameters()}
    predictor = sum(value for name, value in own.items() if ".predictor." in name)
    assert sum(own.values()) - predictor == PARAMETERS["small"][1] + 1_847_808
    assert predictor < 20_000


def test_tokens_of_the_tiny_sizes() -> None:
    config = create_model("vit_tiny_patch16_224", **TINY).config
    assert (config.grid_size, 1 + config.num_patches) == (4, NUM_TOKENS)
