"""Comparisons under pytest-benchmark: equality first, then all candidates in turn, then the record."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

# the benches import each other's shapes; the repository root must not hide other packages
sys.path.insert(0, str(Path(__file__).parent))
_ROOT = Path(__file__).parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

from mtvit_ops._timm import allow_other_torchvision  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mtvit_ops bench")
    group.addoption("--smoke", action="store_true", help="tiny sizes, two rounds: proves that the benches run")
    group.addoption("--rounds", type=int, default=30, help="rounds of each comparison")
    group.addoption("--threads", type=int, default=2, help="CPU threads")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm() -> Any:
    """timm, also beside a PyTorch that its torchvision was not built for."""
    allow_other_torchvision()
    return pytest.importorskip("timm", reason="the baseline is timm's ViT: pip install timm")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, smoke: bool) -> Callable[..., dict[str, float]]:
    """Time candidates in turn and record medians and ratios.

    ``compare(runs, subject, short=False, **facts)``: ``runs`` maps names to callables, ``subject`` is the one that
    pytest-benchmark shows, ``short`` runs get ten times the rounds. Returns the seconds of each (median); the record
    holds them, the quartiles, and the paired ratios to the subject (median over rounds of candidate / subject).
    """

    def run(
        runs: Mapping[str, Callable[[], object]], subject: str, short: bool = False, **facts: Any
    ) -> dict[str, float]:
        from mtvit_ops.timing import spread, time_interleaved

        rounds = 2 if smoke else (10 if short else 1) * request.config.getoption("--rounds")
        seconds = time_interleaved(runs, rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        benchmark.extra_info.update(
            facts,
            threads=torch.get_num_threads(),
            rounds=rounds,
            milliseconds={name: [1e3 * value for value in spread(values)] for name, values in seconds.items()},
            times_slower_than_subject={
                name: statistics.median(a / b for a, b in zip(values, seconds[subject]))
                for name, values in seconds.items()
            },
            subject=subject,
        )
        with torch.inference_mode():
            benchmark.pedantic(runs[subject], rounds=2, iterations=1)
        return medians

    return run
