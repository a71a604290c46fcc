"""One door to the training losses of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from ..methods import AViT, Dense, EvoLeViT, EvoViT, Life, MTViT
from ..models import Model
from ..nn import LeViT, VisionTransformer
from ._task import check_target

# the file beside this one with the method's loss; only the one that is asked for is imported
_FILES: dict[type, str] = {
    Dense: "dense",
    AViT: "a_vit",
    EvoViT: "evo_vit",
    EvoLeViT: "evo_levit",
    Life: "life",
    MTViT: "mt_vit",
}


def compute_loss(model: Model, images: Tensor, target: Tensor, **weights: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model as its method trains, and weigh what the method minimises.

    Args:
        model: of ``create_model``, or a twin of one (``nn.checkpointed_twin``, ``nn.drop_path_twin``,
            ``nn.masked_twin``).
        images: (B, in_chans, img_size, img_size), dtype and device of the weights, B >= 1.
        target: class indices, (B,), int64, in [0, num_classes); or soft targets, (B, num_classes), any float dtype.
        weights: fields of the method's own dataclass, by name: ``DenseLoss``, ``AViTLoss``, ``EvoViTLoss``,
            ``EvoLeViTLoss``, ``LifeLoss`` or ``MTViTLoss`` in ``mtvit_ops.train.<method>``, which say what they mean
            and where their defaults come from.

    Returns:
        The loss, a scalar, and its named terms before they are weighted, scalars too.

    Raises:
        TypeError: no model of this package, a method without a loss, an unknown weight (the message lists what there
            is), or a value of another kind.
        ValueError: shapes, values or devices that do not fit.

    Gradients flow to the model's parameters. Runs under ``torch.autocast``; terms are float32 (float64 for float64).
    Works with gradients disabled, too: then it is a score.

    Where ``torch.distributed`` is initialised and gradients are enabled, every process must call, with as many images.
    Terms that are no means over images (A-ViT's prior, MT-ViT's cost and balance) are of the batch of all processes
    then, with gradients that ``DistributedDataParallel`` averages into those of the whole batch.
    """
    module, chosen = loss_of(model, weights)
    model.check_images(images)
    check_target(target, images.shape[0], model.config.num_classes, images)
    return module.loss(model, images, target, chosen)


def loss_of(model: Model, weights: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    """The module with the loss of the model's method, and its weights, checked; errors as of ``compute_loss``."""
    if not isinstance(model, (VisionTransformer, LeViT)):
        raise TypeError(f"model must be a VisionTransformer or LeViT, got {type(model).__name__}")
    method = type(model.method)
    if method not in _FILES:
        known = ", ".join(each.__name__ for each in _FILES)
        raise TypeError(f"model must run one of the methods {known}, got {method.__name__}")
    module = import_module(f".{_FILES[method]}", __package__)
    weights_class = getattr(module, f"{method.__name__}Loss")
    names = [field.name for field in dataclasses.fields(weights_class)]
    for name in weights:
        if name not in names:
            raise TypeError(f"{weights_class.__name__} has no weight {name!r}; there are {', '.join(names)}")
    return module, weights_class(**weights)
