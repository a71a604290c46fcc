"""Batches of pixels and targets, prepared by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .device_views import worker_options
from .images import ImageSet
from .order import TrainOrder
from .recipe import Recipe
from .views import EvalViews, TrainViews, ViewOptions, eval_view, train_view

# whose workers end when it is closed, and before that with nothing but SIGKILL
Batches = Generator[tuple[Tensor, Tensor], None, None]


def train_batches(
    images: ImageSet, recipe: Recipe, img_size: int, order: TrainOrder, epoch: int, first_step: int
) -> Batches:
    """This process's batches (pixels, targets) of an epoch, from a step on; whoever leaves early closes them."""
    own = recipe.augment if recipe.data.augment_on == "workers" else worker_options(recipe.augment)
    views = TrainViews(images, train_view(img_size, own), recipe.run.seed)
    return _load(views, list(order.batches(epoch, first_step)), recipe.data.workers)


def eval_batches(
    images: ImageSet,
    img_size: int,
    augment: ViewOptions,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """This process's batches of all images, each in one process only; a target of -1: not readable."""
    views = EvalViews(images, eval_view(img_size, augment))
    own = list(range(rank, len(images), world_size))
    return _load(views, [own[start : start + batch_size] for start in range(0, len(own), batch_size)], workers)


def _load(views: Any, batches: list[Any], workers: int) -> Batches:
    loader: DataLoader[Any] = DataLoader(
        views,
        batch_sampler=batches,  # type: ignore[arg-type]  # any list of lists of keys
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals,
    )
    iterator = iter(loader)
    try:
        for pixels, targets, _ in iterator:
            yield pixels, targets
    finally:
        # not left to the iterator's end, which the traceback of an error puts off; this has no public name
        end_workers = getattr(iterator, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()


def _leave_signals(worker: int) -> None:
    """A signal to all processes asks the training to save and end; workers end with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
