"""Stage: the tests that need a GPU, each file in a process of its own, several at a time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stage import ROOT, Stage

# file or folder, and which of its tests; the file on graphs is chosen by what it skips on its own
WHAT = (
    ("tests/test_graph.py", None),
    ("tests/kernels/test_no_sync.py", None),
    ("tests/ops", "cuda"),
    ("tests/methods", "cuda"),
)
SMOKE = (("tests/reference/test_scatter_residual.py", None),)


def files(what: tuple[tuple[str, str | None], ...]) -> list[tuple[Path, str | None]]:
    """Test files, the long ones first."""
    found = []
    for name, expression in what:
        path = ROOT / name
        paths = sorted(path.glob("test_*.py"), key=lambda file: -file.stat().st_size) if path.is_dir() else [path]
        found += [(each, expression) for each in paths if each.is_file()]
    return found


def run(path: Path, expression: str | None, seconds: float) -> dict[str, Any]:
    """Counts and failures of one file."""
    command = [sys.executable, "-m", "pytest", str(path), "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
    command += ["-k", expression] if expression else []
    start = time.monotonic()
    row: dict[str, Any] = {"table": "tests", "file": str(path.relative_to(ROOT))}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1), check=False, env=environment()
        )
        said = done.stdout + done.stderr
        row["code"] = done.returncode  # 5: nothing was selected
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        row["code"] = "out of time"
    row["seconds"] = time.monotonic() - start
    for word in ("passed", "failed", "skipped", "error"):
        found = re.findall(rf"(\d+) {word}", said)
        row[word] = int(found[-1]) if found else 0
    row["failures"] = [line[:400] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))][:30]
    if row["code"] not in (0, 1, 5):
        row["tail"] = said[-1500:]
    return row


def environment() -> dict[str, str]:
    """One thread each: the processes share the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    stage = Stage(__doc__)
    if importlib.util.find_spec("pytest") is None:
        stage.emit(table="tests", file="-", code="pytest is not installed")
        raise SystemExit(0)
    todo = files(SMOKE if stage.smoke else WHAT)
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        # those that wait for a place get what is left of the stage's time, less what ending takes
        jobs = [pool.submit(lambda job=job: run(*job, stage.time_left() - 5)) for job in todo]
        for job in jobs:
            stage.emit(**job.result())
