"""Compile every Triton kernel for GPUs that this machine does not have, and report what each one uses.

Needs no GPU and no CUDA toolkit: Triton's wheel brings its assemblers. Each launcher runs on CPU tensors (launches.py)
under a driver that records what Triton would compile (recording.py); those kernels are compiled for every target.
The exit code is 1 where a kernel spills registers to memory, needs more shared memory than a block of its target has,
or does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")

import launches
import triton
from recording import TARGETS, Launch, record
from triton import knobs
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # of one block, at most
_SAID: IO[str] | None = None  # of a worker
_RECORDED: list[tuple[str, Launch]] = []  # what a forked worker finds under its index


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    unknown = set(options.kernels or ()) - set(launches.stems())
    if unknown:
        raise SystemExit(f"--kernels: no such file with launchers: {', '.join(sorted(unknown))}")
    rows = report(options.targets, options.kernels, options.jobs, options.each)
    limits = {name: min(SHARED_KIB[name], options.shared_limit or SHARED_KIB[name]) for name in options.targets}
    found = problems(rows, limits, options.spill_limit)
    sections = {**_sections(options.json), triton.__version__: {"commit": _commit(), "rows": rows}}
    text = "\n\n".join(_table(version, section) for version, section in sorted(sections.items(), reverse=True))
    for path, content in ((options.json, _json(sections)), (options.markdown, _HEAD + text)):
        if path is not None:
            _write(path, content + "\n")
    if options.json is None and options.markdown is None:
        print(_table(triton.__version__, sections[triton.__version__]))
    count = len({row["case"] for row in rows})
    print(f"{len(rows)} compilations, {count} kernels and configurations, {len(found)} problems", file=sys.stderr)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def report(
    targets: list[str], kernels: list[str] | None = None, jobs: int = 2, each: int | None = None
) -> list[dict[str, Any]]:
    """A row for each kernel, configuration and target, or for ``each`` configurations of a kernel."""
    recorded = [_spaced(record(target, launches.table(kernels)), each) for target in targets]
    _RECORDED[:] = [entry for entries in recorded for entry in entries]
    # forked, since a launch cannot be pickled; this pool says when a compiler takes its process down
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=fork, initializer=_catch_errors) as pool:
        return list(pool.map(_compiled, range(len(_RECORDED))))


def _catch_errors() -> None:
    """A pass that fails writes the whole program to file 2: kept in a file, for the line that says why."""
    global _SAID
    _SAID = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open as long as the worker lives
    os.dup2(_SAID.fileno(), 2)


def _spaced(recorded: list[tuple[str, Launch]], each: int | None) -> list[tuple[str, Launch]]:
    """As many of a kernel's configurations, evenly spaced over the table."""
    kernels: dict[str, list[tuple[str, Launch]]] = {}
    for case, launch in recorded:
        kernels.setdefault(launch.name, []).append((case, launch))
    return [entry for found in kernels.values() for entry in found[:: -(-len(found) // (each or len(found)))]]


def problems(rows: list[dict[str, Any]], limits: dict[str, int], spilled: int = 0) -> list[str]:
    """What no kernel may do, in words."""
    found = []
    for row in rows:
        where = f"{row['case']} on {row['target']}"
        if "error" in row:
            found.append(f"{where}: does not compile: {row['error']}")
            continue
        if row["spill_bytes"] > spilled:
            found.append(f"{where}: spills {row['spill_bytes']} bytes a thread at {row['registers']} registers")
        if row["shared_bytes"] > 1024 * limits[row["target"]]:
            found.append(f"{where}: {row['shared_bytes'] / 1024:.0f} KiB shared, limit {limits[row['target']]}")
    return found


def _compiled(index: int) -> dict[str, Any]:
    case, launch = _RECORDED[index]
    row: dict[str, Any] = {"case": case, "kernel": launch.name, "target": launch.target}
    row["warps"], row["stages"] = launch.options["num_warps"], launch.options["num_stages"]
    row["constants"] = {name: _plain(value) for name, value in launch.constants().items() if value is not None}
    try:
        row.update(resources(launch))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        if _SAID is not None:
            _SAID.seek(0)
            why = [line for line in _SAID.read().splitlines() if "Assertion" in line or " error: " in line]
            row["error"] += f" ({why[0][-200:]})" if why else ""
            _SAID.truncate(0)
    return row


def resources(launch: Launch) -> dict[str, int]:
    """Registers of a thread, bytes of registers spilled to memory, bytes of shared memory of a block."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    log = io.StringIO()
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with warnings.catch_warnings(), contextlib.redirect_stdout(log):
        warnings.simplefilter("ignore")
        binary = triton.compile(source, target=TARGETS[launch.target], options=launch.options)
    if "ptx" in binary.asm:
        said = log.getvalue()
        registers = int(re.findall(r"Used (\d+) registers", said)[-1])
        spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    else:
        said = binary.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", said)[-1])
        # scratch memory of a lane; scalar registers kept in vector ones touch no memory
        spilled = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", said)[-1])
    return {"registers": registers, "spill_bytes": spilled, "shared_bytes": binary.metadata.shared}


_HEAD = """# Triton kernels, compiled ahead of time

Made by `tools/kernel_report.py` without a GPU: nothing here is a measurement. Each cell: registers a thread, bytes
spilled where there are any, KiB of shared memory a block. Constants that only name sizes stand in `kernels.json`.

"""


def _table(version: str, section: dict[str, Any]) -> str:
    rows = section["rows"]
    targets = [name for name in TARGETS if any(row["target"] == name for row in rows)]
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["case"], {})[row["target"]] = row
    lines = [f"## Triton {version}, kernels at {section['commit']}", ""]
    lines += [
        f"| kernel: first case | blocks | warps | {' | '.join(targets)} |",
        f"|---|---|---|{'---|' * len(targets)}",
    ]
    for case, found in cells.items():
        some = next(iter(found.values()))
        blocks = " x ".join(str(value) for name, value in some["constants"].items() if name.startswith("BLOCK"))
        per_target = " | ".join(_cell(found.get(name)) for name in targets)
        lines.append(f"| {case} | {blocks} | {some['warps']} | {per_target} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:  # another case of this target made the same binary
        return ""
    if "error" in row:
        return f"**{row['error']}**"
    spill = f", **spills {row['spill_bytes']}**" if row["spill_bytes"] else ""
    shared = f", {row['shared_bytes'] / 1024:.3g} KiB" if row["shared_bytes"] else ""
    return f"{row['registers']}{spill}{shared}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _sections(path: Path | None) -> dict[str, Any]:
    """What other versions of Triton gave, so that one file holds them side by side."""
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def _json(sections: dict[str, Any]) -> str:
    """A line a row, so that differences can be read."""
    lines = {version: ",\n".join(json.dumps(row) for row in section["rows"]) for version, section in sections.items()}
    heads = {version: json.dumps({**section, "rows": []})[:-2] for version, section in sections.items()}
    return "{\n" + ",\n".join(f'"{version}": {heads[version]}\n{lines[version]}]}}' for version in sections) + "\n}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        part.write(text)
    os.replace(part.name, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all four")
    add("--kernels", nargs="+", metavar="STEM", help="files in kernels/, without .py; default: all")
    add("--json", type=Path, metavar="FILE", help="every row; sections of other Triton versions in it are kept")
    add("--markdown", type=Path, metavar="FILE", help="tables of all versions in the JSON file and of this run")
    add("--shared-limit", type=int, metavar="KIB", help=f"below what the targets have ({SHARED_KIB})")
    add("--spill-limit", type=int, default=0, metavar="BYTES", help="a thread may spill so many (default %(default)s)")
    add("--each", type=int, metavar="N", help="so many configurations of a kernel; default: all")
    add("--jobs", type=int, default=2, help="processes (default %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
