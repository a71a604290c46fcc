"""Knowledge distillation: targets that are, in part, what a trained model says of the same views."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..methods import MTViT
from ..weights import load_model
from .recipe import TeacherOptions


class Teacher:
    """A trained model that softens the targets of another one's training.

    Every method takes soft targets, so this is distillation for all of them: with teacher t, share s and label y the
    cross-entropy against ``(1 - s) y + s softmax(t / temperature)`` is, but for a constant, ``(1 - s)`` times the one
    against y plus ``s`` times the divergence of the model from the teacher.

    An MT-ViT says all it knows: its dearest tail's softmax, whatever its predictor would choose, and with
    ``class_head=True`` the mean of that and its predictor's, a small CNN's, whose mistakes are others.

    Args:
        path: a file of ``train`` or ``save_model``.
        options: share and temperature.
        classes: of the data, in order.
        img_size: of the views, pixels.
        device: where the targets are.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, one that was written otherwise, or a model of other
            classes or another image size.

    Source: Hinton et al., arXiv 1503.02531; for pruned vision transformers DynamicViT, arXiv 2106.02034.
    """

    def __init__(
        self, path: str | Path, options: TeacherOptions, classes: tuple[str, ...], img_size: int, device: torch.device
    ) -> None:
        model, info = load_model(path)
        if info.classes != classes:
            wanted, got = ", ".join(classes), ", ".join(info.classes)
            raise ValueError(f"teacher must know the data's classes {wanted}, got {got}")
        if model.config.img_size != img_size:
            raise ValueError(f"teacher must see {img_size} pixels, as the model does, got {model.config.img_size}")
        if isinstance(model.method, MTViT):
            model, _ = load_model(path, force_tail=len(model.method.config.grids) - 1)
        self._model = model.requires_grad_(False).to(device)
        self._options = options
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def soften(self, images: Tensor, targets: Tensor) -> Tensor:
        """Soft targets (B, C), float32, of images (B, ...) and their classes (B,) int64 or soft targets (B, C).

        Rows sum to 1 where those of ``targets`` do. No gradient, no draw, no device synchronisation.
        """
        with torch.no_grad():
            said = self._softmax(self._model(images))
            method = self._model.method
            if isinstance(method, MTViT):
                _, logits = method.predictor.judge(method.predictor.look(images))
                said = said if logits is None else (said + self._softmax(logits)) / 2
            labels = targets if targets.is_floating_point() else F.one_hot(targets, said.shape[1])
            return torch.lerp(labels.float(), said, self._options.share)

    def _softmax(self, logits: Tensor) -> Tensor:
        return (logits.float() / self._options.temperature).softmax(dim=1)


def check_teacher(teacher: str | Path | None, options: TeacherOptions) -> None:
    """Refuse a recipe that wants a teacher without one, and the other way round."""
    if options.share > 0 and teacher is None:
        raise ValueError(f"teacher must be a file of weights: the recipe's teacher.share is {options.share}, got None")
    if options.share == 0 and teacher is not None:
        raise ValueError(f"teacher must be None: the recipe's teacher.share is 0, got {teacher}")
