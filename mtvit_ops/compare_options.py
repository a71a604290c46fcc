"""What ``compare`` can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .lineup import METHODS

DEFAULT_RATIO = 0.65
DEFAULT_SIZE = "small"
SIZES = ("tiny", "small", "base")
_MOST_THREADS = 4096  # the thread library ends the process where the system gives it no more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CompareError(ValueError):
    """What was asked for cannot be done; the message names the option, what was expected and what came."""


@dataclass(frozen=True)
class CompareOptions:
    """What to compare; the command line's options by the same names.

    Attributes:
        photos: files and folders; empty: the free photographs of scikit-image.
        models: methods out of ``lineup.METHODS``; the dense baseline is always there.
        size: ``"tiny"``, ``"small"`` or ``"base"``; None: small, and for trained models their files' own.
        trained: folder of model files, each with its own size and weights (see ``find_trained``); ``size`` and
            ``checkpoints`` cannot be given beside it. None: random weights, or ``checkpoints``.
        mac_ratio: wanted share of the dense model's multiply-accumulates, in (0, 1]; None: 0.65, and for trained models
            as their files have it.
        batch: images run at once.
        dtype: ``"float32"`` or ``"bfloat16"``.
        device: ``"auto"`` (CUDA if there is one), or what ``torch.device`` takes.
        checkpoints: files by method, or ``"all"``.
        overrides: fields of the backbone and of the methods, by name.
        labels: the class folder that belongs to each output, in order; None: the sorted folders.
        out: folder for pictures, chart and JSON; None: none are made.
        rounds: timings of each model.
        threads: of PyTorch's CPU operators; None: as it is.
        seed: of random weights.
        sample: photographs to calibrate on and to time, at most; at least a batch is taken.
    """

    photos: tuple[str, ...] = ()
    models: tuple[str, ...] = METHODS
    size: str | None = None
    trained: str | None = None
    mac_ratio: float | None = None
    batch: int = 8
    dtype: str = "float32"
    device: str = "auto"
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    out: str | None = None
    rounds: int = 10
    threads: int | None = None
    seed: int = 0
    sample: int = 16

    def __post_init__(self) -> None:
        for name in self.models:
            _one_of("models", name, METHODS)
        for name in self.checkpoints:
            _one_of("checkpoints", name, (*METHODS, "all"))
        if self.size is not None:
            _one_of("size", self.size, SIZES)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        if self.trained is not None and self.checkpoints:
            raise CompareError("checkpoints must be empty beside trained models, which have weights of their own")
        if self.trained is not None and self.size is not None:
            raise CompareError(f"size must be None beside trained models, which have their own, got {self.size!r}")
        if self.mac_ratio is not None and not 0 < self.mac_ratio <= 1:
            raise CompareError(f"mac_ratio must be in (0, 1], got {self.mac_ratio}")
        for name in ("batch", "rounds", "threads", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CompareError(f"{name} must be >= 1, got {value}")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise CompareError(f"threads must be in [1, {_MOST_THREADS}], got {self.threads}")

    @property
    def wanted_size(self) -> str:
        """Of models that are not trained ones."""
        return DEFAULT_SIZE if self.size is None else self.size

    @property
    def wanted_ratio(self) -> float | None:
        """What to calibrate to; None: nothing."""
        return DEFAULT_RATIO if self.mac_ratio is None and self.trained is None else self.mac_ratio


def find_device(name: str) -> torch.device:
    """The device by its name; ``"auto"``: CUDA if there is one.

    Raises:
        CompareError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise CompareError(
            f"device must be auto, cpu or a CUDA device that is there, got {name!r}: {reason}"
        ) from error
    return device


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CompareError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
