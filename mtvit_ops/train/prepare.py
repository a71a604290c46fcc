"""Model, plan and teacher of a training. What is wrong with it and needs no image to be seen is told here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch

from ..models import Model
from ..nn import LeViT
from .build import build_model
from .compute_loss import compute_loss, loss_of
from .device_views import DeviceViews, worker_options
from .images import ImageSet
from .order import TrainOrder
from .parts import Schedule, make_optimiser
from .plan import Plan, make_plan
from .processes import Processes
from .recipe import Recipe, RecipeError
from .state import TrainError, TrainState
from .teacher import Teacher
from .views import eval_view, train_view


class Prepared(NamedTuple):
    """What a training runs with."""

    model: Model  # on the processes' device, in training mode
    plan: Plan  # started
    teacher: Teacher | None


def prepare(
    recipe: Recipe,
    images: ImageSet,
    processes: Processes,
    *,
    start: str | Path | None,
    reset_head: bool,
    teacher: str | Path | None,
    state: TrainState | None,
) -> Prepared:
    """Make what a training runs with, and rehearse its first step; seeds PyTorch's generators.

    Args:
        recipe: what to make.
        images: to train on, perhaps not decoded yet: their classes and number count.
        processes: that will train.
        start, reset_head, teacher: as of ``train``.
        state: what the training goes on from; then nothing of ``start`` is read.

    Raises:
        RecipeError, ValueError, TypeError, FileNotFoundError, ImportError: what was asked for cannot be done.
        TrainError: a state of other classes or another teacher.
    """
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe, len(images.classes), start if state is None else None, reset_head)
    _check_wishes(recipe, model, processes)
    plan = make_plan(model, recipe.plan)
    plan.start(model, recipe.loss)
    _rehearse(recipe, model, plan, len(images), processes)
    guide = None
    if teacher is not None:
        guide = Teacher(teacher, recipe.teacher, images.classes, model.config.img_size, processes.device)
    if state is not None:
        if tuple(state.classes) != images.classes:
            raise TrainError(f"the state's classes are {', '.join(state.classes)}, the data has others")
        if state.teacher != ("" if guide is None else guide.digest):
            raise TrainError("the state is of another teacher's pupil: its file is not the one that the run began with")
    return Prepared(model.to(processes.device), plan, guide)


def _check_wishes(recipe: Recipe, model: Model, processes: Processes) -> None:
    """Refuse what not every model has."""
    _, weights = loss_of(model, recipe.loss)
    if recipe.teacher.answers and not hasattr(weights, "answers"):
        raise RecipeError(
            f"teacher.answers must be false for {type(model.method).__name__}, whose loss reads no answers; a share"
            " softens its targets"
        )
    if not isinstance(model, LeViT):
        return
    if recipe.regularise.drop_path:
        raise RecipeError(
            "regularise.drop_path must be 0 for a LeViT, whose own is model.drop_path, got"
            f" {recipe.regularise.drop_path}"
        )
    if recipe.run.checkpointing:
        raise RecipeError("run.checkpointing must be false for a LeViT, got true")
    if recipe.optimiser.batch_size // processes.world_size < 2:
        raise RecipeError(
            "batch_size must be at least 2 for each process for a LeViT, whose batch norms see a process's images, got"
            f" {recipe.optimiser.batch_size} for {processes.world_size}"
        )


def _rehearse(recipe: Recipe, model: Model, plan: Plan, num_images: int, processes: Processes) -> None:
    """Make all that a step needs, and compute losses of a copy on the CPU, so that what must fail does so now."""
    options, augment = recipe.optimiser, recipe.augment
    rank, world_size = processes.rank, processes.world_size
    order = TrainOrder(
        num_images, options.batch_size, recipe.run.seed, rank, world_size, recipe.mix.mixes, augment.repeats
    )
    size = model.config.img_size
    if recipe.data.augment_on == "device":
        DeviceViews(augment)
        train_view(size, worker_options(augment))
    else:
        train_view(size, augment)
    eval_view(size, augment)
    twin = copy.deepcopy(model)
    Schedule(make_optimiser(twin, options, plan), options, order.steps)
    # two images, since a statistic may need them, where a process has so many; evaluation mode draws nothing
    images = torch.zeros(min(2, options.batch_size // world_size), 3, size, size)
    target = torch.zeros(len(images), dtype=torch.int64)
    twin.eval()
    answers = {"answers": target} if recipe.teacher.answers else {}
    with torch.no_grad():
        for progress in (0.0, 1.0):
            compute_loss(twin, images, target, **plan.at(twin, recipe.loss, progress), **answers)
