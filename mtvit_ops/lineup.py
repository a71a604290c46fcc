"""The dense ViT and the methods over the same weights, as ``compare`` sets them beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .checkpoints import load_checkpoint
from .methods import MTViT
from .models import _METHODS, _default_grids, create_method, create_vit
from .nn import VisionTransformer, ViTConfig, pack_weights

BASELINE = "vit"
METHODS = tuple(_METHODS)  # the baseline first
TITLES = {
    "vit": "ViT (dense)",
    "avit": "A-ViT",
    "evovit": "Evo-ViT",
    "lifevit": "Life Regression",
    "mtvit": "MT-ViT",
}


class Lineup(NamedTuple):
    """Models to compare, the baseline first, and what a reader must know about their weights."""

    models: dict[str, VisionTransformer]
    untrained: bool  # whether every model has random weights
    notes: tuple[str, ...]
    setting: str  # what they are, in a few words
    classes: tuple[str, ...] = ()  # the folder of each output, where the weights say so
    class_names: tuple[str, ...] = ()  # what to call each output


def build_lineup(
    names: tuple[str, ...],
    size: str,
    checkpoints: Mapping[str, str],
    overrides: Mapping[str, Any],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Lineup:
    """Build the dense ViT and the named methods, in evaluation mode.

    Args:
        names: methods out of ``METHODS``; the baseline is always there.
        size: ``"tiny"``, ``"small"`` or ``"base"``.
        checkpoints: files by the method they are for; ``"all"``: for the shared weights of those that have no file of
            their own.
        overrides: fields of the backbone, or of the methods: each method takes those it has.
        seed: of random weights; PyTorch's global generator is left as it was.
        device, dtype: where and how the models run.

    Raises:
        ValueError, TypeError: an unknown override, a bad value, a checkpoint that is none or does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    chosen = (BASELINE, *(name for name in METHODS if name in names and name != BASELINE))
    backbone, options = _sort_overrides(chosen, overrides)
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = create_vit(f"vit_{size}_patch16_224", **backbone, **options[BASELINE])
        shared = checkpoints.get("all")
        if shared is not None:
            _load(dense, "all", shared, {})
        models: dict[str, VisionTransformer] = {}
        for name in chosen:
            # the same weights whichever other methods there are
            torch.manual_seed(seed + METHODS.index(name))
            file = checkpoints.get(name)
            if name == "mtvit":
                options[name].setdefault("grids", _default_grids(dense.config.grid_size))
            if file is not None:
                model = create_vit(f"{name}_{size}_patch16_224", **backbone, **options[name])
                own_untrained = _load(model, name, file, options[name])
            else:
                model = dense if name == BASELINE else dense.with_method(create_method(name, **options[name]))
                own_untrained = tuple(key for key in model.state_dict() if key.startswith("method."))
            if isinstance(model.method, MTViT) and "method.predictor.head.weight" in own_untrained:
                nn.init.normal_(model.method.predictor.head.weight)
                notes.append(
                    f"mtvit: the predictor is untrained and starts undecided; seeded random weights in its last layer"
                    f" (seed {seed}) make it choose, so the choice of grids means nothing."
                )
            if (file is not None or shared is not None) and own_untrained:
                notes.append(f"{name}: {_several(own_untrained)} not in the checkpoint and untrained.")
            models[name] = model.to(device=device, dtype=dtype).eval()
            if device.type == "cpu":
                pack_weights(model)
    loaded = [name for name in chosen if name in checkpoints]
    untrained = shared is None and not loaded
    if untrained:
        notes.insert(0, "untrained weights (no --checkpoint): timings are real, choices are not.")
    elif shared is None and len(loaded) < len(chosen):
        rest = ", ".join(name for name in chosen if name not in loaded)
        notes.insert(
            0, f"untrained weights, since --checkpoint names none for them: {rest}; their choices mean nothing."
        )
    if device.type == "cpu":
        notes.append("linear weights are packed for the CPU (mtvit_ops.pack_weights), the dense model's too.")
    if shared is not None and len(chosen) > 1:
        notes.insert(0, "methods run on shared weights (--checkpoint all=...) that were not trained with them.")
    changes = "".join(f" {key}={value}" for key, value in overrides.items())
    return Lineup(models, untrained, tuple(notes), f"ViT-{size}{changes}")


def _sort_overrides(
    chosen: tuple[str, ...], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Overrides of the backbone, and of each method."""
    backbone_fields = {field.name for field in dataclasses.fields(ViTConfig)}
    fields = {name: {field.name for field in dataclasses.fields(_METHODS[name].config_class)} for name in chosen}
    everything = backbone_fields.union(*fields.values())
    of_one = {key: tuple(key.split(".", 1)) for key in overrides if "." in key}  # evovit.mode: for that method alone
    for key in overrides:
        name, field = of_one.get(key, (None, key))
        if field not in (everything if name is None else fields.get(name, ())):
            raise ValueError(
                f"override {key!r} is no field of the models compared; there are {', '.join(sorted(everything))}"
            )
    backbone = {key: value for key, value in overrides.items() if key in backbone_fields}
    options = {name: {key: value for key, value in overrides.items() if key in fields[name]} for name in chosen}
    for key, (name, field) in of_one.items():
        options[name][field] = overrides[key]
    return backbone, options


def _load(model: VisionTransformer, name: str, file: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Load a file; the method's parameters that it did not have. Gates among the options win over the file's name."""
    gates = {gate: options[gate] for gate in ("gate_scale", "gate_center") if name == "avit" and gate in options}
    try:
        return load_checkpoint(model, file, **gates).untrained
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ValueError(f"checkpoint {name}={file}: {error}") from error


def _several(names: tuple[str, ...]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
