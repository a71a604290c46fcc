"""What the CUDA kernels cost on each architecture: ``make cuda``.

Compiles the CUDA sources that CMakeLists.txt names, with its flags and for its architectures, and prints registers,
spills and shared memory of every kernel, as the assembler reports them. Warnings are errors. Needs nvcc, no GPU. Writes
bench/results/cuda.json and cuda.md. Exit codes: 0 all well, 1 a kernel spills registers or does not compile, 2 wrong
use or no nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ROOT / "build" / "nvcc"  # where `make cuda` puts NVIDIA's Python packages

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources, flags, archs = build_plan()
    parser.add_argument("--archs", nargs="+", default=archs, help="such as 90 100 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cuda.json and cuda.md")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc in CUDACXX, CUDA_HOME, build/nvcc, the Python packages or PATH", file=sys.stderr)
        return 2
    jobs = [(source, arch) for source in sources for arch in options.archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            found = list(pool.map(lambda job: compile_one(nvcc, flags, *job), jobs))
        except subprocess.CalledProcessError as error:
            print(error.stdout + error.stderr, file=sys.stderr)
            return 1
    report = {"nvcc": version(nvcc), "flags": flags, "kernels": sorted(chain.from_iterable(found), key=order)}
    text = render(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "cuda.md").write_text(text)
    print(text)
    spilled = [entry for entry in report["kernels"] if entry["spill_bytes"]]
    for entry in spilled:
        print(f"{entry['kernel']} spills {entry['spill_bytes']} bytes on sm_{entry['arch']}", file=sys.stderr)
    return 1 if spilled else 0


def build_plan() -> tuple[list[str], list[str], list[str]]:
    """Sources, flags and architectures, from CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()

    def first(pattern: str) -> str:
        match = re.search(pattern, text)
        assert match is not None, pattern
        return match[1]

    sources = first(r"set\(CUDA_SOURCES([^)]*)\)").split()
    standard = first(r"CMAKE_CUDA_STANDARD (\d+)")
    own = first(r"cuda_kernels PRIVATE (--[^)]*)\)").split()
    flags = ["-O3", f"-std=c++{standard}", *(flag for flag in own if not flag.startswith("--threads"))]
    archs = [a.removesuffix("-real") for a in first(r'CMAKE_CUDA_ARCHITECTURES "([^"]*)"').split(";")]
    return sources, flags, archs


def find_nvcc() -> str | None:
    """The CUDA compiler of this machine: named, installed by ``make cuda`` or with Python packages, or in PATH."""
    candidates = [os.environ.get("CUDACXX")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{home}/bin/nvcc")
    for folder in (PACKAGES, *map(Path, sys.path)):
        candidates += map(str, sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True))
    return next(filter(None, (shutil.which(candidate) for candidate in (*candidates, "nvcc") if candidate)), None)


def version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return match[1] if match else text.strip()


def compile_one(nvcc: str, flags: list[str], source: str, arch: str) -> list[dict[str, Any]]:
    """One source for one architecture: what each of its kernels uses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            *flags,
            "-Werror=all-warnings",
            "-Xptxas=-v",
            "-cubin",
            f"-arch=sm_{arch}",
            str(ROOT / source),
            "-o",
            f"{folder}/out",
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(run.stdout + run.stderr, source)


def parse(log: str, source: str) -> list[dict[str, Any]]:
    """The kernels of an assembler's log."""
    parts = ENTRY.split(log)[1:]
    entries = []
    for symbol, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        spills, used, shared = SPILLS.search(text), USED.search(text), SHARED.search(text)
        assert spills is not None, text
        assert used is not None, text
        entries.append(
            {
                "kernel": readable(symbol),
                "source": source,
                "arch": arch,
                "registers": int(used[1]),
                "spill_bytes": int(spills[2]) + int(spills[3]),
                "stack_bytes": int(spills[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return entries


def readable(symbol: str) -> str:
    """A mangled kernel name as name<arguments>."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("mtvit_ops::cuda::", "")
    return text.partition("(")[0].replace(" >", ">")


def order(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["source"], entry["kernel"], int(re.sub(r"\D", "", entry["arch"]))


def render(report: dict[str, Any]) -> str:
    """The report as a table: registers on each architecture."""
    archs = list(dict.fromkeys(entry["arch"] for entry in report["kernels"]))
    lines = [
        "# CUDA kernels",
        "",
        f"nvcc {report['nvcc']}, {' '.join(report['flags'])}. Registers a thread on each architecture; spills, stack"
        " and shared memory in bytes, the most of all. Written by `make cuda`; speed: not measured yet.",
        "",
        f"| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} | spills | stack | shared |",
        f"|---|{'---|' * (len(archs) + 3)}",
    ]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for entry in report["kernels"]:
        kernels.setdefault(entry["kernel"], []).append(entry)
    for name, entries in kernels.items():
        registers = {entry["arch"]: str(entry["registers"]) for entry in entries}
        most = (max(entry[field] for entry in entries) for field in ("spill_bytes", "stack_bytes", "shared_bytes"))
        cells = [f"`{name}`", *(registers.get(arch, "-") for arch in archs), *map(str, most)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
