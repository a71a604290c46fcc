"""Lets the suite run anywhere: import paths, CUDA-built wheels under CPU PyTorch, backends that say why they skip."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# small ops on shared cores: threads that spin while they wait take the time of those that work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("mtvit_ops") is None:  # nothing installed, and not started as `python -m pytest`
    sys.path.insert(0, str(ROOT))

import mtvit_ops  # noqa: E402, F401

# the package is found by now; with the root on the path, kernels/ would hide Hugging Face's package of that name
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

from mtvit_ops import _backend  # noqa: E402
from mtvit_ops._timm import allow_other_torchvision  # noqa: E402

# where each backend can run; Triton on the CPU is its interpreter, in a process of its own (see Makefile)
PLACES = (
    ("reference", "cpu"),
    ("reference", "cuda"),
    ("cpp", "cpu"),
    ("triton", "cpu"),
    ("triton", "cuda"),
    ("cuda", "cuda"),
)
assert {name for name, _ in PLACES} == set(_backend.BACKENDS)

# the shapes here are small: more threads cost more than they bring
torch.set_num_threads(min(2, torch.get_num_threads()))


allow_other_torchvision()


def _refusal(name: str, device: str) -> str | None:
    """Why a backend cannot run there, or None."""
    if name == "triton" and (device == "cpu") != _backend.triton_is_interpreted():
        return f"Triton runs on the CPU with {_backend.INTERPRETER_VARIABLE}=1, and on GPUs without it"
    found = _backend.available_backends()[name]
    if not found.available:
        return f"backend {name} cannot serve: {found.reason}"
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device on this machine"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test function says once why a place is missing, not once for every row of its table."""
    said, kept, dropped = set(), [], []
    for item in items:
        where = getattr(item, "callspec", None) and item.callspec.params.get("place")
        if where and _refusal(*where):
            mark = item.path, item.originalname, where
            (dropped if mark in said else kept).append(item)
            said.add(mark)
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend and the device it runs on."""
    reason = _refusal(*request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def backend(place: tuple[str, str]) -> Iterator[str]:
    """The backend's name, in force during the test."""
    with _backend.use_backend(place[0]):
        yield place[0]


@pytest.fixture
def device(place: tuple[str, str]) -> str:
    return place[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded runs of the papers' own code, kept beside the repository."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no recorded runs: there is no folder {folder}")
    return folder
