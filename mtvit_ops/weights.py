"""Trained models as single files: weights, the model they belong to, and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice, check_real
from .checkpoints import load_checkpoint
from .files import write_atomically
from .models import Model, create_model
from .nn import VisionTransformer

_ENTRY = "mtvit_ops"  # of the file's metadata


class ModelInfo(NamedTuple):
    """What a file says of its weights."""

    model: dict[str, Any]  # ``name`` and overrides, as ``create_model`` takes them
    classes: tuple[str, ...]  # the folder of each output, in order; empty: unknown
    crop_pct: float  # side of the centre crop, of the shorter side
    facts: dict[str, Any]  # whatever else the writer noted: recipe, step, top-1 ...
    interpolation: str = "bicubic"  # or "bilinear": of the image, before the crop; files from before have none


class LoadedModel(NamedTuple):
    """A model and what its file says of it."""

    model: Model
    info: ModelInfo


class LoadedViT(NamedTuple):
    """A flat ViT and what its file says of it."""

    model: VisionTransformer
    info: ModelInfo


def save_model(path: Path, weights: Mapping[str, Tensor], info: ModelInfo, *, dtype: torch.dtype | None = None) -> None:
    """Write weights and what they are as one safetensors file, atomically.

    Args:
        path: the file; its folder is there.
        weights: a state dict of the model that ``info`` names.
        info: goes into the file's metadata as JSON.
        dtype: of floating-point weights in the file; None: as they are.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; what was there is untouched.
    """
    safetensors = _safetensors()
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in weights.items()
    }
    # one entry and no more: several would stand in another order in every file
    content = safetensors.torch.save(tensors, metadata={_ENTRY: json.dumps(info._asdict())})
    write_atomically(path, lambda file: file.write(content))


def read_info(path: str | Path) -> ModelInfo | None:
    """What a file says of its weights; None: it was not written by ``save_model``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no safetensors file.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, there is none at {path}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_ENTRY)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if text is None:
        return None
    try:
        content = json.loads(text)
        info = ModelInfo(**{**content, "classes": tuple(content["classes"])})
        _check_info(info, content["classes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} says nothing readable of its model: {error}") from error
    return info


def load_model(path: str | Path, **overrides: Any) -> LoadedModel:
    """Build the model that a file of ``save_model`` holds, in evaluation mode and float32.

    Args:
        path: the file.
        overrides: as of ``create_model``; they win over the file's.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, one that was written otherwise, or a bad override.
    """
    info = read_info(path)
    if info is None:
        raise ValueError(f"{path} does not say which model it is for: use create_model(name, checkpoint=...)")
    options = {**info.model, **overrides}
    model = create_model(options.pop("name"), **options)
    # not by the file: what its name seems to say of gates must not win over what the file says
    load_checkpoint(model, _safetensors().torch.load_file(path))
    return LoadedModel(model.eval(), info)


def load_vit(path: str | Path, **overrides: Any) -> LoadedViT:
    """``load_model`` of a flat ViT alone; errors as of it, and a ValueError for a LeViT's file."""
    model, info = load_model(path, **overrides)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{path} must be of a flat ViT here, got {info.model['name']}")
    return LoadedViT(model, info)


def _check_info(info: ModelInfo, classes: Any) -> None:
    if not isinstance(info.model, dict) or not isinstance(info.model.get("name"), str):
        raise ValueError(f"model must be a name and overrides, got {info.model!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes must be a list of names, got {classes!r}")
    if not isinstance(info.facts, dict):
        raise ValueError(f"facts must be a table, got {info.facts!r}")
    check_real("crop_pct", info.crop_pct, 0.0, 1.0, open_low=True)
    check_choice("interpolation", info.interpolation, ("bicubic", "bilinear"))


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('trained models are safetensors files: pip install "mtvit_ops[train]"') from error
    return safetensors
