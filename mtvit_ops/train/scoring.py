"""How right a model is, each image counted once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import Model


class Score(NamedTuple):
    """Over all images that could be read."""

    top1: float  # share of right answers
    top5: float  # share of images whose class is among the five best (or all, if there are fewer)
    loss: float  # mean cross-entropy
    images: int
    skipped: int  # images that could not be read


@torch.no_grad()
def score(
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: torch.dtype | None = None,
    distributed: bool = False,
) -> Score:
    """Evaluate a model, in evaluation mode; its own mode is restored.

    Args:
        model: any model of this package.
        batches: (images, targets): (B, in_chans, img_size, img_size) float32 and (B,) int64, on any device, of this
            process alone; a target of -1 says that the image could not be read. Batches may differ in size.
        autocast: run under autocast in this dtype; None: in the weights' own.
        distributed: add up what all processes found. Each must have images of its own; any may have none.

    Raises:
        ValueError: no image could be read.

    Ties in the logits go to the lower class. Sums are float64; the device is waited for at the end only.
    """
    place = model.cls_token
    sums = torch.zeros(5, dtype=torch.float64, device=place.device)
    was_training = model.training
    model.eval()
    try:
        for images, targets in batches:
            images, targets = images.to(place, non_blocking=True), targets.to(place.device, non_blocking=True)
            with torch.autocast(place.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                logits = model(images)
            sums += _count(logits.double(), targets)
    finally:
        model.train(was_training)
    if distributed:
        torch.distributed.all_reduce(sums)
    right, among, loss, images_read, skipped = sums.tolist()
    if not images_read:
        raise ValueError(f"no image could be read, {skipped:.0f} were tried")
    return Score(right / images_read, among / images_read, loss / images_read, int(images_read), int(skipped))


def _count(logits: Tensor, targets: Tensor) -> Tensor:
    """(right, among the five best, summed loss, read, not read) of a batch."""
    read = targets >= 0
    known = targets.clamp_min(0)
    best = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
    hits = (best == known[:, None]) & read[:, None]
    losses = F.cross_entropy(logits, known, reduction="none").where(read, 0.0)
    counts = (hits[:, 0].sum(), hits.any(dim=1).sum(), losses.sum(), read.sum(), (~read).sum())
    return torch.stack([count.double() for count in counts])
