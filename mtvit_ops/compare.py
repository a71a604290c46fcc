"""The main job: dense and adaptive transformers on the same photographs, in tokens, operations and milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backend import preferred_backend
from .calibrate import Calibration, calibrate
from .compare_options import DTYPES, CompareError, CompareOptions, find_device
from .environment import environment
from .equality import Equality, check_batches, rounding_tolerance
from .flops import count_batch_macs
from .lineup import BASELINE, Lineup, build_lineup
from .lineup_trained import build_trained
from .nn import VisionTransformer
from .photos import Found, Labels, Photo, Problem, default_photos, find_labels, find_photos
from .progress import Progress
from .reading import PhotoReader
from .timing import PeakMemory, Spread, peak_memory, spread, time_interleaved


class ModelResult(NamedTuple):
    """One model's row."""

    name: str
    tokens_per_block: tuple[float, ...]  # mean over the timed images, class token included
    macs: float  # multiply-accumulates per image, mean over the timed images
    mac_ratio: float  # adaptive over dense
    milliseconds: Spread  # per image
    rounds: tuple[float, ...]  # milliseconds per image in each round
    speed_up: float  # dense median over this median
    speed_up_spread: Spread  # by this model's quartiles
    realised_fraction: float
    peak_memory: PeakMemory  # of one batch
    top1: float | None  # share of right answers
    calibration: Calibration | None  # None: the dense model
    equality: Equality


@dataclass(frozen=True)
class CompareResult:
    """Everything measured; ``report`` writes it down."""

    options: CompareOptions
    models: str  # what they are, in a few words
    rows: tuple[ModelResult, ...]
    num_photos: int
    num_timed: int
    num_sample: int
    device: str
    labels: str  # where they come from, or why there are none
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]  # files that could not be used
    environment: Mapping[str, Any]
    pictures: tuple[Path, ...] = ()


def realised_fraction(dense_time: float, time: float, dense_macs: float, macs: float) -> float:
    """How much of the saving on paper arrives on the clock: (dense / adaptive time) / (dense / adaptive operations)."""
    return (dense_time / time) / (dense_macs / macs)


_UNTRAINED = "untrained weights: the choices of tokens mean nothing"
Build = Callable[..., Lineup]


def run_compare(options: CompareOptions, progress: Progress | None = None, build: Build | None = None) -> CompareResult:
    """Calibrate, check, time and trace the models on the photographs.

    Args:
        options: what to compare.
        progress: told about every stage.
        build: makes the models; takes what ``build_lineup`` takes. None: that, or the folder of trained models.

    Raises:
        CompareError: an option that cannot be met, or no photograph that can be read.
        UnequalError: a model does not compute what its masked twin computes; nothing has been timed then.
        ImportError: an optional package is missing; the message names it.
    """
    progress = progress or Progress()
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return _run(options, progress, build)
    finally:
        torch.set_num_threads(threads)


def _run(options: CompareOptions, progress: Progress, build: Build | None) -> CompareResult:
    device = find_device(options.device)
    facts = environment()
    found = find_photos(options.photos) if options.photos else default_photos()
    problems = list(found.problems)
    for problem in problems:
        progress.say(f"{problem.path}: {problem.reason}")
    if not found.files:
        raise CompareError("photos: nothing to read is left")
    _keep_apart(options.out, found)
    try:
        preferred_backend()
        lineup = _build_models(options, device, build)
    except (ValueError, TypeError) as error:
        raise CompareError(str(error)) from error
    models = lineup.models
    dense = models[BASELINE]
    if dense.config.in_chans != 3:
        raise CompareError(f"override 'in_chans' must be 3, as photographs are in colour, got {dense.config.in_chans}")
    reader = PhotoReader(dense.config.img_size, progress, problems)
    sample = reader.sample(found.files, max(options.sample, options.batch))
    if not sample:
        raise CompareError(f"photos: none of the {len(found.files)} files can be read as a picture")

    def to_batch(photos: Sequence[Photo]) -> Tensor:
        return torch.stack([photo.pixels for photo in photos]).to(device, DTYPES[options.dtype])

    # every batch is full: photographs come again where there are too few
    wanted = math.ceil(len(sample) / options.batch) * options.batch
    timed = [sample[index % len(sample)] for index in range(wanted)]
    batches = [to_batch(timed[start : start + options.batch]) for start in range(0, wanted, options.batch)]
    images = to_batch(sample)

    calibrations: dict[str, Calibration] = {}
    adaptive = [name for name in models if name != BASELINE]
    if options.wanted_ratio is not None:
        for name in progress.track(adaptive, "calibrating"):
            calibrations[name] = calibrate(models[name], images, options.wanted_ratio)
    tolerance = rounding_tolerance(dense, images[:4])
    equalities: dict[str, Equality] = {}
    for name in progress.track(list(models), "checking that removal equals masking, and batch equals alone"):
        equalities[name] = check_batches(name, models[name], batches, tolerance)

    counted = {name: _count(model, batches) for name, model in models.items()}
    memory = {name: peak_memory(partial(model, batches[0]), device) for name, model in models.items()}
    runs = {name: partial(_run_all, model, batches) for name, model in models.items()}
    seconds = time_interleaved(runs, options.rounds, device, progress)
    right, pictures, num_photos, labels = _every_photo(options, found, lineup, reader, to_batch, progress)

    def row(name: str) -> ModelResult:
        rounds = tuple(1e3 * value / wanted for value in seconds[name])
        dense_rounds = tuple(1e3 * value / wanted for value in seconds[BASELINE])
        time, dense_time = spread(rounds), spread(dense_rounds)
        macs, tokens = counted[name]
        dense_macs = counted[BASELINE][0]
        return ModelResult(
            name=name,
            tokens_per_block=tokens,
            macs=macs,
            mac_ratio=macs / dense_macs,
            milliseconds=time,
            rounds=rounds,
            speed_up=dense_time.median / time.median,
            speed_up_spread=Spread(
                dense_time.median / time.median, dense_time.median / time.high, dense_time.median / time.low
            ),
            realised_fraction=realised_fraction(dense_time.median, time.median, dense_macs, macs),
            peak_memory=memory[name],
            top1=None if right is None else right[name] / num_photos,
            calibration=calibrations.get(name),
            equality=equalities[name],
        )

    notes = [*lineup.notes, "the baseline 'vit' is this package's dense ViT."]
    notes += _load_notes(facts)
    notes += _sampling_notes(options, len(sample), wanted, num_photos)
    notes += _calibration_notes(calibrations)
    notes.append(f"top-1 not shown: {labels.reason}." if right is None else f"top-1 labels: {labels.reason}.")
    if found.ignored:
        names = ", ".join(path.name for path in found.ignored[:3])
        notes.append(f"{len(found.ignored)} files in folders are no pictures by their names: {names}, ...")
    return CompareResult(
        options,
        lineup.setting,
        tuple(row(name) for name in models),
        num_photos,
        wanted,
        len(sample),
        str(device),
        labels.reason,
        tuple(notes),
        tuple(problems),
        {**facts, "threads": torch.get_num_threads()},
        tuple(pictures),
    )


