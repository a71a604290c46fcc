"""No launcher asks the device for a value: each runs on the host alone, its kernels replaced by a counter.

Whatever would wait on a GPU raises here, also what PyTorch's CPU tensors do without a word.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_registration import NAMESPACE, registered, samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed: there are no launchers to run")

import mtvit_ops.kernels
from triton.runtime.jit import KernelInterface

# Python's ways to a tensor's values, and tensors made of Python's values: their copy to a GPU waits too
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__complex__", "__index__")
FACTORIES = ("tensor", "as_tensor", "from_numpy")
# what waits in C++, for a value or for a size
OPS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
}
MASKABLE = {"aten::index", "aten::index_put", "aten::index_put_"}


class WaitError(Exception):
    """Something that a GPU would have to be waited for."""


class Guard(TorchDispatchMode):
    """Raises for the operators that wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        masked = name in MASKABLE and any(index is not None and index.dtype == torch.bool for index in args[1])
        sized = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in OPS or masked or sized:
            raise WaitError(name)
        return func(*args, **kwargs)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grids of the kernels that would have been launched, in a world where nothing may wait."""
    grids: list[Any] = []

    def launcher(kernel: KernelInterface, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: grids.append(grid(kwargs) if callable(grid) else grid)

    def refusal(name: str) -> Callable[..., None]:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise WaitError(name)

        return refuse

    with torch.no_grad(), Guard(), monkeypatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", launcher)
        for name in METHODS:
            patch.setattr(Tensor, name, refusal(name))
        for name in FACTORIES:
            patch.setattr(torch, name, refusal(name))
        yield grids


def launchers() -> dict[str, Callable[..., Any]]:
    """Every function in ``kernels/`` that has the name of a registered op."""
    names, found = set(registered(NAMESPACE)), {}
    for folder in mtvit_ops.kernels.__path__:
        for path in Path(folder).glob("[!_]*.py"):
            module = importlib.import_module(f"mtvit_ops.kernels.{path.stem}")
            functions = inspect.getmembers(module, inspect.isfunction)
            found |= {name: function for name, function in functions if name in names}
    return dict(sorted(found.items()))


LAUNCHERS, SAMPLES = launchers(), samples()


def test_there_are_launchers() -> None:
    assert {"scatter_residual", "scatter_residual_", "scatter_residual_backward"} <= set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launches_without_waiting(name: str, launches: list[Any]) -> None:
    assert name in SAMPLES, f"{name} has a kernel and no sample arguments in test_registration.py"
    for arguments in SAMPLES[name]:
        LAUNCHERS[name](*arguments)
    assert launches
    for grid in launches:
        assert all(type(size) is int and size > 0 for size in grid), grid


X, MASK = torch.arange(4.0), torch.ones(4, dtype=torch.bool)
# each looks its method up when called
WAITING = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "bool": lambda: bool(X[0]),
    "if": lambda: 1 if X[0] > 0 else 2,
    "int": lambda: int(X[0]),
    "float": lambda: float(X[0]),
    "index": lambda: range(4)[X[0].int()],
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "masked-write": lambda: X.index_put((MASK,), X),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: X.repeat_interleave(MASK.long()),
    "equal": lambda: torch.equal(X, X),
    "from-a-list": lambda: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_what_waits_raises(wait: Callable[[], Any], launches: list[Any]) -> None:
    with pytest.raises(WaitError):
        wait()


def test_what_does_not_wait_passes(launches: list[Any]) -> None:
    assert (X[1:] + X.new_zeros(3)).shape == (3,)
    assert X.repeat_interleave(2, output_size=8).cumsum(0).to(torch.int32).dtype == torch.int32
    assert X[MASK.long()].shape == (4,)
    assert not launches


def test_the_world_is_put_back() -> None:
    """Also: the same calls are fine outside."""
    for name, wait in WAITING.items():
        assert wait() is not None, name
