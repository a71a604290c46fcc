"""Weights from files: timm's and DeiT's, and the authors' of A-ViT, Evo-ViT (flat and LeViT) and Life Regression."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .methods import AViT, MTViT
from .methods._evo_levit_layout import from_evo_levit
from .methods._tail_init import resize_pos_embed
from .nn import LeViT, VisionTransformer

_EVO_NAMES = (("qks.{}.qk", "qk"), ("vs.{}.v", "v"), ("norms.{}", "norm1"), ("projs.{}", "attn.proj"))
_PREDICTOR = "method.predictor."
_TAIL = ("projections.{}.weight", "projections.{}.bias", "pos_embeds.{}")
# Evo-ViT's classifiers on the class token, which a model for inference does not have
_TRAINING_HEADS = ("method.head_cls.", "method.norm_cls.", "method.head_cls_dist.")
_CLASSIFIERS = ("head.", "head_dist.", "method.head_cls.", "method.head_cls_dist.", "method.predictor.head_cls.")


class LoadReport(NamedTuple):
    """What ``load_checkpoint`` did."""

    layout: str  # "timm", "Evo-ViT", "Evo-LeViT" or "Life Regression"
    ignored: tuple[str, ...]  # keys of the file that inference has no use for
    untrained: tuple[str, ...]  # parameters of the method that the file does not have
    settings: dict[str, float]  # configuration read from the arguments or the file's name


def load_checkpoint(
    model: VisionTransformer | LeViT,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    gate_scale: float | None = None,
    gate_center: float | None = None,
    resize_positions: bool = False,
    reset_head: bool = False,
) -> LoadReport:
    """Load weights in place; the model is untouched unless everything fits.

    Reads state dicts in timm's layout (DeiT, A-ViT, ours), the authors' Evo-ViT layouts (``qks``, ``vs``, ``norms``,
    ``projs``; for LeViT ``blocks``, and the same as ``stage_blocks``) and the authors' Life Regression layout, from
    ``.safetensors`` or PyTorch files (bare, or under a ``"model"`` or ``"state_dict"`` entry; loaded with
    ``weights_only=True``). A method's own parameters may be missing from a file of the plain backbone: MT-ViT's cheaper
    tails are then derived from it, the others keep their values. Of an MT-ViT with other grids, the tails whose grids
    the model has too are taken, but not the predictor, which chose among others; nor is a predictor of another width,
    or with a classifier where the model's has none.

    Args:
        model: from ``create_model``.
        source: a file, or a state dict.
        gate_scale, gate_center: A-ViT's gate; None: the last two ``-`` fields of the file's name, as the authors name
            their files (``tiny-10-30.pth``), else what the model has.
        resize_positions: resize position tables of other grids instead of refusing them.
        reset_head: leave the file's classifier out: the model keeps its own, of any number of classes.

    Returns:
        LoadReport(layout, ignored, untrained, settings).

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: gates for a model that has none.
        ValueError: the file is not a checkpoint, or its keys or shapes do not fit: the first missing, unexpected and
            mis-shaped keys are named.
    """
    if not isinstance(model.method, AViT) and (gate_scale is not None or gate_center is not None):
        raise TypeError(f"gate_scale and gate_center are for A-ViT, got a {type(model.method).__name__} model")
    state = _read(source)
    layout, state, ignored = _to_own_layout(state)
    own = model.state_dict()
    for name in [name for name in state if name.startswith(_TRAINING_HEADS) and name not in own]:
        del state[name]
        ignored += (name.removeprefix("method.") if layout.startswith("Evo") else name,)
    if isinstance(model.method, MTViT):
        state, others = _take_tails(state, own)
        ignored += others
    if reset_head:
        heads = {name: own[name] for name in own if name.startswith(_CLASSIFIERS)}
        ignored += tuple(name for name in heads if name in state)
        state.update(heads)
    for name in own:
        positions = state.get(name)
        if not (resize_positions and name.endswith("pos_embed") and positions is not None):
            continue
        if positions.dim() == 3 and positions.shape[1] > 1:
            patches = positions.shape[1] - 1
            if positions.shape[0] != 1 or round(patches**0.5) ** 2 != patches:
                raise ValueError(
                    f"{name} must have shape (1, 1 + grid * grid, D) to be resized, got {tuple(positions.shape)}"
                )
            state[name] = resize_pos_embed(positions, round((own[name].shape[1] - 1) ** 0.5))
    untrained = tuple(name for name in own if name.startswith("method.") and name not in state)
    _check_fit(own, state, untrained)
    settings = {} if not isinstance(model.method, AViT) else _gates(source, gate_scale, gate_center)
    # a gate that is none is refused before anything has changed
    config = dataclasses.replace(model.method.config, **settings) if settings else model.method.config
    model.load_state_dict({**own, **state})
    if untrained and isinstance(model.method, MTViT):
        model.method.initialise_tails(model, [name.removeprefix("method.") for name in untrained])
    model.method.config = config
    return LoadReport(layout, ignored, untrained, settings)


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        content: Any = source
        what = "source"
    else:
        path = Path(source)
        what = str(path)
        if not path.is_file():
            raise FileNotFoundError(f"source must be a file, there is none at {path}")
        content = _read_file(path)
    for entry in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{what} is not a checkpoint: it holds {type(content).__name__}, not a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{what} is not a checkpoint: its entry {name!r} is a {type(value).__name__}, not a tensor"
            )
        if value.is_complex() or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(
                f"{what} is not a checkpoint: its entry {name!r} must be a dense tensor of real numbers, got"
                f" {value.dtype}, {value.layout}, on {value.device}"
            )
    return dict(content)


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a checkpoint: {error}") from error
    try:
        # the authors' files keep their command line
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is no pickle fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint: {reason}") from error


def _to_own_layout(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The layout's name, the state under our names, and what was left out."""
    if any(name.startswith("qks.") for name in state):
        return "Evo-ViT", _from_evo_vit(state), ()
    if any(name.startswith("stage_blocks.") for name in state) or "poss" in state:
        return "Evo-LeViT", from_evo_levit(state), ()
    if any("patch_life_predictor" in name for name in state):
        return "Life Regression", *_from_life(state)
    # data-parallel training leaves its prefix in every name
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return "timm", dict(state), ()


