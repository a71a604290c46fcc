"""Every Triton kernel compiles for every target without spills, and none can be forgotten; needs no GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mtvit_ops
from mtvit_ops import _backend

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "tools" / "kernel_report.py"
KERNELS = sorted(path for path in (ROOT / "kernels").glob("*.py") if not path.name.startswith("_"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SPILLING = """
import kernel_report, triton, triton.language as tl, torch
from recording import record

@triton.jit
def wide_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)  # N values a lane or more, all alive until the last line
    tl.store(out_ptr + at, x + tl.sum(x))

x = torch.zeros(32768)
samples = [("spills", lambda *args: wide_kernel[(1,)](*args, N=32768, num_warps=1), (x, x.clone()))]
for target in ("sm_90", "gfx942"):
    [(case, launch)] = record(target, samples)
    row = {"case": case, "target": target, **kernel_report.resources(launch)}
    print(kernel_report.problems([row], kernel_report.SHARED_KIB))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != _backend.INTERPRETER_VARIABLE}
    paths = [str(TOOL.parent), str(Path(mtvit_ops.__file__).parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, *command], cwd=TOOL.parent, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the tool says about every kernel, in a few configurations; all of them take minutes."""
    found = []
    for each, *targets in (("3", "sm_90", "gfx942"), ("1", "sm_80", "sm_100")):
        file = tmp_path_factory.mktemp("report") / "kernels.json"
        done = run(str(TOOL), "--json", str(file), "--each", each, "--targets", *targets)
        assert done.returncode == 0, done.stderr
        [section] = json.loads(file.read_text()).values()
        found += section["rows"]
    return found


def test_every_kernel_compiles_for_every_target(rows: list[dict[str, Any]]) -> None:
    jitted = {name for path in KERNELS for name in kernels_of(path.read_text())}
    assert jitted
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        # where means always take a launch of their own there are no partial sums to add
        spare = {"add_partials_kernel"} if target != "sm_90" else set()
        assert jitted - spare <= {row["kernel"] for row in rows if row["target"] == target} <= jitted, target
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.parametrize("path", sorted((ROOT / "mtvit_ops" / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_every_registered_launcher_has_samples(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("launches", TOOL.parent / "launches.py")
    launches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launches)
    registered = registrations_of(path.read_text())
    assert {name for name, _ in registered} <= launches.names()


def test_both_lists_are_read_right() -> None:
    source = "@triton.jit\ndef a_kernel(x_ptr): ...\n@triton.jit\ndef helper(x): ...\ndef b_kernel(): ..."
    assert kernels_of(source) == ["a_kernel"]
    assert kernels_of("@triton.jit(repr=f)\ndef a_kernel(x_ptr): ...") == ["a_kernel"]
    assert registrations_of('A = register_op("a", "()", triton="file")\nregister_op("b", "()")') == [("a", "file")]


def test_a_spill_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "spilling.py").write_text(SPILLING)  # Triton reads a kernel's source from its file
    done = run(str(tmp_path / "spilling.py"))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all("wide_kernel: spills on" in line and "bytes a thread" in line for line in said), said


def test_too_much_shared_memory_is_a_failure() -> None:
    done = run(str(TOOL), "--kernels", "scatter_residual", "--targets", "gfx942", "--shared-limit", "1")
    assert done.returncode == 1
    assert "KiB shared, limit 1" in done.stderr


def test_a_kernel_that_does_not_compile_is_a_failure() -> None:
    code = "import kernel_report\n" + "def fail(launch): raise ValueError('no such layout')\n"
    code += "kernel_report.resources = fail\n"
    code += "raise SystemExit(kernel_report.main(['--kernels', 'scatter_residual', '--targets', 'sm_80']))"
    done = run("-c", code)
    assert done.returncode == 1
    assert "scatter_residual_kernel" in done.stderr
    assert "does not compile: ValueError: no such layout" in done.stderr


def test_versions_stand_side_by_side(tmp_path: Path) -> None:
    file, table = tmp_path / "kernels.json", tmp_path / "kernels.md"
    file.write_text(json.dumps({"0.0.0": {"commit": "before", "rows": []}}))
    done = run(
        *(str(TOOL), "--kernels", "scatter_residual", "--targets", "sm_90"),
        *("--json", str(file), "--markdown", str(table)),
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(file.read_text())) == 2
    assert "kernels at before" in table.read_text()
    assert "| scatter_residual_kernel: scatter_residual_ DeiT-T bfloat16 |" in table.read_text()


def test_an_unknown_file_is_refused() -> None:
    done = run(str(TOOL), "--kernels", "scatter_residuals")
    assert done.returncode == 1
    assert "no such file with launchers: scatter_residuals" in done.stderr


def kernels_of(source: str) -> list[str]:
    """Jitted functions that are launched, by the house's naming."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    ]


def registrations_of(source: str) -> list[tuple[str, str]]:
    """Ops registered with a file of Triton kernels."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "register_op"]
    return [
        (ast.literal_eval(call.args[0]), ast.literal_eval(keyword.value))
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "triton"
    ]
