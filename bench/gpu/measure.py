"""Times, each kind apart: between device events, of a replayed CUDA graph, and on the host before the device is done.

Between two calls a buffer larger than any L2 cache is written, so that no call finds its data in the cache; it also
keeps the device busy while the host submits, so that device times hold no launch gaps of short calls. All candidates
run in turn, in an order that rotates. On a CPU there is one kind: wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from stage import in_words
from torch import Tensor

WARM_UP_RUNS = 3
FLUSH_BYTES = 256 * 2**20
Run = Callable[[], Any]


def compare(
    runs: Mapping[str, Run], device: torch.device, rounds: int, whole: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each candidate (median and quartiles), and its peak memory; an error in words where it has none.

    Args:
        runs: candidates by name.
        rounds: how often each runs in each kind of timing.
        whole: candidates that replay a graph themselves, which no other graph can hold.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM_UP_RUNS):
                run()
            found[name] = _peak(run, device)
        except Exception as error:
            found[name] = {"error": in_words(error)}
    live = {name: run for name, run in runs.items() if "error" not in found[name]}
    for name, values in _in_turn(live, device, rounds).items():
        found[name]["ms"] = _spread(values)
    if device.type != "cuda":
        return found
    for name, values in _host(live, rounds).items():
        found[name]["host_ms"] = _spread(values)
    graphs: dict[str, Run] = {}
    for name in (name for name in live if name not in whole):
        try:
            graphs[name] = graph_of(live[name]).replay
        except Exception as error:
            found[name]["graph_error"] = in_words(error)
    for name, values in _in_turn(graphs, device, rounds).items():
        found[name]["graph_ms"] = _spread(values)
    return found


def graph_of(run: Run) -> torch.cuda.CUDAGraph:
    """A call, warmed up on a side stream and captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def best(times: Mapping[str, Any]) -> float | None:
    """A candidate's fastest way to run, milliseconds."""
    found = [times[kind][0] for kind in ("ms", "graph_ms") if kind in times]
    return min(found, default=None)


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """What this device reaches: bytes read and written by a copy, operations of a product of random bfloat16."""
    size, side = (2**20, 256) if smoke else (2**30, 8192)
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = {
        name: statistics.median(values) / 1e3 for name, values in _in_turn(runs, device, 3 if smoke else 15).items()
    }
    return {
        "gigabytes_a_second": 2 * size / seconds["copy"] / 1e9,
        "teraflops": 2 * side**3 / seconds["product"] / 1e12,
    }


def _in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    names, found = list(runs), {name: [] for name in runs}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for index in range(rounds):
        first = index % max(len(names), 1)
        events = {}
        for name in names[first:] + names[:first]:
            if flush is None:
                start = time.perf_counter()
                runs[name]()
                found[name].append(1e3 * (time.perf_counter() - start))
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            runs[name]()
            end.record()
            events[name] = begin, end
        if events:
            torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            found[name].append(begin.elapsed_time(end))
    return found


def _host(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Until the call returns, with an idle device."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return found


def _peak(run: Run, device: torch.device) -> dict[str, Any]:
    """MiB that one run allocates beyond what was there."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def _spread(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def outputs(result: Any) -> tuple[Tensor, ...]:
    """A call's tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
