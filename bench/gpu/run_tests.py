"""Stage: the tests that need a GPU, shared out to as many processes as the machine has cores for their compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from outcomes import FILE_VARIABLE
from stage import ROOT, Stage, run_within

# the files on graphs and waits are chosen by what they skip on their own
WHAT = (
    "tests/test_graph.py",
    "tests/kernels/test_no_sync.py",
    "tests/nn/test_triton_models.py",
    "tests/ops",
    "tests/methods",
)
CHOSEN = "cuda or test_graph or test_no_sync"
SMOKE = ("tests/reference/test_scatter_residual.py",)
TEST_SECONDS = 60  # a kernel that never ends costs one test


def files(what: tuple[str, ...]) -> list[str]:
    """Test files, the long ones first."""
    paths = [ROOT / name for name in what]
    groups = [sorted(path.glob("test_*.py"), key=lambda file: -file.stat().st_size) or [path] for path in paths]
    return [str(path.relative_to(ROOT)) for group in groups for path in group]


def installed(plugin: str) -> bool:
    return importlib.util.find_spec(plugin) is not None


def command(stage: Stage) -> list[str]:
    start = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "outcomes"]
    if stage.smoke:
        return [*start, *files(SMOKE)]
    if installed("pytest_timeout"):
        start += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    if installed("xdist"):
        start += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    return [*start, "-k", CHOSEN, *files(WHAT)]


def environment(outcomes: Path) -> dict[str, str]:
    """One thread each: the processes share the machine."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    # a suite that a test started is no worker of that test's own pytest-xdist
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        FILE_VARIABLE: str(outcomes),
    }


def rows(outcomes: list[dict[str, str]], code: int | str) -> list[dict[str, Any]]:
    """Counts and failures of each file."""
    found: dict[str, dict[str, Any]] = {}
    for each in outcomes:
        name = each["test"].split("::")[0]
        counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        row = found.setdefault(name, {"table": "tests", "file": name, **counts, "code": code, "failures": []})
        row[each["outcome"]] += 1
        if each["why"] and len(row["failures"]) < 30:
            row["failures"].append(f"{each['test']}: {each['why']}"[-800:])
    return list(found.values())


if __name__ == "__main__":
    stage = Stage(__doc__)
    if not installed("pytest"):
        stage.emit(table="tests", file="-", code="pytest is not installed")
        raise SystemExit(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        said, code = run_within(stage.time_left() - 5, command(stage), environment(path))
        outcomes = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for row in rows(outcomes, "out of time" if code is None else code):
        stage.emit(**row)
    if code not in (0, 1, None):  # pytest itself had trouble
        stage.emit(table="tests", file="-", code=code, error=1, tail=said[-1500:])
