"""Training of MT-ViT: tails, encoder and predictor end to end, by a straight-through Gumbel-Softmax choice.

The paper's abstract confirms joint training with the Gumbel-Softmax trick, and no more: the form of every term, its
weight, the temperature and the modes are our design, most of them taken from the closest published methods (DVT: the
sum over the exits; CF-ViT: distillation from the dearest; DynamicViT: the squared cost and its weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_choice, check_real
from ..methods import MTViT
from ..methods.mt_vit import choose_tail
from ..nn import VisionTransformer
from ..ragged import RaggedTokens
from ._encoder import classify, run_blocks
from ._process_mean import process_mean
from ._task import check_target, task_loss

# weights of the terms that each mode has beside its first, whose weight is 1
DEFAULTS: dict[str, dict[str, float]] = {
    "dense": {"tails": 1.0, "distillation": 1.0, "flops": 2.0, "entropy": 0.01},
    "sparse": {"flops": 2.0, "entropy": 0.01},
    "tails": {"distillation": 1.0},
    "classes": {},
    "regret": {"class_task": 0.0},
}
# where the predictor alone learns
PREDICTOR_MODES = ("classes", "regret")
_OF_CHOICES = ("cost_target", "one_sided", "temperature")
_FIRST_TERM = {"classes": "class_task", "regret": "regret"}  # of the others: task


@dataclass(frozen=True)
class MTViTLoss:
    """
    Attributes:
        mode: ``"dense"``: every image through all tails, the chosen one's logits count; ``"sparse"``: every image
            through its chosen tail only, so that tokens it does not take cost nothing; ``"tails"``: all tails, without
            a choice (the first stage of training, before the predictor); ``"classes"``: the predictor alone, and
            only its classifier, so that no tail runs; ``"regret"``: the predictor alone, whose scores learn how far
            each tail's prediction is from the dearest one's. What a tail costs counts only when one is chosen
            (``cost_weight``, for ``calibrate`` to set).
        tails: weight of the cross-entropies of all tails, without which a tail that is never picked never learns.
        distillation: weight of what the cheaper tails lack of the dearest one's prediction.
        flops: weight of the squared distance of the mean cost from ``cost_target``.
        entropy: weight of the balance of the tails over the batch, against collapse; see ``entropy_weight_at``.
        class_task: weight of the predictor's classifier in mode ``"regret"``: what tells classes apart also tells how
            hard an image is. Above 0, and in mode ``"classes"``, the model must have ``class_head=True``.
        cost_target: wanted mean cost, relative to the dearest tail: between the cheapest tail's and 1.
        estimator: how the predictor learns what a choice is worth. ``"gumbel"``: from a drawn choice, straight through;
            ``"expected"``: from the losses of all tails, weighed by its probabilities, which is the mean of what draws
            would say, without their noise; mode ``"dense"`` only.
        one_sided: do not punish a mean cost below the target.
        temperature: of the (Gumbel-)Softmax, (0, 1e6]; see ``temperature_at``.
        label_smoothing: of the cross-entropies, [0, 1].

    Weights lie in [0, 1e9]; None: 1, 1, 2, 0.01 and 0 in this order, and 0 for a term that the mode does not have
    (dense: ``class_task``; sparse: ``tails``, ``distillation``, ``class_task``; tails: all but ``distillation``;
    classes: all, since its one term weighs 1; regret: all but ``class_task``).
    """

    mode: str = "dense"
    tails: float | None = None
    distillation: float | None = None
    flops: float | None = None
    entropy: float | None = None
    class_task: float | None = None
    cost_target: float = 0.5
    estimator: str = "gumbel"
    one_sided: bool = False
    temperature: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, tuple(DEFAULTS))
        for name in ("tails", "distillation", "flops", "entropy", "class_task"):
            value = getattr(self, name)
            if value is None:
                continue
            check_real(name, value, 0.0, 1e9)
            if value and name not in DEFAULTS[self.mode]:
                raise ValueError(f"{name} must be 0 in mode {self.mode!r}, which has no such weight, got {value}")
        check_real("cost_target", self.cost_target, 0.0, 1.0, open_low=True)
        check_choice("estimator", self.estimator, ("gumbel", "expected"))
        if self.estimator == "expected" and self.mode != "dense":
            raise ValueError(f"estimator must be 'gumbel' in mode {self.mode!r}, which does not run all tails")
        check_choice("one_sided", self.one_sided, (True, False))
        check_real("temperature", self.temperature, 0.0, 1e6, open_low=True)
        for name in _OF_CHOICES:
            value, default = getattr(self, name), getattr(MTViTLoss, name)
            if self.mode not in ("dense", "sparse") and value != default:
                raise ValueError(
                    f"{name} must be {default!r} in mode {self.mode!r}, which chooses no tail, got {value!r}"
                )
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)

    def of_terms(self) -> dict[str, float]:
        """The weight of each term that the mode has, the one without a choice of weight first."""
        defaults = DEFAULTS[self.mode]
        given = {name: getattr(self, name) for name in defaults}
        weights = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
        return {_FIRST_TERM.get(self.mode, "task"): 1.0, **weights}


class Choice(NamedTuple):
    """One tail per image."""

    tail: Tensor  # (B,) int32
    weights: Tensor  # (B, K): exactly one-hot, with the gradient of the softmax


def loss(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: MTViTLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the mode's terms.

    With o_k the logits of tail k and y the one-hot choice of an image:

    - ``task``: ``CE(sum_k y_k o_k)``; in mode ``"tails"`` ``sum_k CE(o_k)``; with the estimator ``"expected"``
      ``sum_k p_k CE(o_k)``, with p the predictor's probabilities in place of y, in the cost too.
    - ``tails``: ``sum_k CE(o_k)``, beside a choice.
    - ``distillation``: ``sum_k KL(o_K || o_k)`` over the cheaper tails, the dearest held constant.
    - ``flops``: ``(mean relative cost - cost_target)^2``, the mean over the batch of all processes, not an image's own.
    - ``entropy``: minus the entropy of the tails' mean probabilities over that batch.
    - ``regret``: the mean over images and tails of ``(s_k + d_k)^2``, with s the predictor's scores and d_k in [0, 1]
      the total variation distance between the softmaxes of o_K and o_k. It asks for no label: whether a tail happened
      to be right says little about an image; and it is bounded: a divergence would learn of the few largest alone.
    - ``class_task``, beside it where it has a weight, or alone: the cross-entropy of the predictor's classifier.

    Args:
        model: runs ``MTViT``. In training mode the choice is drawn (from PyTorch's generator), in evaluation mode it is
            the predictor's best, without noise; ``cost_weight`` is for inference only.
        images: as the model takes them, B >= 1.
        target: class indices, (B,), int64, in [0, num_classes), or soft targets, (B, num_classes), float.
        weights: mode and weights.

    Returns:
        The sum, and the terms before weighting, by name.

    Raises:
        TypeError, ValueError: a model of another method or with a forced tail (but in mode ``"tails"``), a cost target
            that the tails cannot meet, a weight for a classifier that the model does not have, images or targets that
            do not fit.

    All tails of a batch, or all chosen ones, are one packed pass through the encoder. Gradients flow to all parameters
    of what ran, in modes ``"classes"`` and ``"regret"`` to the predictor's alone; terms are float32 (float64 for
    float64). No device synchronisation.

    Source: MT-ViT, arXiv 2203.01587, for the idea; our design, see the module.
    """
    method = model.method
    if not isinstance(method, MTViT):
        raise TypeError(f"model must run MTViT, got {type(method).__name__}")
    model.check_images(images)
    factors = weights.of_terms()
    if weights.mode in PREDICTOR_MODES:
        return _weigh(_predictor_terms(model, method, images, target, weights), factors)
    terms: dict[str, Tensor] = {}
    choice = shares = None
    if weights.mode != "tails":
        _check_target(method, weights, factors["flops"])
        scores = _wide(method.predictor(images))
        if weights.estimator == "gumbel":
            choice = choose(scores, weights.temperature, gumbel_noise(scores) if model.training else None)
            shares = choice.weights
        else:
            shares = (scores / weights.temperature).softmax(dim=1)  # (B, K)
    if weights.mode == "sparse":
        assert choice is not None
        chosen = choice.weights.gather(1, choice.tail[:, None].long())  # (B, 1): 1, with a gradient
        logits = chosen * _wide(chosen_logits(model, images, choice.tail))
        terms["task"] = task_loss(logits, target, weights.label_smoothing)
    else:
        every = _wide(all_logits(model, images))  # (K, B, C)
        losses = torch.stack(
            [task_loss(each, target, weights.label_smoothing, reduction="none") for each in every.unbind()]
        )  # (K, B)
        every_task = losses.mean(dim=1).sum()
        if shares is None:
            terms["task"] = every_task
        elif choice is None:
            terms["task"] = (shares.T * losses).sum(dim=0).mean()
        else:
            logits = (shares.T[:, :, None] * every).sum(dim=0)
            terms["task"] = task_loss(logits, target, weights.label_smoothing)
        if shares is not None:
            terms["tails"] = every_task
        terms["distillation"] = distillation_term(every)
    if shares is not None:
        terms["flops"] = flops_term(shares, method.relative_costs, weights.cost_target, weights.one_sided)
        terms["entropy"] = entropy_term(scores)
    return _weigh(terms, factors)


