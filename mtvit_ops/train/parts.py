"""What timm brings to a training: optimiser, schedule, average of the weights, mixing of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._timm import import_timm
from ..models import Model
from ..nn import LeViT, VisionTransformer
from .plan import Plan
from .recipe import MixOptions, OptimiserOptions, RecipeError


def make_optimiser(model: Model, options: OptimiserOptions, plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of what learns; vectors, positions and the class token have no weight decay.

    Raises:
        RecipeError: no such optimiser, or one that cannot be made so; nothing that learns.
    """
    import_timm()
    from timm.optim import create_optimizer_v2

    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim <= 1 or "pos_embed" in name or "cls_token" in name
            decay = 0.0 if bare else options.weight_decay
            groups.setdefault((decay, plan.lr_scale(name)), []).append(parameter)
    if not groups:
        raise RecipeError("no parameter learns")
    # timm's schedules know lr_scale
    listed = [{"params": each, "weight_decay": decay, "lr_scale": scale} for (decay, scale), each in groups.items()]
    extra: dict[str, Any] = {} if options.betas is None else {"betas": options.betas}
    try:
        return create_optimizer_v2(listed, opt=options.name, lr=options.lr, weight_decay=0.0, **extra)
    except (AssertionError, ValueError, TypeError) as error:
        raise RecipeError(f"optimiser {options.name!r} cannot be made: {error}") from error


class Schedule:
    """The learning rate of every step, from nothing but the step.

    Args:
        optimiser: whose groups get it.
        options: of the recipe.
        steps: of an epoch.

    Raises:
        RecipeError: no such schedule, or one that waits for a score.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, options: OptimiserOptions, steps: int) -> None:
        import_timm()
        from timm.scheduler import create_scheduler_v2

        # timm counts in epochs; here its epochs are steps, so that a warm-up may end within an epoch
        linear = options.schedule == "linear"  # timm's polynomial of power 1
        try:
            scheduler, _ = create_scheduler_v2(
                optimiser,
                sched="poly" if linear else options.schedule,
                num_epochs=options.epochs * steps,
                warmup_epochs=round(options.warmup_epochs * steps),
                warmup_lr=options.warmup_lr,
                min_lr=options.min_lr,
                decay_rate=1.0 if linear else 0.1,
            )
        except (AssertionError, ValueError) as error:
            raise RecipeError(f"schedule must be one of timm's by step, got {options.schedule!r}: {error}") from error
        if scheduler is None or options.schedule == "plateau":  # that one asks for scores
            raise RecipeError(f"schedule must be one of timm's by step, got {options.schedule!r}")
        self._scheduler = scheduler

    def set(self, step: int) -> None:
        """Make the learning rates those of a step, counted from 0."""
        self._scheduler.step(step)


class Average:
    """The moving average of a model's weights and buffers, timm's.

    Args:
        model: what is averaged; its copy is ``model`` here.
        decay: (0, 1), reached from below in the first steps.
        sharded: whether model and average will be shards when they meet; their buffers are none.
    """

    def __init__(self, model: Model, decay: float, *, sharded: bool = False) -> None:
        import_timm()
        from timm.utils import ModelEmaV3

        # one by one: no list may hold shards and whole tensors
        self._ema = ModelEmaV3(model, decay=decay, use_warmup=True, foreach=not sharded)
        self._ema.module.requires_grad_(False)

    @property
    def holder(self) -> nn.Module:
        """What holds ``model`` and nothing else: to be cut into shards in its place, which would change its class."""
        return self._ema

    @property
    def model(self) -> Model:
        averaged = self._ema.module
        assert isinstance(averaged, (VisionTransformer, LeViT))
        return averaged

    def update(self, model: Model, step: int) -> None:
        self._ema.update(model, step=step)


class Mixing:
    """Mixup and CutMix of a batch with its reverse, timm's, the same draw in every process.

    Args:
        options: of the recipe.
        num_classes: of the soft targets.
    """

    def __init__(self, options: MixOptions, num_classes: int) -> None:
        import_timm()
        from timm.data import Mixup

        self._mix: Any = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.prob,
            label_smoothing=options.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets (B, C); NumPy's global generator, which timm draws from, is put back."""
        kept = np.random.get_state()
        np.random.seed(seed % 2**32)
        try:
            mixed, soft = self._mix(images, targets)
        finally:
            np.random.set_state(kept)
        return mixed, soft
