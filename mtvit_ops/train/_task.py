"""The classification loss that every method starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import FLOATS, check_choice, check_real, check_tensor


def task_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy, the mean over images.

    Args:
        logits: (B, C), any float dtype, B >= 1.
        target: class indices, (B,), int64, each in [0, C); or one weight a class, (B, C), any float dtype (mixup).
        label_smoothing: share of every target that is spread evenly over all classes, in [0, 1].
        reduction: ``"mean"``, or ``"none"``: each image's own.

    Returns:
        A scalar, or (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, no images; on the CPU also an index outside
            [0, C). On a GPU such an index is PyTorch's to refuse.

    Gradients flow to logits and soft targets. No device synchronisation.

    Equivalent PyTorch: ``F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)``.
    """
    check_tensor("logits", logits, ("B", "C"), FLOATS)
    check_target(target, logits.shape[0], logits.shape[1], logits)
    check_real("label_smoothing", label_smoothing, 0.0, 1.0)
    check_choice("reduction", reduction, ("mean", "none"))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if target.is_floating_point():
        target = target.to(wide.dtype)
    return F.cross_entropy(wide, target, label_smoothing=label_smoothing, reduction=reduction)


def check_target(target: Any, batch: int, classes: int, like: Tensor) -> None:
    """Refuse what ``task_loss`` cannot take as the target of ``batch`` images."""
    if batch < 1:
        raise ValueError("images must hold at least one image, for the loss is a mean over them, got 0")
    soft = isinstance(target, Tensor) and target.is_floating_point()
    check_tensor("target", target, (batch, classes) if soft else (batch,), FLOATS if soft else torch.int64, like)
    if soft or target.device.type != "cpu":
        return
    low, high = int(target.min()), int(target.max())
    # also the index that PyTorch leaves out of the mean without a word
    if low < 0 or high >= classes:
        raise ValueError(f"target must be in [0, {classes}), got {low if low < 0 else high}")
