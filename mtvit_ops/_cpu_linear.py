"""Which kernel multiplies linear layers on this CPU in inference: PyTorch's own through oneDNN, or ours."""

from __future__ import annotations

from functools import cache

import torch

from . import _extension


@cache
def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What PyTorch's oneDNN linear layer takes on this CPU; nothing where PyTorch came without it."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return ()
    dtypes = [torch.float32]
    if ops._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    if ops._is_mkldnn_fp16_supported():
        dtypes.append(torch.float16)
    return tuple(dtypes)


@cache
def panel_dtypes() -> tuple[torch.dtype, ...]:
    """What our own kernel (``csrc/cpu/ragged_linear.cpp``) multiplies here, in oneDNN's place.

    At many tokens it is as fast as oneDNN's, within a few percent, and at few tokens faster; layer norm and residual go
    along (``bench/results/cpu/cpu.md``). Without bfloat16 instructions PyTorch has no fast kernel for 16-bit weights.
    16-bit products by matrix units (AMX), which ours does not use, stay oneDNN's.
    """
    if not _extension.has_extension():
        return ()
    if torch.ops.mtvit_ops_cpp.isa() == "portable":
        return ()
    by_matrix_units = onednn_dtypes() if torch.cpu._is_amx_tile_supported() else ()
    every = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(dtype for dtype in every if dtype is torch.float32 or dtype not in by_matrix_units)


@cache
def linear_dtypes() -> tuple[torch.dtype, ...]:
    """What either of them takes."""
    return tuple({*onednn_dtypes(), *panel_dtypes()})


@cache
def panel_columns() -> int:
    """Rows of a weight in one panel; a weight is packed if its rows are a multiple of them."""
    return torch.ops.mtvit_ops_cpp.panel_columns()
