"""The folder of a run: what is in it, and whether a training may go on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import check_writable, write_atomically
from .images import ImageSet
from .processes import Processes
from .recipe import Recipe, RecipeError, load_recipe
from .state import TrainError, TrainState, load_state

STATE, BEST, LAST, RECIPE = "state.pt", "best.safetensors", "last.safetensors", "recipe.json"
# what may change in between, for nothing follows from it; a state holds whole tensors, whoever wrote it
_FREE = ("title", "data.workers", "run.sharding", "run.log_steps", "run.save_steps")


def describe_images(images: ImageSet) -> str:
    """Which images a set holds, in words that differ where they differ."""
    text = "\n".join(f"{target} {name}" for target, name in zip(images.targets, images.names))
    return f"{len(images)}, SHA-256 {hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:16]}"


def find_state(out: Path, recipe: Recipe, resume: bool) -> TrainState | None:
    """The state to go on from, or None."""
    path = out / STATE
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder or a place for one, got the file {out}")
    if not resume:
        there = [name for name in (STATE, BEST, LAST) if (out / name).exists()]
        if there:
            raise ValueError(f"out must be a folder without a training, or resume be asked for: {out} has {there[0]}")
    if not path.exists():
        return None
    state = load_state(path)
    for place, was, now in _differences(_in_full(state.recipe), recipe.to_dict()):
        if place not in _FREE:
            raise TrainError(f"{path} is of another recipe: {place} was {was!r} and is {now!r}")
    return state


def check_shared(out: Path, state: TrainState | None, processes: Processes) -> None:
    """Refuse to go on where processes found different states, as those of a machine with a folder of its own do."""
    # the time tells states of one step apart
    own = "no state" if state is None else f"the state of step {state.step}, {state.seconds:.3f} s"
    first, *others = processes.gather(own)
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                f"out must be one folder that all processes share, got {out}, where process 0 found {first}, and"
                f" process {rank} found {other}"
            )


def _in_full(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of options that there were not yet when it was written down."""
    try:
        return load_recipe(recipe).to_dict()
    except RecipeError:  # it has some that there are no more: that is told as a difference
        return recipe


def _differences(was: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*was, *now}):
            yield from _differences(was.get(key), now.get(key), f"{place}.{key}".lstrip("."))
    elif was != now:
        yield place, was, now


def check_folder(out: Path) -> None:
    """Prove that the folder can be made, or written, and leave nothing."""
    try:
        place = out.absolute()
        while not place.exists() and place != place.parent:  # a drive may be missing
            place = place.parent
        check_writable(place / STATE)
    except OSError as error:
        raise TrainError(f"cannot write to {out}: {error}") from error


def prepare_folder(out: Path, recipe: Recipe) -> None:
    """Make the folder, prove that it can be written, and clear what a killed process left half written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (STATE, BEST, LAST, RECIPE, "metrics.jsonl"):
            for left in out.glob(f".{name}.*"):
                left.unlink()
        text = json.dumps(recipe.to_dict(), indent=1).encode()
        write_atomically(out / RECIPE, lambda file: file.write(text))
    except OSError as error:
        raise TrainError(f"cannot write to {out}: {error}") from error