def _from_evo_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, own in _EVO_NAMES:
            match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"\.(weight|bias)", name)
            if match is None:
                continue
            block, kind = match.groups()
            if own in ("qk", "v"):
                parts[f"{block}.{own}.{kind}"] = value
            else:
                out[f"blocks.{block}.{own}.{kind}"] = value
            break
        else:
            own_name = f"method.{name}"
            out[own_name if own_name.startswith(_TRAINING_HEADS) else name] = value
    for name, qk in parts.items():
        block, own, kind = name.split(".")
        v = parts.get(f"{block}.v.{kind}")
        if own == "qk" and v is not None and qk.dim() > 0 and qk.dim() == v.dim() and qk.shape[1:] == v.shape[1:]:
            out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat((qk, v))
    return out


def _from_life(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    out: dict[str, Tensor] = {}
    ignored: list[str] = []
    head = [int(found[1]) for name in state if (found := re.match(r"blocks\.head_blocks\.(\d+)\.", name))]
    first_tail = max(head, default=-1) + 1
    for name, value in state.items():
        if name.endswith("patch_life_predictor.W"):
            out["method.weight"] = value[0] if value.dim() == 3 and len(value) == 1 else value
        elif "plugin_norm_layer." in name:
            # never trained by the authors, so our scores are taken without it
            neutral = 1.0 if name.endswith("weight") else 0.0
            if not bool((value == neutral).all()):
                raise ValueError(f"{name} must be all {neutral:g}, as no optimiser of the authors moves it, got others")
            ignored.append(name)
        elif match := re.fullmatch(r"blocks\.(head|tail)_blocks\.(\d+)\.(.+)", name):
            block = int(match[2]) + (first_tail if match[1] == "tail" else 0)
            # the same tensors stand under model.blocks too, which win
            out.setdefault(f"blocks.{block}.{match[3]}", value)
        elif name.startswith("model."):
            out[name.removeprefix("model.")] = value
        else:
            out[name] = value
    return out, tuple(ignored)


def _take_tails(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state with an MT-ViT's tails where the model has those of their grids, and what was left out."""

    def shapes(tensors: dict[str, Tensor]) -> dict[int, tuple[torch.Size, ...]]:
        found = {}
        for index in range(len(tensors)):
            parts = [tensors.get(f"method.{name}".format(index)) for name in _TAIL]
            if any(part is None for part in parts):
                break
            found[index] = tuple(part.shape for part in parts if part is not None)
        return found

    theirs, ours = shapes(state), shapes(own)
    places = {index: place for place, shape in ours.items() for index, each in theirs.items() if each == shape}
    ends = [f"method.predictor.{name}.weight" for name in ("features.0", "head")]
    if theirs == ours and any(end in state and state[end].shape != own[end].shape for end in ends):  # of another width
        taken = {name: value for name, value in state.items() if not name.startswith(_PREDICTOR)}
        return taken, tuple(name for name in state if name not in taken)
    if theirs == ours or not places:  # the usual case; nothing in common, which is refused with the rest
        return state, ()
    prefixes = ("method.projections.", "method.pos_embeds.", _PREDICTOR)
    taken = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    for index, place in places.items():
        taken.update({f"method.{name}".format(place): state[f"method.{name}".format(index)] for name in _TAIL})
    kept = {f"method.{name}".format(index) for index in places for name in _TAIL}
    return taken, tuple(name for name in state if name.startswith(prefixes) and name not in kept)


def _check_fit(own: dict[str, Tensor], state: dict[str, Tensor], untrained: tuple[str, ...]) -> None:
    problems = []
    missing = [name for name in own if name not in state and name not in untrained]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing:
        problems.append(f"missing {missing[0]} (and {len(missing) - 1} more)")
    if unexpected:
        problems.append(f"unexpected {unexpected[0]} (and {len(unexpected) - 1} more)")
    if shapes:
        name = shapes[0]
        problems.append(
            f"mis-shaped {name}, expected {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
            f" (and {len(shapes) - 1} more)"
        )
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))


def _gates(source: Any, gate_scale: float | None, gate_center: float | None) -> dict[str, float]:
    named = {}
    if not isinstance(source, Mapping):
        match = re.search(r"-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)$", Path(source).stem)
        if match:
            named = {"gate_scale": float(match[1]), "gate_center": float(match[2])}
    given = {"gate_scale": gate_scale, "gate_center": gate_center}
    return named | {name: value for name, value in given.items() if value is not None}
