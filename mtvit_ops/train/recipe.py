"""Recipes: everything that decides how a model is trained, in one TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from .._checks import check_choice, check_count, check_real
from ..nn.drop_path import check_drop_path
from .views import ViewOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

PRECISIONS = ("float32", "bfloat16")
SHARDINGS = ("none", "full")
CLIP_MODES = ("norm", "agc")
_WITHOUT_END = ("constant", "step", "multistep")  # timm's schedules that do not read min_lr
SHARDED_OPTIMISERS = ("adam", "adamw", "momentum", "sgd")  # each value by itself: a shard's are those of the whole


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the file, the table, the key, what was expected and got."""


@dataclass(frozen=True)
class DataOptions:
    """
    Attributes:
        train_split, val_split: sub-folders of the folder or zip with one folder a class.
        cache: decode all images once into memory: ``"auto"`` (if they take a third of what is free, or less), true or
            false; see ``open_images``.
        workers: processes that prepare batches, >= 0; 0: the training process itself.
        augment_on: ``"workers"``: timm, image by image; ``"device"``: workers only crop and mirror, kornia does the
            rest batch by batch where the model is, for CPUs that would starve a GPU; see ``train.device_views``.
    """

    train_split: str = "train"
    val_split: str = "val"
    cache: bool | str = "auto"
    workers: int = 1
    augment_on: str = "workers"

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, ("auto", True, False))
        check_count("workers", self.workers, 0)
        check_choice("augment_on", self.augment_on, ("workers", "device"))


