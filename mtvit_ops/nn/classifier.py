"""Final norm and classifier as one native operator: it comes when caches have forgotten all that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._cpu_linear import panel_dtypes
from .._register import native_kernel, native_serves
from .half_block import layer_weights
from .plain import affine, modules_are_watched
from .prepared import Prepared


def classify_natively(
    x: Tensor, cu_seqlens: Tensor | None, norm: nn.Module, head: nn.Module, prepared: Prepared
) -> Tensor | None:
    """``head(norm(x))`` of the first row of each image.

    Args:
        x: (R, D).
        cu_seqlens: where images begin, (B + 1,), int32; None: each row is one.
        norm, head: the two layers.
        prepared: keeps what is made from them.

    Returns:
        (B, num_classes); None: the operator cannot serve here.
    """
    if not native_serves(x) or x.dtype not in panel_dtypes() or x.numel() == 0 or modules_are_watched():
        return None
    given = prepared.arguments("classifier", (norm, head), x, _arguments)
    return None if given is None else native_kernel("classify")(x, cu_seqlens, *given)


def _arguments(layers: Sequence[nn.Module], x: Tensor) -> tuple[Any, ...] | None:
    norm, head = layers
    given, linear = affine(norm), layer_weights(x, head)
    if given is None or linear is None or given[0].dtype is not x.dtype:
        return None
    return (*given, *linear)
