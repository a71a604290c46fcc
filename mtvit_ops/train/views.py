"""What a model sees of an image: timm's augmentation in training, the centre in evaluation."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import check_count
from .._timm import import_timm
from ..photos import MEAN, STD
from ..weights import ModelInfo
from .images import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

_INTERPOLATIONS = ("random", "bicubic", "bilinear")
_NUMBER = r"\d{1,4}(\.\d{1,6})?"
# timm passes over sections that it does not know: a typing error would train another model
_POLICY = re.compile(
    rf"rand(-((m|n|inc|mmax)\d{{1,3}}|(p|mstd){_NUMBER}|t(weights|3aw|3a)))*"
    rf"|augmix(-((m|w|d|b)\d{{1,3}}|(a|mstd){_NUMBER}))*"
    rf"|(v0|v0r|original|originalr|3a)(-mstd{_NUMBER})?"
)


@dataclass(frozen=True)
class ViewOptions:
    """Augmentation of the training images, and the crop of evaluation; the fields of a recipe's ``[augment]`` table.

    Attributes:
        scale: smallest and largest share of the image's area that a random crop takes, 0 < a <= b <= 1.
        ratio: smallest and largest width over height of the crop before it becomes a square, 0 < a <= b.
        hflip: probability of a mirror image, in [0, 1].
        color_jitter: brightness, contrast and saturation are each multiplied by a factor in [1 - x, 1 + x], x >= 0;
            None: they stay.
        auto_augment: timm's name of a policy, such as ``"rand-m9-mstd0.5-inc1"`` (RandAugment), ``"augmix-m3"`` or
            ``"3a"``; None: none. Only ``"3a"`` goes with ``color_jitter``, as in timm.
        reprob: probability that a rectangle is replaced by noise (Random Erasing), in [0, 1].
        interpolation: ``"bicubic"``, ``"bilinear"``, or ``"random"``: one of the two for each training image, and
            bicubic in evaluation.
        repeats: views of an image that follow each other in an epoch, >= 1; with more than one (repeated augmentation)
            an epoch has as many steps as ever, and shows one in so many of the images. See ``train.order.TrainOrder``.
        crop_pct: side of the centre crop over the shorter side that the image is resized to in evaluation, in (0, 1].

    Raises:
        TypeError: a value of another kind.
        ValueError: a value out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float | None = None
    auto_augment: str | None = None
    reprob: float = 0.0
    interpolation: str = "random"
    crop_pct: float = 0.875
    repeats: int = 1

    def __post_init__(self) -> None:
        check_count("repeats", self.repeats, 1)
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            object.__setattr__(self, name, _interval(name, getattr(self, name), most))
        for name in ("hflip", "reprob", "crop_pct"):
            value = _number(name, getattr(self, name))
            if not (0 <= value <= 1 and (name != "crop_pct" or value > 0)):
                raise ValueError(f"{name} must be in {'(' if name == 'crop_pct' else '['}0, 1], got {value}")
        if self.color_jitter is not None and not 0 <= _number("color_jitter", self.color_jitter) < math.inf:
            raise ValueError(f"color_jitter must be at least 0, or None, got {self.color_jitter}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.auto_augment is None:
            return
        if not isinstance(self.auto_augment, str):
            raise TypeError(f"auto_augment must be a str or None, got {type(self.auto_augment).__name__}")
        if not _POLICY.fullmatch(self.auto_augment):
            raise ValueError(
                f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', got {self.auto_augment!r}"
            )
        if self.color_jitter is not None and "3a" not in self.auto_augment:
            raise ValueError(
                f"color_jitter must be None beside auto_augment={self.auto_augment!r}, with which timm leaves it out,"
                f" got {self.color_jitter}"
            )

    @property
    def eval_interpolation(self) -> str:
        """Of evaluation, which draws nothing: ``"bicubic"`` or ``"bilinear"``."""
        return "bicubic" if self.interpolation == "random" else self.interpolation


def options_of(info: ModelInfo) -> ViewOptions:
    """The evaluation that a file of weights was made for."""
    return ViewOptions(crop_pct=info.crop_pct, interpolation=info.interpolation)


@dataclass(frozen=True)
class View:
    """A picture as float32 (3, img_size, img_size), normalised by ImageNet's statistics.

    Attributes:
        transform: timm's.
        img_size: side of the result.
        shortest: a picture whose shorter side is smaller is enlarged before, or a crop of it might be empty.
    """

    transform: Callable[[Image], Tensor]
    img_size: int
    shortest: int = 1

    def __call__(self, image: Image) -> Tensor:
        short = min(image.size)
        if short < self.shortest:
            image = image.resize((image.width * self.shortest // short, image.height * self.shortest // short))
        return self.transform(image)


def train_view(img_size: int, options: ViewOptions) -> View:
    """A random view, drawn from the generators of ``random``, NumPy and PyTorch.

    Args:
        img_size: side, pixels.
        options: what is drawn.

    Raises:
        ImportError: timm is not installed.
        TypeError, ValueError: ``img_size`` is no positive int, or timm refuses ``auto_augment``.
    """
    check_count("img_size", img_size, 1)
    least_side = min(options.scale[0] * options.ratio[0], options.scale[0] / options.ratio[1]) ** 0.5
    try:
        transform = _timm_data().create_transform(
            img_size,
            is_training=True,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            auto_augment=options.auto_augment,
            interpolation=options.interpolation,
            re_prob=options.reprob,
            re_mode="pixel",
            mean=MEAN,
            std=STD,
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(f"timm refuses auto_augment={options.auto_augment!r}: {error}") from None
    return View(transform, img_size, math.ceil(1 / least_side))


def eval_view(img_size: int, options: ViewOptions) -> View:
    """The centre of a picture, nothing drawn; arguments and errors as for ``train_view``."""
    check_count("img_size", img_size, 1)
    transform = _timm_data().create_transform(
        img_size,
        is_training=False,
        interpolation=options.eval_interpolation,
        crop_pct=options.crop_pct,
        mean=MEAN,
        std=STD,
    )
    return View(transform, img_size)


class TrainViews(Dataset[tuple[Tensor, int, int]]):
    """Random views of a set's images.

    A view depends on the seed and its key alone: not on the worker, the rank, the position in the epoch or any
    generator's state, and it leaves those states as they were. The generators are the process's own, so one thread at
    a time.

    Args:
        images: the set.
        view: of ``train_view``.
        seed: at least 0.
    """

    def __init__(self, images: ImageSet, view: View, seed: int) -> None:
        self.images, self._view, self._seed = images, view, seed
        check_count("seed", seed, 0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, int, int]:
        """One view.

        Args:
            key: (epoch, index), as the sampler yields them: so workers that live on learn of a new epoch. Of further
                views of the image in this epoch (epoch, index, number), from 1.

        Returns:
            The pixels, (3, img_size, img_size) float32; the target; and the index of the image they are from. For a
            broken image that is the next one that can be read, after the last one the first.

        Raises:
            ValueError: no image of the set can be read.
        """
        index = key[1]
        for step in range(len(self)):
            found = (index + step) % len(self)
            image = self.images.read(found)
            if image is not None:
                with _seeded(self._seed, *key):
                    return self._view(image), self.images.targets[found], found
        raise ValueError(f"none of the {len(self)} images can be read")


class EvalViews(Dataset[tuple[Tensor, int, int]]):
    """The centre of each image of a set.

    Args:
        images: the set.
        view: of ``eval_view``.
    """

    def __init__(self, images: ImageSet, view: View) -> None:
        self.images, self._view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """The pixels, (3, img_size, img_size) float32; the target; ``index``. A broken image is 0 with target -1."""
        image = self.images.read(index)
        if image is None:
            return torch.zeros(3, self._view.img_size, self._view.img_size), -1, index
        return self._view(image), self.images.targets[index], index


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """The three generators that timm and torchvision draw from, started from these numbers and put back after."""
    # not torch.manual_seed: that one reaches for GPUs
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    words = np.random.SeedSequence(parts).generate_state(12)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:8])
    torch.default_generator.manual_seed(int(words[8:10].view(np.uint64)[0]) >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _timm_data() -> Any:
    import_timm()
    import timm.data

    return timm.data


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def _interval(name: str, value: Any, most: float) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    low, high = (float(_number(name, end)) for end in value)
    if not (0 < low <= high <= most and high < math.inf):
        raise ValueError(f"{name} must be 0 < a <= b{f' <= {most:g}' if most < math.inf else ''}, got {value!r}")
    return low, high
