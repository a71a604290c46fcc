"""Augmentation on the training's device, for machines whose CPU would starve it; kornia does the work."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from ..photos import MEAN, STD
from .views import ViewOptions


def worker_options(options: ViewOptions) -> ViewOptions:
    """What is left for the workers: crop, mirror image, nothing else."""
    return dataclasses.replace(options, color_jitter=None, auto_augment=None, reprob=0.0)


class DeviceViews:
    """Colour jitter, RandAugment and random erasing of a whole batch.

    Args:
        options: of the recipe. ``auto_augment`` must be of the form ``"rand-m9-n2"``: kornia's RandAugment with this
            magnitude (of 30) and number of operations, the same operations for a whole batch with strengths and signs
            of its own for each image; spread and order (``mstd``, ``inc``) have no counterpart and are refused.

    Raises:
        ImportError: kornia is not installed.
        ValueError: a policy without a counterpart.

    Draws come from PyTorch's global generator of the CPU, so a step's seed fixes them. Erased rectangles take the mean
    colour, where timm puts noise.
    """

    def __init__(self, options: ViewOptions) -> None:
        try:
            import kornia.augmentation as kornia
            from kornia.augmentation.auto import RandAugment
        except ImportError as error:
            raise ImportError('augmentation on the device needs kornia: pip install "mtvit_ops[kornia]"') from error
        colours: list[Any] = []
        if options.color_jitter:
            strength = options.color_jitter
            colours.append(kornia.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        if options.auto_augment is not None:
            magnitude, operations = _policy(options.auto_augment)
            colours.append(RandAugment(operations, magnitude))
        self._colours = kornia.AugmentationSequential(*colours, data_keys=["input"]) if colours else None
        self._erase = kornia.RandomErasing(p=options.reprob) if options.reprob else None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) to normalised images, on their device, in float32."""
        mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
        std = torch.tensor(STD, device=pixels.device)[:, None, None]
        with torch.no_grad():
            if self._colours is not None:
                pixels = (self._colours((pixels * std + mean).clamp(0, 1)) - mean) / std
            return pixels if self._erase is None else self._erase(pixels)


def _policy(text: str) -> tuple[int, int]:
    """Magnitude and number of operations."""
    found = re.fullmatch(r"rand-m(\d+)(?:-n(\d+))?", text)
    if found is None or not 0 < int(found[1]) < 30:
        raise ValueError(
            f"auto_augment must be 'rand-mM' or 'rand-mM-nN' with M in [1, 29] for augmentation on the device, got"
            f" {text!r}"
        )
    return int(found[1]), int(found[2] or 2)
