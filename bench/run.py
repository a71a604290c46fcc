"""Run the CPU benchmarks and write their tables: ``make bench``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cpu_tables import tables

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds, results thrown away")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each comparison (default %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, in turn (default 1 2)")
    parser.add_argument("--only", default="", help="pytest -k expression: a part, the rest stays as it is")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu", help="folder of cpu.json and cpu.md")
    options = parser.parse_args()
    before = None  # with --only the rest stays as it was measured
    if options.only and (options.out / "cpu.json").is_file():
        before = json.loads((options.out / "cpu.json").read_text())
        here, there = ((facts["cpu"], facts["isa"]) for facts in (machine(), before["machine"]))
        if here != there and not options.smoke:
            parser.error(f"--only needs an --out of this CPU, {here}, got one of {there}")
    rows = []
    for threads in options.threads:
        measured = run(options, threads)
        if measured is None:
            return 1
        rows += measured
    facts = machine()
    rows = [{**row, "commit": facts["commit"]} for row in rows]
    if before is not None:
        rows = list({identity(row): row for row in (*before["rows"], *rows)}.values())
    result = {"schema": 2, "machine": facts, "rows": rows}
    text = tables(result)
    print(text)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / "cpu.json", json.dumps(result, indent=1) + "\n")
        write(options.out / "cpu.md", text)
    return 0


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """The same for two measurements of one thing."""
    return tuple(row.get(name) for name in ("table", "size", "op", "dtype", "batch", "tokens", "threads"))


def run(options: argparse.Namespace, threads: int) -> list[dict[str, Any]] | None:
    """What each comparison recorded; None where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q"]
        command += [f"--benchmark-json={raw}", "--benchmark-columns=median"]
        command += [f"--rounds={options.rounds}", f"--threads={threads}"]
        command += ["--smoke"] if options.smoke else []
        command += ["-k", options.only] if options.only else []
        if subprocess.run(command, check=False).returncode != 0:
            return None
        return [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]]


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    import mtvit_ops

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": mtvit_ops.build_info().get("isa"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "mtvit_ops": mtvit_ops.__version__,
        "commit": commit(),
        "load": os.getloadavg()[0],
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")  # results are no code
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def write(path: Path, text: str) -> None:
    """All or nothing."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    raise SystemExit(main())