def _build_models(options: CompareOptions, device: torch.device, build: Build | None) -> Lineup:
    dtype = DTYPES[options.dtype]
    if build is None and options.trained is not None:
        return build_trained(options.trained, options.models, options.overrides, device, dtype)
    given = options.models, options.wanted_size, options.checkpoints, options.overrides, options.seed, device, dtype
    return (build or build_lineup)(*given)


def _keep_apart(out: str | None, found: Found) -> None:
    """Pictures have their photographs' names: they would be written over them."""
    if out is None:
        return
    folder = Path(out).resolve()
    for file in found.files:
        if folder in (file.path.absolute().parent.resolve(), file.path.resolve().parent):
            raise CompareError(f"out must be a folder that holds none of the photographs, got {out!r} with {file.path}")


def _every_photo(
    options: CompareOptions,
    found: Found,
    lineup: Lineup,
    reader: PhotoReader,
    to_batch: Callable[[Sequence[Photo]], Tensor],
    progress: Progress,
) -> tuple[dict[str, int] | None, list[Path], int, Labels]:
    """Right answers of each model (where labels are known), pictures written, photographs read, and the labels."""
    from .viz import PictureWriter

    models = lineup.models
    names = options.labels or lineup.classes or None
    labels = find_labels(found.files, models[BASELINE].config.num_classes, names)
    right = dict.fromkeys(models, 0) if labels.indices is not None else None
    writer = (
        None
        if options.out is None
        else PictureWriter(Path(options.out), models, _UNTRAINED if lineup.untrained else "", lineup.class_names)
    )
    read = 0
    starts = range(0, len(found.files), options.batch)
    for start in progress.track(starts, "all photographs, batches"):
        files = found.files[start : start + options.batch]
        good = [(index, photo) for index, file in enumerate(files) if (photo := reader.read(file)) is not None]
        read += len(good)
        if not good or (right is None and writer is None):
            continue
        images = to_batch([photo for _, photo in good])
        with torch.inference_mode():
            outputs = {name: model(images, return_trace=True) for name, model in models.items()}
        if right is not None and labels.indices is not None:
            truth = torch.tensor([labels.indices[start + index] for index, _ in good])
            for name, (logits, _) in outputs.items():
                right[name] += int((logits.argmax(dim=1).cpu() == truth).sum())
        if writer is not None:
            for place, (_, photo) in enumerate(good):
                try:
                    writer.write(photo, images[place : place + 1], outputs, place)
                except OSError as error:
                    raise CompareError(f"out: cannot write the picture of {photo.file.path}: {error}") from error
    return right, [] if writer is None else writer.written, read, labels


def _run_all(model: VisionTransformer, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model(batch)


def _count(model: VisionTransformer, batches: Sequence[Tensor]) -> tuple[float, tuple[float, ...]]:
    """Multiply-accumulates per image, and tokens entering each block, means over all images."""
    macs = sum(count_batch_macs(model, batch) for batch in batches) / len(batches)
    with torch.inference_mode():
        traces = [model(batch, return_trace=True)[1] for batch in batches]
    tokens = torch.cat([trace.tokens_per_block for trace in traces], dim=1).double().mean(dim=1)
    return macs, tuple(tokens.tolist())


def _load_notes(facts: Mapping[str, Any]) -> list[str]:
    load = facts["load_average"]
    if load is None or load[0] < 0.5 * facts["usable_cpus"]:
        return []
    return [
        f"other work was running (load average {load[0]:.1f} on {facts['usable_cpus']} CPUs before the start):"
        " times are longer and more spread than on a quiet machine."
    ]


def _sampling_notes(options: CompareOptions, sample: int, timed: int, read: int) -> list[str]:
    notes = []
    if sample < read:
        notes.append(f"calibrated and timed on {sample} of {read} photographs, spread over the list (--sample).")
    if timed > sample:
        notes.append(f"timed on {timed} images: photographs come again to fill batches of {options.batch}.")
    return notes


def _calibration_notes(calibrations: Mapping[str, Calibration]) -> list[str]:
    return [
        f"{name}: the nearest MAC ratio these photographs allow is {done.mac_ratio:.3f}, asked for {done.target:g}."
        for name, done in calibrations.items()
        if abs(done.mac_ratio - done.target) > 0.01
    ]
