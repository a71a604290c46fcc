"""Everything there is to know on a GPU, in one command of at most ten minutes.

Builds the extension, runs the tests that need a GPU, checks what ops and models promise (no wait for the device, CUDA
graphs, the same bits twice), lets compute-sanitizer watch, and measures ops and models beside honest baselines. Each
stage is a process with a budget of its own; results are on disk within seconds of being made, so that a killed run
loses nothing. Stages that were not asked for keep the results that the file already holds. On a machine without a GPU
every stage says that it is skipped, and the exit code is 0; it is 1 where a stage or a test failed.

A stage's seconds are its limit: what it does not need is left to those behind it. Where kernels are compiled for the
first time, all stages want more than one command may take. Three commands, while the machine keeps what was compiled:
`--stages build tests promises --seconds 400`, `--stages sanitize ops --seconds 280`, `--stages models --seconds 560`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "gpu"))

from tables import render  # noqa: E402

# name: script, seconds
STAGES = {
    "build": ("build_extension.py", 100),  # a build cut short is worth nothing
    "tests": ("run_tests.py", 150),
    "promises": ("promises.py", 60),
    "sanitize": ("sanitize.py", 60),
    "ops": ("time_ops.py", 90),
    "models": ("time_models.py", 190),
}
BUDGET = 570  # seconds in all
NO_DEVICE = "skipped: PyTorch sees no CUDA device on this machine"
EVERY = 2.0  # seconds between two looks at a running stage


def main() -> int:
    options = _parser().parse_args()
    end = time.monotonic() + options.budget
    wants_device = not options.smoke
    idle = wants_device and not torch.cuda.is_available()
    result = {"schema": 1, "smoke": options.smoke, "machine": machine(options.commit), "stages": {}}
    kept = options.out / "gpu.json"
    if kept.is_file() and not options.smoke and not idle:
        result["stages"] = json.loads(kept.read_text())["stages"]
    for name in options.stages:
        if idle:
            result["stages"][name] = {"status": NO_DEVICE, "seconds": 0.0, "rows": []}
            print(f"{name}: {NO_DEVICE}", flush=True)
        else:
            left = end - time.monotonic()
            run_stage(name, min(options.seconds or STAGES[name][1], left), options.smoke, result, options.out)
            print(f"{name}: {result['stages'][name]['status']}", flush=True)
    if not idle:
        write(result, options.out)
        print(render(result))
    return int(any(failed(result["stages"][name]) for name in options.stages))


def run_stage(name: str, seconds: float, smoke: bool, result: dict[str, Any], out: Path) -> None:
    """Run one stage, with what it has found so far on disk all the while."""
    # its commit too: stages that were not asked for may be older
    commit = result["machine"].get("commit", "unknown")
    stage: dict[str, Any] = {"status": "running", "seconds": 0.0, "commit": commit, "rows": []}
    result["stages"][name] = stage
    if seconds < 5:
        stage["status"] = "skipped: no time was left"
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, str(HERE / "gpu" / STAGES[name][0]), "--out", str(rows)]
        command += ["--seconds", str(seconds - 3)] + ["--smoke"] * smoke
        with log.open("w") as said:
            process = subprocess.Popen(
                command, cwd=HERE.parent, stdout=said, stderr=said, env=environment(), start_new_session=True
            )
            while process.poll() is None and time.monotonic() - start < seconds:
                time.sleep(min(EVERY, 0.1 if smoke else EVERY))
                stage.update(rows=read(rows), seconds=time.monotonic() - start)
                write(result, out)
        ended = process.poll() is not None
        stop(process)
        stage.update(rows=read(rows), seconds=time.monotonic() - start)
        if not ended:
            stage["status"] = "out of time"
        elif process.returncode:
            stage["status"] = f"failed: exit code {process.returncode}"
            stage["log"] = log.read_text(errors="replace")[-4000:]
            print(stage["log"], file=sys.stderr)
        else:
            stage["status"] = "done"
    write(result, out)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed(stage: dict[str, Any]) -> bool:
    """Whether something is wrong with the code, rather than missing or out of time."""
    broken = any(row.get("failed") or row.get("error") for row in stage["rows"] if row["table"] == "tests")
    raced = any(row["result"] == "errors found" for row in stage["rows"] if row["table"] == "sanitize")
    return broken or raced or stage["status"].startswith("failed")


def read(path: Path) -> list[dict[str, Any]]:
    """Whole rows; one that is being written waits for the next look."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def write(result: dict[str, Any], out: Path) -> None:
    """Both files, all or nothing."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(result, indent=1) + "\n"), ("gpu.md", render(result))):
        part = out / f"{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def environment() -> dict[str, str]:
    """Stages import the package of this checkout, built or not."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def machine(commit: str | None) -> dict[str, str]:
    """Where and with what this ran."""
    facts = {
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "",
        "Triton": version("triton"),
        "timm": version("timm"),
        "Python": platform.python_version(),
    }
    return {**facts, "commit": commit or described()}


def described() -> str:
    """This commit, as git has it."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
        )
    except OSError:  # a machine that got a copy of the files need not have git
        return "unknown"
    return asked.stdout.strip() or "unknown"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all, in this order")
    add("--budget", type=float, default=BUDGET, help="seconds in all (default %(default)s)")
    add("--seconds", type=float, help="seconds of each stage; default: " + str({n: s for n, (_, s) in STAGES.items()}))
    add("--out", type=Path, default=HERE / "results" / "gpu", help="folder of gpu.json and gpu.md")
    add("--commit", help="what to call this code where git cannot say")
    add("--smoke", action="store_true", help="tiny sizes, on the CPU too: proves that every stage runs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
