"""Models by name."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoints import load_checkpoint
from .methods import AViT, Dense, EvoViT, Life, MTViT
from .nn import Method, VisionTransformer, ViTConfig

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


def list_models() -> list[str]:
    """Names that ``create_model`` knows, sorted."""
    return sorted(_NAMES)


def create_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Build a model, with random weights unless a checkpoint is given.

    Args:
        name: one of ``list_models()``.
        checkpoint: as ``load_checkpoint`` takes it.
        overrides: any field of ``ViTConfig`` and of the method's configuration, by name: ``num_classes=10``,
            ``gate_center=75.0``, ``keep_ratios=0.7``, ``budgets=(140, 100, 72)``, ``force_tail=0`` ...

    Returns:
        The model in training mode, as every new module: call ``.eval()`` for inference.

    Raises:
        ValueError, TypeError: an unknown name or override (the message lists what there is), or a bad value.
    """
    if name not in _NAMES:
        close = difflib.get_close_matches(str(name), _NAMES, n=3, cutoff=0.5)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise ValueError(f"name must be one of list_models(), got {name!r}{hint}")
    method, size, img_size = _NAMES[name]
    sizes, options = _split(method, overrides)
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
    sizes, options = _split(name, options)
    if sizes:
        raise TypeError(f"{name} has no option {next(iter(sizes))!r}: it belongs to the backbone")
    method = _METHODS[name]
    return method(method.config_class(**options))


def _split(method: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the backbone and of the method."""
    backbone = {field.name for field in dataclasses.fields(ViTConfig)}
    own = {field.name for field in dataclasses.fields(_METHODS[method].config_class)}
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