@dataclass(frozen=True)
class MixOptions:
    """Mixup and CutMix of pairs of training images; timm does it.

    Attributes:
        mixup, cutmix: alphas of the beta distributions, >= 0; 0: none.
        prob: share of batches that are mixed, [0, 1].
        label_smoothing: of the soft targets, [0, 1]; 0 without mixing, where the loss has a weight of this name.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prob", "label_smoothing"):
            check_real(name, getattr(self, name), 0.0, 1.0)
        for name in ("mixup", "cutmix"):
            check_real(name, getattr(self, name), 0.0, 1e3)
        if self.label_smoothing > 0 and not self.mixes:
            raise ValueError(
                "label_smoothing must be 0 without mixing, where the loss's weight of this name serves, got"
                f" {self.label_smoothing}"
            )

    @property
    def mixes(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.prob > 0


@dataclass(frozen=True)
class OptimiserOptions:
    """
    Attributes:
        batch_size: images of one step over all processes, >= 1; even where images are mixed.
        epochs: passes over the training images, >= 1, or as many steps where views repeat. An incomplete last batch is
            left out.
        lr: learning rate after the warm-up, for this batch size, > 0.
        name: an optimiser of timm's.
        betas: of Adam and its kin; None: timm's.
        weight_decay: of matrices; vectors, positions and the class token have none, >= 0.
        clip_grad: largest norm of the gradient, > 0; 0: as it is.
        clip_mode: of what norm. ``"norm"``: of all gradients together; ``"agc"``: of each unit's (a row of a matrix),
            over that of its weights, or 1e-3 if they are smaller (adaptive gradient clipping, timm's).
        schedule: a schedule of timm's (``"cosine"`` ...), or ``"linear"``; by step.
        warmup_epochs, warmup_lr, min_lr: its start and end, >= 0; epochs may be a fraction. ``min_lr`` is at most
            ``lr`` where the schedule reads it, as all but ``"constant"``, ``"step"`` and ``"multistep"`` do.
        ema_decay: of the moving average of the weights, [0, 1); 0: none. With one, it is what is evaluated and saved.
    """

    batch_size: int
    epochs: int
    lr: float
    name: str = "adamw"
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    clip_mode: str = "norm"
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, 1)
        check_count("epochs", self.epochs, 1)
        check_real("lr", self.lr, 0.0, 1e3, open_low=True)
        if self.betas is not None:
            if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
                raise ValueError(f"betas must be two numbers, got {self.betas!r}")
            object.__setattr__(self, "betas", tuple(self.betas))  # the one way into a frozen dataclass
        for name in ("weight_decay", "clip_grad", "warmup_lr", "min_lr"):
            check_real(name, getattr(self, name), 0.0, 1e6)
        check_choice("clip_mode", self.clip_mode, CLIP_MODES)
        if self.clip_grad == 0 and self.clip_mode != "norm":
            raise ValueError(
                f"clip_mode must be 'norm' where clip_grad is 0, so that nothing is clipped, got {self.clip_mode!r}"
            )
        if self.min_lr > self.lr and self.schedule not in _WITHOUT_END:
            raise ValueError(f"min_lr must be at most lr {self.lr}, or the rate would rise to it, got {self.min_lr}")
        check_real("warmup_epochs", self.warmup_epochs, 0.0, float(self.epochs))
        check_real("ema_decay", self.ema_decay, 0.0, 1.0)
        if self.ema_decay == 1:
            raise ValueError("ema_decay must be below 1, or the average never moves, got 1")


@dataclass(frozen=True)
class RegulariseOptions:
    """
    Attributes:
        drop_path: probability that an image skips half of the last block in training, [0, 1); it falls in a line to 0
            in the first block. See ``nn.drop_path_twin``.
    """

    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_drop_path("drop_path", self.drop_path)


@dataclass(frozen=True)
class TeacherOptions:
    """
    Attributes:
        share: of every target that is the teacher's prediction, [0, 1]; the rest is the label, or the mixed labels.
            Which teacher is said beside the recipe; see ``train.teacher``.
        temperature: what the teacher's logits are divided by, (0, 1e3]; above 1: softer. 1 where share is 0.
        answers: let the teacher say one class an image, for the loss of classifiers of their own (Evo-ViT on LeViT);
            then share is 0. Without a share and without answers there is no teacher.
        model: timm's name of the teacher's architecture; empty: its file says which model of this package it is.
    """

    share: float = 0.0
    temperature: float = 1.0
    answers: bool = False
    model: str = ""

    def __post_init__(self) -> None:
        check_real("share", self.share, 0.0, 1.0)
        check_real("temperature", self.temperature, 0.0, 1e3, open_low=True)
        check_choice("answers", self.answers, (True, False))
        if self.answers and self.share > 0:
            raise ValueError(f"share must be 0 where the teacher gives answers, got {self.share}")
        if self.share == 0 and self.temperature != 1:
            raise ValueError(f"temperature must be 1 where share is 0, got {self.temperature}")
        if self.model and not self.wanted:
            raise ValueError(f"model must be empty without share and without answers, got {self.model!r}")

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher."""
        return self.share > 0 or self.answers


@dataclass(frozen=True)
class RunOptions:
    """
    Attributes:
        seed: of weights, order, augmentation and every other draw, in [0, 2**63).
        precision: ``"float32"``, or ``"bfloat16"`` under autocast.
        checkpointing: keep less for the gradient, and compute blocks twice.
        sharding: of several processes. ``"none"``: each holds all weights; ``"full"``: between steps each holds a share
            of weights, moving average and the optimiser's state, for ``optimiser.name`` adam, adamw, momentum or sgd;
            the numbers are the same to rounding. Changes nothing where one process is alone. A run may go on with the
            other one.
        save_steps: steps between saves within an epoch, >= 0; 0: save after each epoch only.
        log_steps: steps between lines of the log, >= 1.
        eval_batch: images evaluated at once in a process, >= 1.
        eval_epochs: epochs between evaluations, >= 1; the last one always is.
    """

    seed: int = 0
    precision: str = "float32"
    checkpointing: bool = False
    sharding: str = "none"
    save_steps: int = 0
    log_steps: int = 10
    eval_batch: int = 64
    eval_epochs: int = 1

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0, 2**63 - 1)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("checkpointing", self.checkpointing, (True, False))
        check_choice("sharding", self.sharding, SHARDINGS)
        check_count("save_steps", self.save_steps, 0)
        check_count("log_steps", self.log_steps, 1)
        check_count("eval_batch", self.eval_batch, 1)
        check_count("eval_epochs", self.eval_epochs, 1)


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        title: what it is, in a line.
        model: ``name`` as ``create_model`` knows it, and its overrides.
        optimiser, data, augment, mix, regularise, teacher, run: see their classes.
        loss: weights by name, as ``compute_loss`` takes them.
        plan: what changes while the method trains; see ``train.plan``.
    """

    title: str
    model: Mapping[str, Any]
    optimiser: OptimiserOptions
    data: DataOptions = field(default_factory=DataOptions)
    augment: ViewOptions = field(default_factory=ViewOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    regularise: RegulariseOptions = field(default_factory=RegulariseOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    run: RunOptions = field(default_factory=RunOptions)
    loss: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model.get("name"), str):
            raise ValueError(f"model must have a name, got {dict(self.model)!r}")
        if self.mix.mixes and self.optimiser.batch_size % 2:
            raise ValueError(
                f"batch_size must be even where images are mixed in pairs, got {self.optimiser.batch_size}"
            )
        if self.run.sharding == "full" and self.optimiser.clip_mode != "norm":
            raise ValueError(
                f"optimiser.clip_mode must be 'norm' where run.sharding is 'full', got {self.optimiser.clip_mode!r}"
            )
        if self.run.sharding == "full" and self.optimiser.name not in SHARDED_OPTIMISERS:
            raise ValueError(
                f"optimiser.name must be one of {', '.join(SHARDED_OPTIMISERS)} where run.sharding is 'full', got"
                f" {self.optimiser.name!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as the TOML file would say it."""
        return _plain(dataclasses.asdict(self))


def load_recipe(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: a TOML file, or what one holds.
        changes: values by their dotted place, ``{"optimiser.epochs": 2}``; they win.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: no TOML, an unknown table or key (the message lists what there is), a missing or a bad value.
    """
    where = "recipe" if isinstance(source, Mapping) else str(source)
    content = _read(source)
    for place, value in (changes or {}).items():
        table, _, key = place.partition(".")
        if not key:
            content[table] = value
            continue
        inner = content.setdefault(table, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{where}: {table} is no table, so it has no {key}")
        inner[key] = value
    return _build(Recipe, content, where)


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"recipe must be a file, there is none at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _build(kind: type[T], content: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table, and the tables within it."""
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RecipeError(f"{where}: there is no {key!r}, only {', '.join(sorted(fields))}{hint}")
        if dataclasses.is_dataclass(types[key]) or types[key] == Mapping[str, Any]:
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {key} must be a table, got {value!r}")
            if dataclasses.is_dataclass(types[key]):
                value = _build(types[key], value, f"{where}: [{key}]")  # type: ignore[arg-type]
        elif types[key] is str and not isinstance(value, str):
            raise RecipeError(f"{where}: {key} must be a string, got {value!r}")
        values[key] = value
    needed = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is needed and f.default_factory is needed]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} must be given")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error


def _plain(value: Any) -> Any:
    """Lists for tuples, as JSON and TOML have them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
