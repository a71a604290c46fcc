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

HERE = Path(__file__).parent
TARGETS = {
    "dense": "dense (ours) >= 1.0x timm's speed",
    "realised": "realised fraction >= 0.90",
    "float32": "varlen_attention >= 1.0x the SDPA loop in float32",
    "bfloat16": "varlen_attention >= 1.5x the SDPA loop in bfloat16",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds, results thrown away")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each comparison (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--only", default="", help="pytest -k expression: a part of the benchmarks")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu", help="folder of cpu.json and cpu.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE),
            "-q",
            f"--benchmark-json={raw}",
            "--benchmark-columns=median",
        ]
        command += [f"--rounds={options.rounds}", f"--threads={options.threads}"]
        command += ["--smoke"] if options.smoke else []
        command += ["-k", options.only] if options.only else []
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            return code
        rows = [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]]
    result = {"schema": 1, "machine": machine(), "targets": TARGETS, "rows": rows}
    text = tables(result)
    print(text)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / "cpu.json", json.dumps(result, indent=1) + "\n")
        write(options.out / "cpu.md", text)
    return 0


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
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def tables(result: dict[str, Any]) -> str:
    """Markdown: conditions, then a table each for models, attention and ops."""
    facts, rows = result["machine"], result["rows"]
    threads = sorted({row["threads"] for row in rows})
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {' and '.join(map(str, threads))} threads, {facts['isa']}; torch"
        f" {facts['torch']}, timm {facts['timm']}, mtvit_ops {facts['mtvit_ops']} at {facts['commit']}. Random weights,"
        " inference, our linear weights packed (`pack_weights`), timm as it is; all columns of a row timed in turn in"
        f" one process, medians of {rows[0]['rounds']} rounds, ratios paired by round.",
        "",
    ]
    lines += model_table([row for row in rows if row["table"] == "models"])
    lines += attention_table([row for row in rows if row["table"] == "attention"])
    lines += op_table([row for row in rows if row["table"] == "ops"])
    return "\n".join(lines)


def model_table(rows: list[dict[str, Any]]) -> list[str]:
    """Dense speed, then speed-up and realised fraction of everything that removes tokens."""
    if not rows:
        return []
    adaptive = [name for name in rows[0]["mac_ratio"] if name != "dense"]
    lines = [
        "### Models",
        "",
        "Milliseconds per image; behind each adaptive time its MAC ratio and **realised fraction** (speed-up over the"
        " faster of the two dense models, divided by dense MACs over adaptive MACs).",
        "",
        "| model, batch, dtype | timm dense | dense | over timm | " + " | ".join(adaptive) + " |",
        "|---|---|---|---|" + "---|" * len(adaptive),
    ]
    for row in rows:
        times = {name: value[0] / row["batch"] for name, value in row["milliseconds"].items()}
        slower = row["times_slower_than_subject"]
        fastest = min(1.0, slower["timm"])  # in units of our dense model's time
        ratio = row["mac_ratio"]
        realised = {name: fastest / slower[name] * ratio[name] for name in adaptive}
        cells = [f"{times[name]:.2f} ({ratio[name]:.2f}, **{realised[name]:.2f}**)" for name in adaptive]
        head = f"DeiT-{row['size'][0].upper()}, {row['batch']}, {row['dtype']}"
        lines.append(
            f"| {head} | {times['timm']:.2f} | {times['dense']:.2f} | {slower['timm']:.2f}x | {' | '.join(cells)} |"
        )
    return [*lines, ""]


def attention_table(rows: list[dict[str, Any]]) -> list[str]:
    """Speed over the loop, and what the scores cost."""
    if not rows:
        return []
    lines = [
        "### varlen_attention, 6 heads of 64",
        "",
        "| dtype | tokens an image | batch | SDPA loop, ms | varlen_attention, ms | speed-up | class scores add |"
        " mean scores add |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, slower = row["milliseconds"], row["times_slower_than_subject"]
        extra = [f"{100 * (slower[name] - 1):+.0f} %" for name in ("with class scores", "with mean scores")]
        lines.append(
            f"| {row['dtype']} | {row['tokens']} | {row['batch']} | {times['SDPA loop'][0]:.3f} |"
            f" {times['varlen_attention'][0]:.3f} | **{slower['SDPA loop']:.2f}x** | {extra[0]} | {extra[1]} |"
        )
    return [*lines, ""]


def op_table(rows: list[dict[str, Any]]) -> list[str]:
    """Native against reference."""
    if not rows:
        return []
    lines = [
        "### Small ops, width 384, half of 197 tokens alive",
        "",
        "| op | batch | reference, ms | native, ms | speed-up |",
    ]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        times, slower = row["milliseconds"], row["times_slower_than_subject"]
        lines.append(
            f"| {row['op']} | {row['batch']} | {times['reference'][0]:.3f} | {times['native'][0]:.3f} |"
            f" {slower['reference']:.1f}x |"
        )
    return [*lines, ""]


def write(path: Path, text: str) -> None:
    """All or nothing."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    raise SystemExit(main())
