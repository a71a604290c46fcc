"""Training of Evo-ViT on LeViT: classifiers on patches and class token, for labels and for a teacher's answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_real, check_tensor
from ..nn.levit import LeViT
from ._task import task_loss


@dataclass(frozen=True)
class EvoLeViTLoss:
    """Defaults are those of the authors' code (arXiv 2108.01390).

    Attributes:
        task: weight of the classifier that inference reads, in [0, 1e9].
        class_task: weight of the one on the class token, in [0, 1e9]; above 0 the model must have ``class_head=True``.
        distillation: share of the loss that asks the second classifiers for the teacher's answers, in [0, 1]; 0 and 0
            alone for a model without them (``distillation=False``); None: 0.5, or 0 for such a model.
        answers: the teacher's answers, class indices (B,), int64; with a share for them only, and then they must be.
        label_smoothing: of the classifiers for labels, in [0, 1].
    """

    task: float = 0.5
    class_task: float = 0.5
    distillation: float | None = None
    answers: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_real("task", self.task, 0.0, 1e9)
        check_real("class_task", self.class_task, 0.0, 1e9)
        if self.distillation is not None:
            check_real("distillation", self.distillation, 0.0, 1.0)
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)


def loss(model: LeViT, images: Tensor, target: Tensor, weights: EvoLeViTLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropies of all classifiers; arguments and promises as of ``compute_loss``.

    With a the share of distillation: ``(1 - a) * (task * t + class_task * c) + a * (task * td + class_task * cd)``, of
    the terms ``task``, ``class_task``, ``distillation`` and ``class_distillation`` in this order.

    In both modes only a group's own tokens are computed. Gradients reach the trade-offs and what was attended through
    the weights of the tokens that a representative stands for; which tokens go on is a constant.

    Raises:
        TypeError, ValueError: a weight for classifiers that the model does not have, a share without answers, answers
            that do not fit or that nothing reads.

    Source: Evo-ViT, arXiv 2108.01390.
    """
    method, distils = model.method, model.config.distillation
    if weights.class_task > 0 and not method.config.class_head:
        raise ValueError(
            "class_task must be 0 for a model without classifiers on the class token (class_head=True makes them), got"
            f" {weights.class_task}"
        )
    share = (0.5 if distils else 0.0) if weights.distillation is None else weights.distillation
    if bool(share) != distils:
        raise ValueError(
            f"distillation must be {'above 0' if distils else '0'} for a model made with distillation={distils}, got"
            f" {share}"
        )
    if (weights.answers is None) == distils:
        raise ValueError(
            "answers must be the teacher's for a model that is distilled (distillation=False makes one that is not),"
            " got None"
            if distils
            else "answers must be None for a model made with distillation=False"
        )
    if weights.answers is not None:
        check_tensor("answers", weights.answers, (len(images),), torch.int64, target)
    x, _ = method.run(model, model.embed(images), False)
    heads: list[tuple[nn.Module, Tensor, float, tuple[str, str]]] = [
        (model, x[:, 1:].mean(dim=1), weights.task, ("task", "distillation"))
    ]
    if weights.class_task > 0:
        heads.append((method, x[:, 0], weights.class_task, ("class_task", "class_distillation")))
    total, parts = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)), {}
    for owner, seen, weight, (name, distilled) in heads:
        suffix = "_cls" if owner is method else ""
        logits = getattr(owner, f"head{suffix}")(seen)
        parts[name] = task_loss(logits, target, weights.label_smoothing)
        total = total + (1 - share) * weight * parts[name]
        if weights.answers is not None:
            logits = getattr(owner, f"head{suffix}_dist")(seen)
            parts[distilled] = F.cross_entropy(logits.to(total.dtype), weights.answers)
            total = total + share * weight * parts[distilled]
    return total, parts
