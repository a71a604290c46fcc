"""Propose launch configurations from times on the GPU that is here; whoever commits one to kernels/_launch.py decides.

Each file of kernels gets its samples (launches.py), once under the present configuration and once under each of a few
others (configurations.py). What computes something else, or does not compile, is not timed. Times are bench/gpu's: all
configurations in turn, device events and CUDA graphs, cold L2 cache. Without a GPU the exit code is 2; --list shows the
configurations anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from configurations import CONFIGURATIONS, Names, in_force
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mtvit_ops.environment import checkout_commit
from mtvit_ops.testing import assert_close_to_float64, assert_equal

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench" / "gpu"))
import launches
from measure import best, compare
from promises import filled, tensors_of
from stage import ROOT, in_words

PRESENT = "present"
WORTH = 1.03  # below it a proposal is noise


def runs_of(stem: str, launcher: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """A launch under each configuration."""

    def run(names: Names) -> Any:
        with in_force(names):
            return launcher(*args)

    configurations = {PRESENT: {}, **CONFIGURATIONS[stem]}
    return {text: lambda names=names: run(names) for text, names in configurations.items()}


def results(run: Callable[[], Any], launcher: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a launch gives; of one in place also what it left, whose old values come back."""
    if not launcher.__name__.endswith("_"):
        return tensors_of([run()])
    before = args[0].clone()
    given = [*tensors_of([run()]), args[0].clone()]
    args[0].copy_(before)
    return given


def wrong(got: list[Tensor], wanted: list[Tensor]) -> str | None:
    try:
        for place, (value, present) in enumerate(zip(got, wanted, strict=True)):
            if present.is_floating_point():
                assert_close_to_float64(f"result {place}", value, present.double(), present)
            else:
                assert_equal(f"result {place}", value, present)
    except AssertionError as error:
        return in_words(error)
    return None


def measured(
    stem: str, case: str, launcher: Callable[..., Any], args: tuple[Any, ...], rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each configuration of one sample."""
    args = tree_map_only(Tensor, lambda tensor: filled(tensor, device), args)
    runs, bad = runs_of(stem, launcher, args), {}
    wanted = results(runs[PRESENT], launcher, args)
    for text, run in runs.items():
        try:
            why = wrong(results(run, launcher, args), wanted)
        except Exception as error:  # does not compile, or wants more than a processor has
            why = in_words(error)
        if why is not None:
            bad[text] = {"error": why}
    live = {text: run for text, run in runs.items() if text not in bad}
    found = compare(live, device, rounds)
    present = best(found.get(PRESENT, {}))
    for text, row in {**found, **bad}.items():
        mine = best(row)
        gain = {} if mine is None or present is None else {"gain": present / mine}
        yield {"file": stem, "case": case, "configuration": text, **row, **gain}


def proposals(rows: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Of each file the configuration that gains most over all its cases, and how much; the present one if none does."""
    found = {}
    for stem in dict.fromkeys(row["file"] for row in rows):
        mine = [row for row in rows if row["file"] == stem]
        means = {PRESENT: 1.0}
        for text in CONFIGURATIONS[stem]:
            gains = [row.get("gain") for row in mine if row["configuration"] == text]
            if gains and None not in gains:  # one that fails anywhere is none
                means[text] = math.exp(sum(map(math.log, gains)) / len(gains))
        text = max(means, key=lambda text: means[text])
        found[stem] = (text, means[text]) if means[text] >= WORTH else (PRESENT, 1.0)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| file | case | configuration | ms | over present |", "|---|---|---|---|---|"]
    for row in rows:
        ms = best(row)
        times = f"{ms:.4g} | {row['gain']:.2f}x" if ms is not None and "gain" in row else f"{row.get('error', '')} |"
        lines.append(f"| {row['file']} | {row['case']} | {row['configuration']} | {times} |")
    lines += ["", "| file | proposal | over present |", "|---|---|---|"]
    return "\n".join(lines + [f"| {stem} | {text} | {gain:.2f}x |" for stem, (text, gain) in proposals(rows).items()])


def samples(options: argparse.Namespace) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """A few of each launcher, evenly spaced over the table, as large as they are to be measured."""
    counts = Counter(launcher for _, launcher, _ in launches.table(options.kernels))
    launches.BATCH = options.batch
    seen: Counter[Callable[..., Any]] = Counter()
    for case, launcher, args in launches.table(options.kernels):
        if seen[launcher] % -(-counts[launcher] // options.cases) == 0:
            yield case, launcher, args
        seen[launcher] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kernels", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS), metavar="STEM")
    add("--cases", type=int, default=3, help="samples of a launcher (default %(default)s)")
    add("--batch", type=int, default=256, help="images of a sample (default %(default)s)")
    add("--rounds", type=int, default=30, help="runs of each configuration in each kind of timing")
    add("--seconds", type=float, default=540.0, help="nothing new is begun past these")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "gpu" / "tuning.json")
    add("--commit", default=checkout_commit() or "unknown", help="what to call this code where git cannot say")
    add("--list", action="store_true", help="the configurations, on any machine")
    options = parser.parse_args()
    count = sum(len(CONFIGURATIONS[stem]) for stem in options.kernels)
    plan = f"{count} configurations beside the present ones of {len(options.kernels)} files in kernels/"
    if options.list:
        print(f"On a CUDA device this times {plan}:")
        print("\n".join(f"{stem}: {text}" for stem in options.kernels for text in CONFIGURATIONS[stem]))
        return 0
    if not torch.cuda.is_available():
        print(
            f"tune.py times {plan}: it needs a CUDA device, and PyTorch sees none (--list shows them)", file=sys.stderr
        )
        return 2
    facts = {"device": torch.cuda.get_device_name(), "commit": options.commit, "torch": torch.__version__}
    facts |= {"CUDA": torch.version.cuda, "Triton": triton.__version__, "batch": options.batch}
    end, rows = time.monotonic() + options.seconds, []
    for case, launcher, args in samples(options):
        stem = launcher.__module__.rpartition(".")[2]
        if time.monotonic() > end:
            break
        try:
            rows += measured(stem, case, launcher, args, options.rounds, torch.device("cuda"))
        except Exception as error:  # the present configuration itself
            rows.append({"file": stem, "case": case, "configuration": PRESENT, "error": in_words(error)})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps({**facts, "proposals": proposals(rows), "rows": rows}, indent=1) + "\n")
        os.replace(part, options.out)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), table(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
