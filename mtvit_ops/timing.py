"""Fair times and memory: all models in turn in one process, never one after the other."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .progress import Progress

WARM_UP_ROUNDS = 2  # the first allocates


class Spread(NamedTuple):
    """Middle and quartiles of repeated measurements."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def spread(values: list[float] | tuple[float, ...]) -> Spread:
    """Median and quartiles; a single value is all three."""
    if not values:
        raise ValueError("values must hold at least one measurement, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def time_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds of each run in each round, under ``torch.inference_mode``.

    Every round runs everything, in an order that changes, so that heat, clock changes and neighbours on the machine
    fall on all alike; each twice, of which the second counts: as when serving, a run finds in the caches what its own
    kind left there, not what its rival did.

    Args:
        runs: what to time, by name.
        rounds: how often, >= 1; rounds to warm up come on top.
        device: waited for before and after each run; None: nothing to wait for.
        progress: told about each round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(WARM_UP_ROUNDS):
            for run in runs.values():
                run()
        for index in (progress or Progress()).track(range(rounds), "timing, rounds"):
            first = index % len(names)
            order = names[first:] + names[:first]
            for name in order if index % 2 == 0 else reversed(order):
                runs[name]()
                _wait(device)
                start = time.perf_counter()
                runs[name]()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: tuple(values) for name, values in seconds.items()}


class PeakMemory(NamedTuple):
    """The most memory that tensors held during a run, beyond what they held before it."""

    bytes: int
    how: str


def peak_memory(run: Callable[[], object], device: torch.device) -> PeakMemory:
    """Measure one run under ``torch.inference_mode``.

    Weights and inputs, which are there before, do not count. On the CPU, PyTorch's profiler reports every allocation
    and release of tensor memory, those inside native operators included; scratch space that libraries such as oneDNN
    allocate on their own is not seen. On CUDA it is the allocator's own peak.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            run()
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return PeakMemory(torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated")
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _no_kineto_lines(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):  # stable: ties stay in the order they came
        held += change
        peak = max(peak, held)
    return PeakMemory(peak, "tensor allocations reported by torch.profiler; not what native operators keep")


@contextmanager
def _no_kineto_lines() -> Iterator[None]:
    """PyTorch's profiler writes its starts and stops straight to file 2, and no setting stops it once it is loaded."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
