"""Facts about this machine and installation, for bug reports and beside every measured number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ._backend import ENVIRONMENT_VARIABLE, available_backends
from ._extension import build_info
from ._version import __version__

_PACKAGES = (
    "numpy",
    "triton",
    "timm",
    "torchvision",
    "safetensors",
    "scikit-image",
    "pillow",
    "matplotlib",
    "rich",
)


def environment() -> dict[str, Any]:
    """What runs where: versions, machine, build and backends, as plain values that JSON can hold.

    Asks CUDA whether it has devices, which initialises it where there are some.
    """
    return {
        "mtvit_ops": __version__,
        "commit": checkout_commit(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda,
        "devices": _cuda_devices(),
        "build": build_info(),
        "backends": {name: found._asdict() for name, found in available_backends().items()},
        "backend_override": os.environ.get(ENVIRONMENT_VARIABLE) or None,
    }


def describe_environment() -> str:
    """``environment()`` as text to paste into a bug report."""
    facts = environment()
    missing = "not installed"
    lines = [
        _line("mtvit_ops", facts["mtvit_ops"] + (f" (commit {facts['commit']})" if facts["commit"] else "")),
        _line("python", facts["python"]),
        _line("torch", facts["torch"]),
        *(_line(name, version or missing) for name, version in facts["packages"].items()),
        "",
        _line("platform", facts["platform"]),
        _line("cpu", f"{facts['cpu']}, {facts['cpu_capability']}"),
        _line("threads", f"{facts['threads']} of {facts['usable_cpus']} usable CPUs"),
        _line("cuda", f"PyTorch built with {facts['cuda']}" if facts["cuda"] else "PyTorch built without"),
    ]
    lines += [_line("device", device) for device in facts["devices"]] or [_line("device", "cpu only")]
    lines += ["", "native extension"]
    built = dict(facts["build"])
    lines += [_line(f"  {name}", _plain(value)) for name, value in built.items()]
    lines += ["", "backends"]
    for name, found in facts["backends"].items():
        lines.append(_line(f"  {name}", f"{'available' if found['available'] else 'not available'}: {found['reason']}"))
    if facts["backend_override"]:
        lines.append(_line(f"  {ENVIRONMENT_VARIABLE}", facts["backend_override"]))
    return "\n".join(lines)


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def checkout_commit() -> str | None:
    """The commit this package runs from, with ``+changes`` if files differ; None outside a git checkout."""
    package = Path(__file__).resolve().parent
    # an installed copy inside somebody else's repository is not a checkout of ours
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _git(package.parent, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        for index, device in enumerate(found)
    ]


def _line(name: str, value: object) -> str:
    return f"{name:<18} {value}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
