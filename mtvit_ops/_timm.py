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

    torchvision's CUDA build registers fake kernels for two operators, whose schemas lie in a library that a CPU-only
    PyTorch cannot load; the schemas alone let everything but these two operators work.
    """
    if torch.version.cuda is None and "torchvision" not in sys.modules:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_timm.keep = library  # type: ignore[attr-defined]  # schemas live as long as this object
    try:
        import timm
    except ImportError as error:
        raise ImportError('training needs timm: pip install "mtvit_ops[train]"') from error
    return cast(ModuleType, timm)
