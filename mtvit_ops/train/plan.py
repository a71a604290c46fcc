"""What changes while a method trains: which parameters learn, its mode, and weights that move with time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._checks import check_choice, check_real
from ..methods import EvoLeViT, EvoViT, Life, MTViT
from ..models import Model
from ..nn import VisionTransformer
from . import evo_vit, life, mt_vit


@dataclass(frozen=True)
class Plan:
    """Nothing changes; the plan of the dense ViT and of A-ViT."""

    def start(self, model: Model, loss: Mapping[str, Any]) -> None:
        """Choose what learns, once, before the optimiser is made."""

    def at(self, model: Model, loss: Mapping[str, Any], progress: float) -> dict[str, Any]:
        """Set the model up for a step and return the weights of its loss; ``progress``: share of the steps done."""
        return dict(loss)

    def lr_scale(self, parameter: str) -> float:
        """What the learning rate of a parameter, by its name, is multiplied with."""
        return 1.0


@dataclass(frozen=True)
class EvoViTPlan(Plan):
    """Of the flat backbone and of LeViT.

    Attributes:
        stage_from: share of the training after which selection goes by stage instead of by layer, [0, 1]; the authors'
            200 of 300 epochs. Evaluation is in the mode that training is in.
    """

    stage_from: float = 2 / 3

    def __post_init__(self) -> None:
        check_real("stage_from", self.stage_from, 0.0, 1.0)

    def at(self, model: Model, loss: Mapping[str, Any], progress: float) -> dict[str, Any]:
        mode = "layer" if progress < self.stage_from else "stage"
        assert isinstance(model.method, (EvoViT, EvoLeViT))
        if model.method.config.mode != mode:
            evo_vit.set_mode(model, mode)
        return dict(loss)


@dataclass(frozen=True)
class LifePlan(Plan):
    """
    Attributes:
        freeze: let only the parameters of the loss's stage learn, as the authors do; see ``train.life.freeze``.
    """

    freeze: bool = True

    def __post_init__(self) -> None:
        check_choice("freeze", self.freeze, (True, False))

    def start(self, model: Model, loss: Mapping[str, Any]) -> None:
        if self.freeze:
            assert isinstance(model, VisionTransformer)
            life.freeze(model, loss.get("stage", life.LifeLoss().stage))


@dataclass(frozen=True)
class MTViTPlan(Plan):
    """
    Attributes:
        predictor_only: share of the training in which tails and encoder stay as they are, [0, 1]; all of it in the
            loss's modes ``"classes"`` and ``"regret"``.
        encoder_lr: learning rate of tails and encoder over the predictor's, (0, 1].
        temperature: of the Gumbel-Softmax at the start and at the end, falling exponentially, both > 0; the loss's own
            weight of this name is refused.
        anneal_entropy: the weight of the entropy falls to 0 over the first third.

    In the loss's modes ``"tails"``, ``"classes"`` and ``"regret"``, where nothing is chosen, all but ``encoder_lr`` are
    refused; in the last two, where only the predictor learns, that one is, too.
    """

    predictor_only: float = 0.0
    encoder_lr: float = 1.0
    temperature: tuple[float, float] = (1.0, 1.0)
    anneal_entropy: bool = True

    def __post_init__(self) -> None:
        check_real("predictor_only", self.predictor_only, 0.0, 1.0)
        check_real("encoder_lr", self.encoder_lr, 0.0, 1.0, open_low=True)
        check_choice("anneal_entropy", self.anneal_entropy, (True, False))
        if not isinstance(self.temperature, (tuple, list)) or len(self.temperature) != 2:
            raise ValueError(f"temperature must be two numbers, got {self.temperature!r}")
        object.__setattr__(self, "temperature", tuple(self.temperature))  # the one way into a frozen dataclass
        for value in self.temperature:
            check_real("temperature", value, 0.0, 1e6, open_low=True)

    def start(self, model: Model, loss: Mapping[str, Any]) -> None:
        if "temperature" in loss:
            raise ValueError(
                "temperature must be left out of the loss, where the plan's takes its place, got"
                f" {loss['temperature']!r}"
            )
        mode = loss.get("mode", mt_vit.MTViTLoss().mode)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _UNREAD.get(mode, ()) and value != field.default:
                raise ValueError(
                    f"{field.name} must be {field.default!r} in the loss's mode {mode!r}, which does not read it, got"
                    f" {value!r}"
                )

    def at(self, model: Model, loss: Mapping[str, Any], progress: float) -> dict[str, Any]:
        weights = dict(loss)
        mode = weights.get("mode", mt_vit.MTViTLoss().mode)
        if mode == "tails":
            return weights
        alone = mode in mt_vit.PREDICTOR_MODES
        learns = not alone and progress >= self.predictor_only
        if model.cls_token.requires_grad != learns:
            for name, parameter in model.named_parameters():
                if not name.startswith(_PREDICTOR):
                    parameter.requires_grad_(learns)
        if alone:
            return weights
        weights["temperature"] = mt_vit.temperature_at(progress, *self.temperature)
        if self.anneal_entropy:
            weight = weights.get("entropy", mt_vit.DEFAULTS[mode]["entropy"])
            weights["entropy"] = mt_vit.entropy_weight_at(progress, weight)
        return weights

    def lr_scale(self, parameter: str) -> float:
        return 1.0 if parameter.startswith(_PREDICTOR) else self.encoder_lr


# by the loss's mode
_UNREAD = {
    "tails": ("predictor_only", "temperature", "anneal_entropy"),
    **dict.fromkeys(mt_vit.PREDICTOR_MODES, ("predictor_only", "encoder_lr", "temperature", "anneal_entropy")),
}
_PREDICTOR = "method.predictor."
_PLANS: dict[type, type[Plan]] = {EvoViT: EvoViTPlan, EvoLeViT: EvoViTPlan, Life: LifePlan, MTViT: MTViTPlan}


def make_plan(model: Model, options: Mapping[str, Any]) -> Plan:
    """The plan of the model's method.

    Raises:
        TypeError, ValueError: an option that it does not have (the message lists what there is), or a bad value.
    """
    kind = _PLANS.get(type(model.method), Plan)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in names:
            raise TypeError(
                f"the plan of {type(model.method).__name__} has no {name!r}, it has {', '.join(names) or 'no options'}"
            )
    return kind(**options)
