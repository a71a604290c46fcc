"""Models by name."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from .checkpoints import load_checkpoint
from .methods import AViT, Dense, EvoLeViT, EvoViT, Life, MTViT
from .nn import LeViT, LeViTConfig, Method, VisionTransformer, ViTConfig

Model: TypeAlias = VisionTransformer | LeViT

_METHODS: dict[str, type[Method]] = {"vit": Dense, "avit": AViT, "evovit": EvoViT, "lifevit": Life, "mtvit": MTViT}
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_NAMES: dict[str, tuple[str, str, int]] = {
    f"{method}_{size}_patch16_224": (method, size, 224) for method in _METHODS for size in ("tiny", "small", "base")
} | {"vit_large_patch16_384": ("vit", "large", 384)}
_LEVIT_SIZES: dict[str, dict[str, Any]] = {
    "128s": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 6, 8), "depth": (2, 3, 4)},
    "128": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 8, 12), "depth": (4, 4, 4)},
    "192": {"embed_dim": (192, 288, 384), "key_dim": 32, "num_heads": (3, 5, 6), "depth": (4, 4, 4)},
    "256": {"embed_dim": (256, 384, 512), "key_dim": 32, "num_heads": (4, 6, 8), "depth": (4, 4, 4)},
    "384": {"embed_dim": (384, 512, 768), "key_dim": 32, "num_heads": (6, 9, 12), "depth": (4, 4, 4), "drop_path": 0.1},
}
_LEVIT_NAMES = {f"evolevit_{size}_{side}": (size, side) for size in _LEVIT_SIZES for side in (224, 384)}


def list_models() -> list[str]:
    """Names that ``create_model`` knows, sorted."""
    return sorted([*_NAMES, *_LEVIT_NAMES])


def create_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> Model:
    """Build a model, with random weights unless a checkpoint is given.

    Args:
        name: one of ``list_models()``.
        checkpoint: as ``load_checkpoint`` takes it.
        overrides: any field of ``ViTConfig`` (``nn.LeViTConfig`` for the names that begin with ``evolevit``) and of the
            method's configuration, by name: ``num_classes=10``,
            ``gate_center=75.0``, ``keep_ratios=0.7``, ``budgets=(140, 100, 72)``, ``force_tail=0`` ...

    Returns:
        The model in training mode, as every new module: call ``.eval()`` for inference.

    Raises:
        ValueError, TypeError: an unknown name or override (the message lists what there is), or a bad value.
    """
    if name in _LEVIT_NAMES:
        return _create_levit(name, checkpoint, overrides)
    return create_vit(name, checkpoint=checkpoint, **overrides)


def create_vit(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """``create_model`` of a flat ViT alone: what runs other methods, is calibrated and compared."""
    if name in _LEVIT_NAMES:
        raise ValueError(f"name must be a flat ViT's here, got {name!r}: a LeViT comes from create_model alone")
    if name not in _NAMES:
        close = difflib.get_close_matches(str(name), list_models(), n=3, cutoff=0.5)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise ValueError(f"name must be one of list_models(), got {name!r}{hint}")
    method, size, img_size = _NAMES[name]
    sizes, options = _split(method, overrides, ViTConfig, _METHODS[method])
    config = ViTConfig(**({"img_size": img_size} | _SIZES[size] | sizes))
    if method == "mtvit" and "grids" not in options:
        options["grids"] = _default_grids(config.grid_size)
    model = VisionTransformer(config, create_method(method, **options))
    if checkpoint is not None:
        # gates that were asked for win over those in a file's name
        gates = {name: options[name] for name in ("gate_scale", "gate_center") if method == "avit" and name in options}
        load_checkpoint(model, checkpoint, **gates)
    return model


def create_method(name: str, **options: Any) -> Method:
    """A method by the first part of a model's name (``"avit"`` ...), to run shared weights with.

    Args:
        name: ``"vit"``, ``"avit"``, ``"evovit"``, ``"lifevit"`` or ``"mtvit"``.
        options: fields of its configuration.

    Raises:
        ValueError, TypeError: an unknown name or option, or a bad value.
    """
    if name not in _METHODS:
        raise ValueError(f"name must be one of {', '.join(_METHODS)}, got {name!r}")
    sizes, options = _split(name, options, ViTConfig, _METHODS[name])
    if sizes:
        raise TypeError(f"{name} has no option {next(iter(sizes))!r}: it belongs to the backbone")
    method = _METHODS[name]
    return method(method.config_class(**options))


def _create_levit(
    name: str, checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None, overrides: dict[str, Any]
) -> LeViT:
    size, img_size = _LEVIT_NAMES[name]
    sizes, options = _split("evolevit", overrides, LeViTConfig, EvoLeViT)
    config = LeViTConfig(**({"img_size": img_size} | _LEVIT_SIZES[size] | sizes))
    model = LeViT(config, EvoLeViT(EvoLeViT.config_class(**options)))
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _split(
    method: str, overrides: dict[str, Any], sizes: type, method_class: type[Method] | type[EvoLeViT]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the backbone and of the method."""
    backbone = {field.name for field in dataclasses.fields(sizes)}
    own = {field.name for field in dataclasses.fields(method_class.config_class)}
    for name in overrides:
        if name not in backbone | own:
            raise TypeError(
                f"{method} has no option {name!r}; the backbone's are {', '.join(sorted(backbone))};"
                f" the method's are {', '.join(sorted(own))}"
            )
    return (
        {name: value for name, value in overrides.items() if name in backbone},
        {name: value for name, value in overrides.items() if name in own},
    )


def _default_grids(grid_size: int) -> tuple[int, ...]:
    """Half of the backbone's grid, seven tenths of it, and itself: 7, 10, 14 at 14."""
    return tuple(sorted({max(1, grid_size // 2), max(1, round(grid_size * 10 / 14)), grid_size}))
