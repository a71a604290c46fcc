"""Score a trained model's file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .._checks import check_choice, check_count
from ..progress import Progress
from ..weights import load_model
from .images import open_images
from .loading import eval_batches
from .processes import Processes
from .recipe import PRECISIONS
from .scoring import Score, score
from .views import options_of


def evaluate(
    weights: str | Path,
    data: str | Path,
    *,
    split: str = "val",
    batch_size: int = 64,
    workers: int = 1,
    precision: str = "float32",
    device: str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Score:
    """Score a file of ``train`` or ``save_model`` on the images of a folder or zip.

    Args:
        weights: the file; it names its model and classes.
        data: folder or zip; see ``train.images.open_images``.
        split: sub-folder with the class folders; empty: ``data`` itself.
        batch_size: images at once in a process, >= 1.
        workers: processes that decode, >= 0.
        precision: ``"float32"``, or ``"bfloat16"`` under autocast.
        device: ``"cpu"``, or None: what Accelerate finds.
        progress: what a person sees; None: nothing.
        overrides: fields of the model's configuration, as of ``create_model``.

    Returns:
        Score(top1, top5, loss, images, skipped) over the images of all processes.

    Raises:
        FileNotFoundError, ValueError, TypeError: weights, data or options that do not fit.

    Under ``torchrun`` each image is scored by exactly one process, and every process returns the whole score.
    """
    check_count("batch_size", batch_size, 1)
    check_count("workers", workers, 0)
    check_choice("precision", precision, PRECISIONS)
    model, info = load_model(weights, **overrides)
    processes = Processes(precision, device)
    progress = progress if progress is not None and processes.is_first else Progress()
    images = open_images(data, split, classes=info.classes or None, cache=False, progress=progress)
    outputs = model.config.num_classes
    if len(images.classes) != outputs:
        raise ValueError(f"{data} must have the model's {outputs} classes, got {len(images.classes)}")
    loading = eval_batches(
        images,
        model.config.img_size,
        options_of(info),
        batch_size,
        workers,
        processes.rank,
        processes.world_size,
    )
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    with closing(loading) as batches:
        found = score(model.to(processes.device), batches, autocast=dtype, distributed=processes.world_size > 1)
    for problem in images.problems:
        progress.say(f"not used: {problem.path} {problem.reason}")
    return found
