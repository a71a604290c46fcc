"""The native extension: loaded once, or the reason why it is not there."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _load() -> str | None:
    """Load the operators and the build module; what went wrong, or None."""
    library = Path(__file__).parent / "_C.so"
    if not library.is_file():
        return "the native extension was not built (set MTVIT_OPS_BUILD_EXT=1 and reinstall to see why)"
    try:
        importlib.import_module("mtvit_ops._build")
        torch.ops.load_library(str(library))
    except (OSError, ImportError) as error:
        return f"the native extension did not load: {error}"
    return None


@cache
def build_module() -> Any:
    """``mtvit_ops._build``: what is no tensor operator; the extension must be there."""
    return importlib.import_module("mtvit_ops._build")


def has_extension() -> bool:
    """Whether the operators ``torch.ops.mtvit_ops_cpp`` are there."""
    return _load() is None


def extension_error() -> str | None:
    """Why the native extension is absent, in words; None if it is there."""
    return _load()


def cuda_error() -> str | None:
    """Why the operators ``torch.ops.mtvit_ops_cuda`` cannot serve, in words; None if they can."""
    error = _load()
    if error is not None:
        return error
    if not build_module().build_info()["cuda"]:
        return "the native extension was built without CUDA (MTVIT_OPS_WITH_CUDA=1 builds it, where there is nvcc)"
    return "this PyTorch is built without CUDA" if torch.version.cuda is None else None


def build_info() -> dict[str, Any]:
    """What was built, with which compiler and flags, and which instruction set runs; without extension: why not."""
    error = _load()
    if error is not None:
        return {"extension": False, "reason": error}
    built = build_module().build_info()
    return {"extension": True, **built, "isa": torch.ops.mtvit_ops_cpp.isa()}
