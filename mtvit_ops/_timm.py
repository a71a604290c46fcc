"""timm, also where torchvision was built for another PyTorch than the one that is here."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

import torch


def import_timm() -> ModuleType:
    """The module ``timm``.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    allow_other_torchvision()
    try:
        import timm
    except ImportError as error:
        raise ImportError('training needs timm: pip install "mtvit_ops[train]"') from error
    return cast(ModuleType, timm)


def allow_other_torchvision() -> None:
    """Let torchvision's CUDA build be imported beside a CPU-only PyTorch.

    It registers fake kernels for two operators, whose schemas lie in a library that such a PyTorch cannot load; the
    schemas alone let everything but these two operators work.
    """
    if torch.version.cuda is not None or "torchvision" in sys.modules or hasattr(allow_other_torchvision, "keep"):
        return  # a second library would take the first one's place, and the first one's schemas with it
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    allow_other_torchvision.keep = library  # type: ignore[attr-defined]  # schemas live as long as this object
