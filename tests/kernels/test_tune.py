"""The tuner where there is no GPU: it says what it would time, and its configurations reach the launches."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtvit_ops
from mtvit_ops import _backend

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# with tensors that say they lie on an H200, and launches that are noted instead of made
RECORD = """
from unittest.mock import patch
import tune
from configurations import CONFIGURATIONS, in_force
from recording import record
from triton.runtime.jit import JITFunction

run = JITFunction.run

def keys():
    grids = set()
    def noted(self, *args, grid, **options):
        grids.add((self.__name__, grid))
        return run(self, *args, grid=grid, **options)
    with patch.object(JITFunction, "run", noted):
        return grids | {launch.key() for _, launch in record("sm_90", samples)}

for stem, configurations in CONFIGURATIONS.items():
    samples = list(tune.launches.table([stem]))
    present = keys()
    assert present, stem
    for text, names in configurations.items():
        with in_force(names):
            print(f"{stem}: {text}: {len(keys() - present)}")
    assert keys() == present, stem
"""

RESULTS = """
import argparse, torch, tune
from configurations import in_force
from mtvit_ops.kernels import _launch, scatter_residual

one = lambda scale: [torch.ones(3) * scale, torch.arange(3)]
print(tune.wrong(one(1.0), one(1.0)), tune.wrong(one(1.001), one(1.0)) is not None)
with in_force({"row_tile": lambda columns: (1, columns)}):
    print(scatter_residual.row_tile(5), _launch.row_tile(5))
print(scatter_residual.row_tile is _launch.row_tile)
rows = [
    {"file": "slow_fast", "case": case, "configuration": name, "ms": [1.0 / gain, 0, 0], "gain": gain}
    for case, name, gain in (("a", "IMAGE_WARPS=4", 1.3), ("b", "IMAGE_WARPS=4", 1.1), ("a", "IMAGE_COLUMNS=64", 1.02))
]
options = argparse.Namespace(kernels=["class_attention", "token_select"], cases=2, batch=5)
taken = list(tune.samples(options))
forward = [(case, args) for case, launcher, args in taken if "backward" not in launcher.__name__]
print(sum("class" in case for case, _ in forward), {args[2].numel() for _, args in forward})
print(tune.proposals(rows)["slow_fast"][0], tune.proposals([*rows, {**rows[0], "gain": None}])["slow_fast"])
"""

MEASURED = """
import torch, tune
from configurations import CONFIGURATIONS
from mtvit_ops.kernels import scatter_residual

def broken(*args):
    raise ValueError("no such tile")

CONFIGURATIONS["scatter_residual"]["broken"] = {"row_tile": broken}
args = torch.zeros(9, 40), torch.arange(9, dtype=torch.int32), torch.zeros(9, 40), None
for row in tune.measured("scatter_residual", "small", scatter_residual.scatter_residual_, args, 2, torch.device("cpu")):
    print(row["configuration"], row.get("error", "gain" in row), sep=": ")
"""


def run(*command: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != _backend.INTERPRETER_VARIABLE}
    paths = [str(TOOLS), str(ROOT / "bench" / "gpu"), str(Path(mtvit_ops.__file__).parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if interpreted:
        environment[_backend.INTERPRETER_VARIABLE] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=TOOLS, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run(str(TOOLS / "tune.py"))
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
    assert not done.stdout


def test_the_list_needs_no_gpu() -> None:
    done = run(str(TOOLS / "tune.py"), "--list", "--kernels", "slow_fast", "token_select")
    assert done.returncode == 0, done.stderr
    head, *listed = done.stdout.splitlines()
    assert f"{len(listed)} configurations beside the present ones of 2 files" in head
    assert {line.split(": ")[0] for line in listed} == {"slow_fast", "token_select"}


def test_every_configuration_is_another_launch() -> None:
    done = run("-c", RECORD)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert [line for line in lines if line.endswith(": 0")] == []


def test_what_differs_and_what_gains() -> None:
    done = run("-c", RESULTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "None True",
        "(1, 5) (1, 5)",
        "True",
        "2 {6}",  # offsets of five images
        "IMAGE_WARPS=4 ('present', 1.0)",
    ]


def test_one_sample_from_launch_to_row() -> None:
    done = run("-c", MEASURED, interpreted=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "present: True",
        "ROW_ELEMENTS=2048: True",
        "ROW_ELEMENTS=8192: True",
        "broken: ValueError: no such tile",
    ]
