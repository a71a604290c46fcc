"""What a training needs to go on exactly where it was, in one file that is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import write_atomically

VERSION = 1


class TrainError(RuntimeError):
    """A training that cannot start or go on; the message says why and what is safe."""


class TrainState(NamedTuple):
    """Between two steps. Every draw follows from the recipe's seed and ``step``, so no generator is in it."""

    recipe: dict[str, Any]
    step: int  # steps done, over all epochs
    best: float | None  # best top-1 so far
    model: dict[str, Tensor]
    optimiser: dict[str, Any]
    average: dict[str, Tensor] | None  # the moving average of the weights
    sums: dict[str, float]  # terms summed since the last line of the log
    classes: list[str]
    images: str  # which training images, in words that differ where they differ
    method: dict[str, Any]  # the method's configuration, which a file of weights may have set
    seconds: float  # of training and evaluation so far
    teacher: str = ""  # SHA-256 of its file; states from before there were teachers have none
    owed: bool = False  # the evaluation after this step is still to come, and what follows from it


def save_state(path: Path, state: TrainState) -> None:
    """Write a state atomically: whatever happens, the file holds the old state or the new one.

    Raises:
        TrainError: the file cannot be written; what was there is untouched.
    """
    content = {"version": VERSION, **state._asdict()}
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        kept = "the last state is intact" if path.exists() else "there is no earlier one"
        raise TrainError(f"cannot save {path}: {error}; {kept}") from error


def load_state(path: Path) -> TrainState:
    """Read a state.

    Raises:
        TrainError: the file cannot be read, or is none of this version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a file that is no pickle fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"{path} is not a training's state: {reason}") from error
    if not isinstance(content, dict) or content.pop("version", None) != VERSION:
        raise TrainError(f"{path} is not a training's state of version {VERSION}")
    if {*content, *TrainState._field_defaults} != set(TrainState._fields):
        raise TrainError(f"{path} is not a training's state: it holds {', '.join(sorted(content))}")
    return TrainState(**content)
