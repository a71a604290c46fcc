"""The GPU suite where there is no GPU: it says so, its stages run at tiny sizes, and a killed stage loses nothing."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mtvit_ops

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench" / "gpu_suite.py"
STAGES = ["build", "tests", "promises", "sanitize", "ops", "models"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mtvit_ops.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, str(SUITE), *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "bench" / "gpu"))
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_every_stage_says_why_it_is_skipped(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said == [f"{name}: skipped: PyTorch sees no CUDA device on this machine" for name in STAGES]
    assert not (tmp_path / "out").exists()


def test_every_stage_runs_at_tiny_sizes(tmp_path: Path) -> None:
    done = run("--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: stage["status"] for name, stage in result["stages"].items()} == dict.fromkeys(STAGES, "done")
    rows: dict[str, list[dict[str, Any]]] = {}
    for stage in result["stages"].values():
        for row in stage["rows"]:
            rows.setdefault(row["table"], []).append(row)
    assert [row["failed"] for row in rows["tests"]] == [0]
    assert rows["tests"][0]["passed"] > 0
    assert all(row["twice"] == "ok" for row in rows["promises"])
    assert {"model avit", "model mtvit"} <= {row["case"] for row in rows["promises"]}
    assert [row["result"] for row in rows["sanitize"]] == ["ok"]
    # what computes something else is not timed; what this machine lacks says so
    for row in (*rows["ops"], *rows["models"]):
        assert "error" not in row, row
        for name, found in row["times"].items():
            assert "ms" in found or (not name.startswith("ours") and "Error" in found["error"]), (row, name)
    assert len(rows["models"]) == 7
    assert {"varlen_attention", "ragged_linear", "token_select", "halting_step"} <= {row["op"] for row in rows["ops"]}
    table = (tmp_path / "gpu.md").read_text()
    assert "A smoke run" in table
    for section in ("Tests", "Promises", "Ops", "Models"):
        assert f"## {section}" in table


def test_a_stage_out_of_time_leaves_what_it_found(
    tmp_path: Path, suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys, time\n"
        "file = open(sys.argv[sys.argv.index('--out') + 1], 'a')\n"
        'file.write(\'{"table": "build", "what": "a", "ok": true, "note": ""}\\n{"table"\')\n'
        "file.flush()\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setitem(suite.STAGES, "build", (str(script), 6))
    result: dict[str, Any] = {"schema": 1, "smoke": True, "machine": {}, "stages": {}}
    suite.run_stage("build", 6, True, result, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text())["stages"]["build"]
    assert kept["status"] == "out of time"
    assert [row["what"] for row in kept["rows"]] == ["a"]
    assert "| build | out of time |" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_dies_says_how(tmp_path: Path, suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dying.py"
    script.write_text("raise RuntimeError('no such kernel')\n")
    monkeypatch.setitem(suite.STAGES, "build", (str(script), 30))
    result: dict[str, Any] = {"schema": 1, "smoke": True, "machine": {}, "stages": {}}
    suite.run_stage("build", 30, True, result, tmp_path)
    stage = result["stages"]["build"]
    assert stage["status"] == "failed: exit code 1"
    assert "no such kernel" in stage["log"]
    assert suite.failed(stage)


# a stage of five cases on what says it is a GPU; {spread} and {lose} are lines
STAGE = """
import os
import torch
from stage import Stage

lost = False

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize
stage = Stage("")
{spread}
for case in stage.todo(range(5)):
    stage.emit(case=case, process=os.getpid())
    {lose}
"""


@pytest.mark.parametrize(
    ("spread", "lose"),
    [("", "lost = case == 2"), ("stage.share_out(2)", ""), ("stage.share_out(2)", "lost = case == 1")],
    ids=["lost-device", "two-processes", "both"],
)
def test_a_stage_may_take_several_processes(tmp_path: Path, spread: str, lose: str) -> None:
    script, out = tmp_path / "script.py", tmp_path / "rows"
    script.write_text(STAGE.format(spread=spread, lose=lose))
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench" / "gpu")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["case"] for row in rows) == list(range(5))
    assert len({row["process"] for row in rows}) == bool(spread) + bool(lose) + 1


def test_a_stage_that_no_time_is_left_for_ends_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import os; from stage import run_within\n"
        "said, code = run_within(3, ['sh', '-c', 'echo begun; sleep 600 & echo $!; wait'], dict(os.environ))\n"
        "print(code, *said.split())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench" / "gpu")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, begun, sleeper = done.stdout.split()
    assert (code, begun) == ("None", "begun")
    state = Path(f"/proc/{sleeper}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_machine_without_git_has_a_commit_all_the_same(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert suite.machine(None)["commit"] == "unknown"
    assert suite.machine("abc")["commit"] == "abc"


FAILURES = {
    "tests-failed": ({"table": "tests", "failed": 1}, True),
    "tests-erred": ({"table": "tests", "failed": 0, "error": 2}, True),
    "tests-passed": ({"table": "tests", "failed": 0, "error": 0}, False),
    "errors-found": ({"table": "sanitize", "result": "errors found"}, True),
    "no-tool": ({"table": "sanitize", "result": "compute-sanitizer is not installed"}, False),
}


@pytest.mark.parametrize(("row", "bad"), FAILURES.values(), ids=FAILURES)
def test_what_is_wrong_fails(suite: ModuleType, row: dict[str, Any], bad: bool) -> None:
    assert suite.failed({"status": "done", "rows": [row]}) is bad


def test_an_unequal_candidate_is_not_timed(tmp_path: Path) -> None:
    code = (
        "import torch, time_ops; from op_case import Sizes; from row_cases import layer_norm\n"
        "case = layer_norm(Sizes(torch.device('cpu'), 2, 17, 2, backend='eager'))\n"
        "runs = {**case.runs, 'wrong': lambda: case.runs['eager']() * 1.1}\n"
        "print(time_ops.assert_same(case._replace(runs=runs)))\n"
    )
    paths = os.pathsep.join([str(ROOT / "bench" / "gpu"), str(Path(mtvit_ops.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout).keys() == {"wrong"}, done.stdout
    assert "result 0: max error" in done.stdout
