"""The package's surface is what we mean it to be."""

from __future__ import annotations

import inspect

import pytest

import mtvit_ops
import mtvit_ops.methods
import mtvit_ops.nn
import mtvit_ops.ops

SURFACE = {
    mtvit_ops: [
        "Calibration",
        "CapturedModel",
        "LoadReport",
        "MacCount",
        "Method",
        "RaggedTokens",
        "Trace",
        "ViTConfig",
        "VisionTransformer",
        "__version__",
        "available_backends",
        "build_info",
        "calibrate",
        "capture",
        "count_macs",
        "create_method",
        "create_model",
        "has_extension",
        "list_models",
        "load_checkpoint",
        "pack_weights",
        "unpack_weights",
        "use_backend",
    ],
    mtvit_ops.ops: [
        "HaltingState",
        "HaltingStep",
        "TokenSelection",
        "class_attention",
        "gather_layer_norm",
        "halting_step",
        "initial_halting_state",
        "ragged_linear",
        "ragged_linear_residual",
        "ragged_linear_residual_",
        "ragged_patch_embed",
        "scatter_residual",
        "scatter_residual_",
        "scatter_residual_layer_norm",
        "scatter_residual_layer_norm_",
        "slow_fast_merge",
        "slow_fast_update",
        "token_select",
        "varlen_attention",
    ],
    mtvit_ops.nn: [
        "Attention",
        "Block",
        "LeViT",
        "LeViTConfig",
        "Method",
        "Mlp",
        "PackedLinear",
        "PatchEmbed",
        "Trace",
        "ViTConfig",
        "VisionTransformer",
        "checkpointed_twin",
        "drop_path_twin",
        "fold_norms",
        "masked_twin",
        "pack_weights",
        "unpack_weights",
    ],
    mtvit_ops.methods: [
        "AViT",
        "AViTConfig",
        "Dense",
        "DenseConfig",
        "EvoLeViT",
        "EvoLeViTConfig",
        "EvoViT",
        "EvoViTConfig",
        "Life",
        "LifeConfig",
        "MTViT",
        "MTViTConfig",
    ],
}
NAMES = [(module, name) for module, names in SURFACE.items() for name in names]


@pytest.mark.parametrize("module", SURFACE, ids=lambda module: module.__name__)
def test_all_is_exactly(module: object) -> None:
    assert sorted(module.__all__) == sorted(SURFACE[module])
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_every_public_name_says_what_it_is(module: object, name: str) -> None:
    value = getattr(module, name)
    if name == "__version__":
        assert value.count(".") >= 2
        return
    # what a dataclass or a named tuple writes by itself is only its signature
    text = value.__dict__.get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or ""
    assert text.strip()
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize(
    "kind", [mtvit_ops.RaggedTokens, mtvit_ops.Trace, mtvit_ops.VisionTransformer], ids=lambda kind: kind.__name__
)
def test_every_public_method_says_what_it_does(kind: type) -> None:
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    methods = {
        name: value for name, value in own.items() if inspect.isfunction(value) or isinstance(value, classmethod)
    }
    assert methods
    for name, value in methods.items():
        assert (value.__doc__ or "").strip(), name