def choose(scores: Tensor, temperature: float, noise: Tensor | None = None) -> Choice:
    """The best of score plus noise for each image, both (B, K); equals go to the cheaper tail."""
    noisy = scores if noise is None else scores + noise
    tail = choose_tail(noisy, (0.0,) * noisy.shape[1], 0.0)
    soft = (noisy / temperature).softmax(dim=1)
    hard = F.one_hot(tail.long(), noisy.shape[1]).to(soft.dtype)
    return Choice(tail, hard + (soft - soft.detach()))  # in this order the difference is exactly 0


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel numbers, shape, dtype and device of ``like``."""
    return -torch.empty_like(like).exponential_().log()


def all_logits(model: VisionTransformer, images: Tensor) -> Tensor:
    """Logits (K, B, C) of every image through every tail, in one packed pass."""
    method = model.method
    assert isinstance(method, MTViT)
    lengths, batch = method.lengths, len(images)
    tails = torch.arange(len(lengths), dtype=torch.int32, device=images.device).repeat_interleave(batch)
    x, offsets = method.tokenise(model, images.repeat(len(lengths), 1, 1, 1), tails)
    # the host knows every count: the list ends with the last image
    tokens = RaggedTokens(x[: batch * sum(lengths)], None, offsets, lengths[-1])
    return classify(model, run_blocks(model, tokens, range(model.config.depth))).unflatten(0, (-1, batch))


def chosen_logits(model: VisionTransformer, images: Tensor, tail: Tensor) -> Tensor:
    """Logits (B, C) of every image through its own tail (B,) int32, in one packed pass."""
    method = model.method
    assert isinstance(method, MTViT)
    x, offsets = method.tokenise(model, images, tail)
    tokens = RaggedTokens(x, None, offsets, method.lengths[-1]).trimmed()
    return classify(model, run_blocks(model, tokens, range(model.config.depth), ragged=True))


def regret_term(scores: Tensor, model: VisionTransformer, images: Tensor) -> Tensor:
    """How far scores (B, K) are from minus the distance of each tail's prediction from the dearest one's."""
    with torch.no_grad():  # only the predictor learns
        shares = _wide(all_logits(model, images)).softmax(dim=2)  # (K, B, C)
        distances = 0.5 * (shares - shares[-1]).abs().sum(dim=2)
    return F.mse_loss(scores, -distances.T)


def _predictor_terms(
    model: VisionTransformer, method: MTViT, images: Tensor, target: Tensor, weights: MTViTLoss
) -> dict[str, Tensor]:
    _check_choosing(method, weights)
    class_task = weights.of_terms()["class_task"]
    if class_task and not method.config.class_head:
        raise ValueError(
            "class_task must be 0 for a model whose predictor has no classifier (class_head=True makes one), got"
            f" {class_task}"
        )
    check_target(target, len(images), model.config.num_classes, model.cls_token)
    scores, classes = method.predictor.judge(method.predictor.look(images))
    terms = {}
    if weights.mode == "regret":
        terms["regret"] = regret_term(_wide(scores), model, images)
    if class_task:
        assert classes is not None
        terms["class_task"] = task_loss(_wide(classes), target, weights.label_smoothing)
    return terms


def distillation_term(logits: Tensor) -> Tensor:
    """Sum over the cheaper tails of KL(dearest || tail), batch mean, from (K, B, C); the dearest learns nothing."""
    students = logits[:-1].log_softmax(dim=2)
    teacher = logits[-1].detach().log_softmax(dim=1).expand_as(students)
    return F.kl_div(students, teacher, reduction="sum", log_target=True) / logits.shape[1]


def flops_term(weights: Tensor, relative_costs: tuple[float, ...], target: float, one_sided: bool = False) -> Tensor:
    """Squared distance of the mean cost over the batch of all processes from its target, from choices (B, K)."""
    shares = process_mean(weights.mean(dim=0)).unbind()
    excess = torch.stack([cost * share for cost, share in zip(relative_costs, shares)]).sum() - target
    return (excess.clamp_min(0.0) if one_sided else excess).square()


def entropy_term(scores: Tensor) -> Tensor:
    """Minus the entropy of the tails' mean probabilities over the batch of all processes, from scores (B, K).

    It is -log K where all are as likely.
    """
    return -torch.special.entr(process_mean(scores.softmax(dim=1).mean(dim=0))).sum()


def entropy_weight_at(progress: float, weight: float = 0.01) -> float:
    """The weight of the entropy at a point of training in [0, 1]: falls to 0 over the first third, in a line."""
    check_real("progress", progress, 0.0, 1.0)
    check_real("weight", weight, 0.0, 1e9)
    return weight * max(0.0, 1.0 - 3.0 * progress)


def temperature_at(progress: float, start: float = 5.0, end: float = 0.5) -> float:
    """The Gumbel-Softmax's temperature at a point of training in [0, 1], where it is not constant: exponential."""
    check_real("progress", progress, 0.0, 1.0)
    check_real("start", start, 0.0, 1e6, open_low=True)
    check_real("end", end, 0.0, 1e6, open_low=True)
    return float(start * (end / start) ** progress)


def _weigh(terms: dict[str, Tensor], factors: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    # a term of weight 0 costs no backward pass
    weighted = [factors[name] * term for name, term in terms.items() if factors[name]]
    return torch.stack(weighted).sum(), terms


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_choosing(method: MTViT, weights: MTViTLoss) -> None:
    if method.config.force_tail is not None:
        raise ValueError(
            f"force_tail must be None in mode {weights.mode!r}, where the predictor learns, got"
            f" {method.config.force_tail}"
        )


def _check_target(method: MTViT, weights: MTViTLoss, factor: float) -> None:
    _check_choosing(method, weights)
    cheapest = method.relative_costs[0]
    if factor and not cheapest <= weights.cost_target <= max(1.0, cheapest):
        raise ValueError(
            f"cost_target must be in [{cheapest:.4f}, 1], what the model's tails cost, got {weights.cost_target}"
        )
