"""Training of the dense ViT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_real
from ..nn import VisionTransformer
from ._task import task_loss


@dataclass(frozen=True)
class DenseLoss:
    """
    Attributes:
        label_smoothing: as ``task_loss`` takes it, in [0, 1].
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)


def loss(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: DenseLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and nothing else; the terms are ``task``. Arguments and promises as of ``compute_loss``."""
    task = task_loss(model(images), target, weights.label_smoothing)
    return task, {"task": task}
