"""Stage: compute-sanitizer over one call of every op: bad memory accesses, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from stage import Stage, run_within

TOOLS = ("memcheck", "racecheck")
ERRORS_FOUND = 9  # an exit code that Python does not use


def watch(tool: str, stage: Stage, seconds: float, prefix: list[str]) -> dict[str, Any]:
    """One run of the calls under a tool."""
    rows = stage.out.with_suffix(f".{tool}")
    command = [*prefix, sys.executable, str(Path(__file__).with_name("sanitized.py")), "--out", str(rows)]
    command += ["--seconds", str(seconds - 5)] + ["--smoke"] * stage.smoke
    # every tensor an allocation of its own: the caching allocator would hide what runs over its end
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said, code = run_within(seconds, command, environment)
    note = {0: "ok", ERRORS_FOUND: "errors found", None: "out of time"}.get(code, f"exit code {code}")
    watched = len(rows.read_text().splitlines()) if rows.is_file() else 0
    rows.unlink(missing_ok=True)
    return {"tool": tool, "result": note, "calls": watched, "said": "" if note == "ok" else said[-3000:]}


if __name__ == "__main__":
    stage = Stage(__doc__)
    found = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if stage.smoke or stage.device.type != "cuda":
        stage.emit(table="sanitize", **watch("nothing", stage, stage.time_left(), []))
        raise SystemExit(0)
    for index, tool in enumerate(TOOLS):
        if found is None:
            stage.emit(table="sanitize", tool=tool, result="compute-sanitizer is not installed", calls=0, said="")
            continue
        prefix = [found, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND)]
        stage.emit(table="sanitize", **watch(tool, stage, stage.time_left() / (len(TOOLS) - index), prefix))
