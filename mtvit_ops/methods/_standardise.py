"""Scores of different images, made comparable."""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(scores: Tensor) -> Tensor:
    """Mean 0 and sample deviation 1 over each image, (B, N) to (B, N), float32 or float64.

    Equal scores give 0; the gradient is finite for them, too.
    """
    centred = scores - scores.mean(dim=1, keepdim=True)
    # the sample deviation, written out so that a single patch or an empty batch is no special case
    variance = centred.square().sum(dim=1, keepdim=True) / max(scores.shape[1] - 1, 1)
    spread = variance.clamp_min(torch.finfo(scores.dtype).tiny).sqrt()  # a root has no slope at 0
    return centred / (spread + 1e-8)
