"""What PyTorch's own oneDNN linear layer takes on this CPU."""

from __future__ import annotations

from functools import cache

import torch


@cache
def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies; nothing where PyTorch came without it."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return ()
    dtypes = [torch.float32]
    if ops._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    if ops._is_mkldnn_fp16_supported():
        dtypes.append(torch.float16)
    return tuple(dtypes)
