"""Which kernel serves an op: the one override, the one environment twin, and the reasons."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from . import _extension

BACKENDS = ("reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MTVIT_OPS_BACKEND"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"  # Triton's own

_log = logging.getLogger("mtvit_ops")
_override: ContextVar[str | None] = ContextVar("mtvit_ops_backend", default=None)


class Availability(NamedTuple):
    """Whether a backend can serve, and why (not)."""

    available: bool
    reason: str


def available_backends() -> dict[str, Availability]:
    """Every backend by name with whether it can serve here, and the reason in words.

    Touches neither CUDA nor Triton: it says what is installed, not what a GPU would do.
    """
    return dict(_backends())


@cache
def _backends() -> dict[str, Availability]:
    error, cuda_error = _extension.extension_error(), _extension.cuda_error()
    return {
        "reference": Availability(True, "plain PyTorch, every device"),
        "cpp": Availability(error is None, "native operators for the CPU" if error is None else error),
        "triton": _triton(),
        "cuda": Availability(
            cuda_error is None, "native kernels for CUDA tensors" if cuda_error is None else cuda_error
        ),
    }


def _triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "Triton is not installed")
    if triton_is_interpreted():
        return Availability(True, f"interpreted on the CPU ({INTERPRETER_VARIABLE}=1): right, and very slow")
    if torch.version.cuda is None and torch.version.hip is None:
        return Availability(
            False, f"this PyTorch is built for the CPU; {INTERPRETER_VARIABLE}=1 interprets the kernels"
        )
    return Availability(True, "Triton kernels for CUDA tensors")


@cache
def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, interpreted; Triton itself looks once, when imported."""
    return os.environ.get(INTERPRETER_VARIABLE) == "1"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend inside a ``with`` block, in this thread or task, and for the gradients of what runs there.

    Ops (or dtypes) for which the chosen backend has no kernel run the reference, and a warning of the logger
    ``mtvit_ops`` says so once. ``MTVIT_OPS_BACKEND`` does the same for a whole process; the block wins over it.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown, or the backend cannot serve here; the message says why.
    """
    with overridden(_checked(name, "use_backend")):
        yield


@contextmanager
def overridden(name: str | None) -> Iterator[None]:
    """``use_backend`` for what ``override`` gave: a name that was checked before, or None, which changes nothing."""
    token = _override.set(name or _override.get())
    try:
        yield
    finally:
        _override.reset(token)


def override() -> str | None:
    """The backend of the innermost ``use_backend`` block, or None."""
    return _override.get()


def preferred_backend() -> str | None:
    """The backend asked for by ``use_backend`` or the environment; None: the fastest there is."""
    return _override.get() or _from_environment()


def triton_serves(device_type: str) -> bool:
    """Whether ops on tensors of this device go to Triton's kernels, where those take the arguments."""
    if device_type == "cpu":  # slow: only for whoever asks
        return triton_is_interpreted() and preferred_backend() == "triton"
    if device_type != "cuda" or not _backends()["triton"].available:
        return False
    # a compiler cannot read the override; the ops themselves still follow it
    return torch.compiler.is_compiling() or preferred_backend() in (None, "triton")


@cache
def say_once(level: int, message: str) -> None:
    """Log a message the first time it is given."""
    _log.log(level, message)


@cache
def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name, ENVIRONMENT_VARIABLE) if name else None


def _checked(name: str, asked_by: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{asked_by}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    found = available_backends()[name]
    if not found.available:
        raise ValueError(f"{asked_by}: backend {name!r} is not available: {found.reason}")
    return name
