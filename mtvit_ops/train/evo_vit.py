"""Evo-ViT's training: two classifiers, and selection by layer before selection by stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from .._checks import check_choice, check_count, check_real
from ..methods import EvoLeViT, EvoViT
from ..models import Model
from ..nn import VisionTransformer
from ._task import task_loss
from .evo_soft import encode_softly


@dataclass(frozen=True)
class EvoViTLoss:
    """Defaults are those of the authors' code (arXiv 2108.01390).

    Attributes:
        task: weight of the classifier that inference reads, in [0, 1e9].
        class_task: weight of the second classifier, on the class token, in [0, 1e9]; above 0 the model must have been
            made with ``class_head=True``.
        label_smoothing: of both, in [0, 1].
        selection: ``"hard"``: as in inference, so that no gradient reaches the scores (the authors'); ``"soft"``: every
            patch goes on, and the blocks behind a selection weigh it by its score, so that the class attention learns
            what to select (our design).
        temperature: of the soft weights, > 0; see ``train.evo_soft.log_soft_weights``.
    """

    task: float = 0.5
    class_task: float = 0.5
    label_smoothing: float = 0.0
    selection: str = "hard"
    temperature: float = 3.0

    def __post_init__(self) -> None:
        check_real("task", self.task, 0.0, 1e9)
        check_real("class_task", self.class_task, 0.0, 1e9)
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_choice("selection", self.selection, ("hard", "soft"))
        check_real("temperature", self.temperature, 0.0, 1e6, open_low=True)


def loss(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: EvoViTLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of both classifiers; the terms are ``task`` and, where it has a weight, ``class_task``. Arguments
    and promises as of ``compute_loss``.

    In both modes only selected tokens are computed, forward and backward, and scores rank tokens and carry no gradient;
    with ``selection="soft"`` they do, and all tokens are computed.

    Raises:
        ValueError: a weight for a second classifier that the model does not have.

    Source: Evo-ViT, arXiv 2108.01390.
    """
    method = cast(EvoViT, model.method)
    if weights.class_task > 0 and not method.config.class_head:
        raise ValueError(
            "class_task must be 0 for a model without a second classifier (class_head=True makes one), got"
            f" {weights.class_task}"
        )
    if weights.selection == "soft":
        first_rows, tokens, state = encode_softly(model, images, weights.temperature)
    else:
        first_rows, tokens, state = model.encode(images)
    logits = model.classify(method.readout(first_rows, tokens, state).to(images.dtype))
    parts = {"task": task_loss(logits, target, weights.label_smoothing)}
    total = weights.task * parts["task"]
    if weights.class_task > 0:
        class_logits = method.head_cls(method.norm_cls(tokens.x[first_rows].to(images.dtype)))
        parts["class_task"] = task_loss(class_logits, target, weights.label_smoothing)
        total = total + weights.class_task * parts["class_task"]
    return total, parts


def mode_at(epoch: int, stage_epoch: int = 200) -> str:
    """The mode to train an epoch in, counted from 0: ``"layer"`` before ``stage_epoch``, then ``"stage"``.

    The authors change at 200 of 300 epochs.
    """
    check_count("epoch", epoch)
    check_count("stage_epoch", stage_epoch)
    return "layer" if epoch < stage_epoch else "stage"


def set_mode(model: Model, mode: str) -> None:
    """Run a model in another mode from now on; its parameters stay as they are.

    Args:
        model: runs Evo-ViT, flat or on LeViT.
        mode: ``"layer"`` or ``"stage"``.

    Raises:
        TypeError: a model of another method.
        ValueError: no mode.
    """
    method = model.method
    if not isinstance(method, (EvoViT, EvoLeViT)):
        raise TypeError(f"model must run EvoViT or EvoLeViT, got {type(method).__name__}")
    check_choice("mode", mode, ("stage", "layer"))
    method.config = dataclasses.replace(method.config, mode=mode)
    method.attach(cast(Any, model))
