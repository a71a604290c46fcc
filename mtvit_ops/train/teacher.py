"""Knowledge distillation: targets that are, in part, what a trained model says of the same views, or its answers."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._timm import import_timm
from ..methods import MTViT
from ..photos import MEAN, STD
from ..weights import load_model
from .recipe import TeacherOptions


class Teacher:
    """A trained model that softens the targets of another one's training, or answers beside them.

    Every method takes soft targets, so this is distillation for all of them: with teacher t, share s and label y the
    cross-entropy against ``(1 - s) y + s softmax(t / temperature)`` is, but for a constant, ``(1 - s)`` times the one
    against y plus ``s`` times the divergence of the model from the teacher. Evo-ViT on LeViT has classifiers of their
    own for the class that the teacher would say.

    An MT-ViT says all it knows: its dearest tail's softmax, whatever its predictor would choose, and with
    ``class_head=True`` the mean of that and its predictor's, a small CNN's, whose mistakes are others.

    Args:
        path: a file of ``train`` or ``save_model``; with ``options.model`` one that timm's ``create_model`` takes, in
            whose outputs the classes stand in the data's order (sorted by the names of their folders).
        options: share and temperature, or answers; timm's name of the architecture, if it is none of this package.
        classes: of the data, in order.
        img_size: of the views, pixels.
        device: where the targets are.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, one that was written otherwise, an unknown architecture,
            or a model of other classes or another image size.
        ImportError: timm is asked for and not installed.

    Source: Hinton et al., arXiv 1503.02531; for pruned vision transformers DynamicViT, arXiv 2106.02034; answers:
        DeiT, arXiv 2012.12877.
    """

    def __init__(
        self, path: str | Path, options: TeacherOptions, classes: tuple[str, ...], img_size: int, device: torch.device
    ) -> None:
        self._options = options
        make = _make_timm if options.model else _make_own
        self._probabilities = make(Path(path), options, classes, img_size, device)
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def soften(self, images: Tensor, targets: Tensor) -> Tensor:
        """Soft targets (B, C), float32, of images (B, ...) and their classes (B,) int64 or soft targets (B, C).

        Rows sum to 1 where those of ``targets`` do. No gradient, no draw, no device synchronisation.
        """
        with torch.no_grad():
            said = self._probabilities(images)
            labels = targets if targets.is_floating_point() else F.one_hot(targets, said.shape[1])
            return torch.lerp(labels.float(), said, self._options.share)

    def answers(self, images: Tensor) -> Tensor:
        """The likeliest class of each image, (B,) int64. No gradient, no draw, no device synchronisation."""
        with torch.no_grad():
            return self._probabilities(images).argmax(dim=1)


def check_teacher(teacher: str | Path | None, options: TeacherOptions) -> None:
    """Refuse a recipe that wants a teacher without one, and the other way round."""
    said = "[teacher] asks for answers" if options.answers else f"teacher.share is {options.share}"
    if options.wanted and teacher is None:
        raise ValueError(f"teacher must be a file of weights: the recipe's {said}, got None")
    if not options.wanted and teacher is not None:
        raise ValueError(f"teacher must be None: the recipe's {said}, got {teacher}")


Probabilities = Callable[[Tensor], Tensor]  # of images, (B, C), float32


def _make_own(
    path: Path, options: TeacherOptions, classes: tuple[str, ...], img_size: int, device: torch.device
) -> Probabilities:
    model, info = load_model(path)
    if info.classes != classes:
        wanted, got = ", ".join(classes), ", ".join(info.classes)
        raise ValueError(f"teacher must know the data's classes {wanted}, got {got}")
    if model.config.img_size != img_size:
        raise ValueError(f"teacher must see {img_size} pixels, as the model does, got {model.config.img_size}")
    if isinstance(model.method, MTViT):
        model, _ = load_model(path, force_tail=len(model.method.config.grids) - 1)
    model.requires_grad_(False).to(device)

    def probabilities(images: Tensor) -> Tensor:
        said = _softmax(model(images), options)
        method = model.method
        if isinstance(method, MTViT):
            _, logits = method.predictor.judge(method.predictor.look(images))
            said = said if logits is None else (said + _softmax(logits, options)) / 2
        return said

    return probabilities


def _make_timm(
    path: Path, options: TeacherOptions, classes: tuple[str, ...], img_size: int, device: torch.device
) -> Probabilities:
    timm: Any = import_timm()
    if not timm.is_model(options.model):
        close = difflib.get_close_matches(options.model, timm.list_models(), n=3)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise ValueError(f"teacher.model must be an architecture of timm's, got {options.model!r}{hint}")
    if not path.is_file():
        raise FileNotFoundError(f"teacher must be a file of weights, there is none at {path}")
    model: nn.Module = timm.create_model(options.model, num_classes=len(classes))
    try:
        timm.models.load_checkpoint(model, str(path))
    except Exception as error:  # whatever a reader of files raises
        raise ValueError(f"teacher must be weights of {options.model} for {len(classes)} classes: {error}") from error
    model.eval().requires_grad_(False).to(device)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (config.get("mean", MEAN), config.get("std", STD))
    )
    own_mean, own_std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    scale, shift = own_std / std, (own_mean - mean) / std  # from our views' normalisation to the one it learned with

    def probabilities(images: Tensor) -> Tensor:
        return _softmax(model(images * scale + shift), options)

    try:
        with torch.no_grad():
            probabilities(torch.zeros(1, 3, img_size, img_size, device=device))
    except Exception as error:  # whatever the architecture raises
        raise ValueError(f"teacher must see {img_size} pixels, as the model does: {error}") from error
    return probabilities


def _softmax(logits: Tensor, options: TeacherOptions) -> Tensor:
    return (logits.float() / options.temperature).softmax(dim=1)
