"""The CUDA kernels compile, the table of what they use is whole, and its tool says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "cuda_report.py"
pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="needs the source tree")

LOG = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN9mtvit_ops4cuda11some_kernelIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN9mtvit_ops4cuda11some_kernelIfEEvPT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 162 registers, used 1 barriers, 8 bytes cumulative stack size, 43184 bytes smem
ptxas info    : Compiling entry function '_Z12other_kernelv' for 'sm_120'
ptxas info    : Function properties for _Z12other_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels_of_the_sources(tool: ModuleType) -> set[str]:
    sources, _, _ = tool.build_plan()
    found = set()
    for source in sources:
        found |= set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", (ROOT / source).read_text()))
    return found


def names(report: dict[str, Any]) -> set[str]:
    return {entry["kernel"].partition("<")[0] for entry in report["kernels"]}


def test_every_source_is_built(tool: ModuleType) -> None:
    sources, flags, archs = tool.build_plan()
    assert sources == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert "--fmad=false" in flags
    assert archs == ["80", "86", "89", "90", "100", "120"]


def test_the_committed_table_is_whole(tool: ModuleType) -> None:
    report = json.loads((tool.RESULTS / "cuda.json").read_text())
    assert names(report) == kernels_of_the_sources(tool)
    _, flags, archs = tool.build_plan()
    assert report["flags"] == flags
    kernels = {entry["kernel"] for entry in report["kernels"]}
    assert len(report["kernels"]) == len(kernels) * len(archs)
    assert {entry["arch"] for entry in report["kernels"]} == set(archs)
    assert all(entry["spill_bytes"] == 0 for entry in report["kernels"])
    # what every architecture gives a block without being asked for more
    assert all(entry["shared_bytes"] <= 48 * 1024 for entry in report["kernels"])
    assert (tool.RESULTS / "cuda.md").read_text() == tool.render(report)


def test_the_sources_compile(tool: ModuleType, tmp_path: Path) -> None:
    if tool.find_nvcc() is None:
        pytest.skip("no nvcc here: `make cuda` installs one")
    command = [sys.executable, str(TOOL), "--archs", "90", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert names(json.loads((tmp_path / "cuda.json").read_text())) == kernels_of_the_sources(tool)


def test_a_log_is_read(tool: ModuleType) -> None:
    first, second = tool.parse(LOG, "some.cu")
    assert first == {
        "kernel": "some_kernel<float>",
        "source": "some.cu",
        "arch": "90",
        "registers": 162,
        "spill_bytes": 16,
        "stack_bytes": 8,
        "shared_bytes": 43184,
    }
    assert (second["kernel"], second["arch"], second["registers"], second["shared_bytes"]) == (
        "other_kernel",
        "120",
        18,
        0,
    )


RUNS = {  # what every compilation gives; exit code; what is said
    "spills": (LOG, 1, "some_kernel<float> spills 16 bytes on sm_90"),
    "good": (LOG[LOG.index("ptxas info    : Compiling entry function '_Z12") :], 0, ""),
    "broken": (None, 1, "expected a ';'"),
}


@pytest.mark.parametrize(("log", "code", "said"), RUNS.values(), ids=RUNS)
def test_exit_codes(
    log: str | None,
    code: int,
    said: str,
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compile_one(nvcc: str, flags: list[str], source: str, arch: str) -> list[dict[str, Any]]:
        if log is None:
            raise subprocess.CalledProcessError(2, nvcc, "", "error: expected a ';'")
        return tool.parse(log, source)

    monkeypatch.setattr(tool, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(tool, "version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(tool, "compile_one", compile_one)
    monkeypatch.setattr(sys, "argv", ["cuda_report.py", "--archs", "90", "--out", str(tmp_path)])
    assert tool.main() == code
    assert said in capsys.readouterr().err


def test_no_compiler(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cuda_report.py"])
    assert tool.main() == 2
    assert "no nvcc in CUDACXX" in capsys.readouterr().err


def test_where_the_compiler_is_looked_for(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(place: str) -> str:
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    for variable in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tool, "PACKAGES", tmp_path / "nowhere")
    monkeypatch.setattr(tool.sys, "path", [])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert tool.find_nvcc() is None
    monkeypatch.setenv("PATH", str(Path(in_path := make("bin/nvcc")).parent))
    assert tool.find_nvcc() == in_path
    packages = make("site/nvidia/cu13/bin/nvcc")
    monkeypatch.setattr(tool.sys, "path", [str(tmp_path / "site")])
    assert tool.find_nvcc() == packages
    home = make("home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert tool.find_nvcc() == home
    named = make("named/nvcc")
    monkeypatch.setenv("CUDACXX", named)
    assert tool.find_nvcc() == named
