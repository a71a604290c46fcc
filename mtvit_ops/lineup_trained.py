"""Trained models of one folder, as ``compare`` sets them beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .lineup import BASELINE, METHODS, Lineup
from .nn import VisionTransformer, pack_weights
from .weights import LoadedViT, load_vit, read_info

_SUFFIX = ".safetensors"


def find_trained(folder: str | Path) -> dict[str, Path]:
    """The model files of a folder, by method.

    Args:
        folder: holds at most one file of ``save_model`` for each method, of any name; one of the dense ViT.

    Raises:
        ValueError: no such folder, two files of one method, or no dense model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"trained must be a folder with model files, got {str(folder)!r}")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        info = read_info(path)
        if info is None:
            continue
        method = str(info.model.get("name", "")).partition("_")[0]
        if method not in METHODS:
            raise ValueError(f"trained: {path} is for the model {info.model.get('name')!r}, which there is not")
        if method in found:
            raise ValueError(f"trained must hold one file a method, got {found[method].name} and {path.name}")
        found[method] = path
    if BASELINE not in found:
        raise ValueError(f"trained must hold a file of the dense ViT, got {', '.join(found) or 'no model file'}")
    return found


def build_trained(
    folder: str | Path,
    names: tuple[str, ...],
    overrides: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Lineup:
    """Load the dense ViT and the named methods, in evaluation mode, each with its own weights.

    Args:
        folder: as ``find_trained`` takes it.
        names: methods out of ``METHODS``; those that the folder does not have are left out, with a note.
        overrides: ``{"evovit.keep_ratios": 0.4}``: fields of one method's configuration.
        device, dtype: where and how the models run.

    Raises:
        ValueError, TypeError: files that do not fit together or cannot be read, an unknown override, a bad value.
    """
    files = find_trained(folder)
    chosen = [name for name in METHODS if name in files and (name in names or name == BASELINE)]
    options = _sort_overrides(chosen, overrides)
    loaded = {name: load_vit(files[name], **options[name]) for name in chosen}
    _check_alike(loaded, files)
    models: dict[str, VisionTransformer] = {}
    for name, (model, _) in loaded.items():
        models[name] = model.to(device=device, dtype=dtype)
        if device.type == "cpu":
            pack_weights(model)
    sizes, info = models[BASELINE].config, loaded[BASELINE].info
    setting = f"trained ViTs of width {sizes.embed_dim} and depth {sizes.depth}, {sizes.img_size} px, "
    notes = ["every model has weights of its own, trained for it."]
    absent = [name for name in names if name not in files]
    if absent:
        notes.append(f"not compared, for there is no file of theirs: {', '.join(absent)}.")
    if device.type == "cpu":
        notes.append("linear weights are packed for the CPU (mtvit_ops.pack_weights), the dense model's too.")
    texts = info.facts.get("class_names")
    shown = tuple(texts) if isinstance(texts, list) and len(texts) == len(info.classes) else info.classes
    return Lineup(models, False, tuple(notes), setting + f"{sizes.grid_size**2} patches", info.classes, shown)


def _check_alike(loaded: Mapping[str, LoadedViT], files: Mapping[str, Path]) -> None:
    dense = loaded[BASELINE]
    for name, (model, info) in loaded.items():
        same = (model.config.img_size, info.classes) == (dense.model.config.img_size, dense.info.classes)
        if not same:
            raise ValueError(f"trained: {files[name].name} has another image size or other classes than the dense ViT")


def _sort_overrides(chosen: list[str], overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides by method; the files say everything else."""
    options: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for key, value in overrides.items():
        name, dot, field = key.partition(".")
        if not dot or name not in options:
            raise ValueError(f"override {key!r} must name one of the trained models: {', '.join(chosen)}.FIELD=VALUE")
        options[name][field] = value
    return options
