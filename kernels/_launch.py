"""Launch configurations, one place for numbers that belong to the hardware, and how a launch is made."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

ROW_ELEMENTS = 4096  # of a tile of rows: 32 values for each thread of 4 warps
MAX_COLUMNS = 1024  # of such a tile; wider rows are taken in pieces


def row_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for kernels that stream rows of a given width."""
    width = min(triton.next_power_of_2(max(columns, 1)), MAX_COLUMNS)
    return max(1, ROW_ELEMENTS // width), width


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision() -> str:
    """How float32 factors are multiplied: PyTorch's own switch for CUDA matrix products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


ROW_KEYS = 1024  # keys of a class row held in registers; beyond, rows are cut
ROW_VALUES = 8192  # of k at a time: 32 values for each thread of 8 warps


def class_row(longest: int, dim: int) -> tuple[int, int, int]:
    """Keys and columns of a tile, and warps, for one query against a row of keys."""
    keys = min(max(triton.next_power_of_2(longest), 16), ROW_KEYS)
    # 16 columns of a half dtype are a sector of memory: narrower slices would read it twice
    columns = min(triton.next_power_of_2(max(dim, 1)), max(16, ROW_VALUES // keys))
    return keys, columns, 8 if keys * columns >= ROW_VALUES else 4


class AttentionTile(NamedTuple):
    """Queries and keys along the sides of a tile of logits, and the warps that share it."""

    queries: int
    keys: int
    warps: int


def attention_backward_tiles(device: torch.device, longest_k: int, dim: int, half: bool) -> tuple[AttentionTile, ...]:
    """For attention's gradient: one tile where it holds every key, else those of the passes over queries and keys.

    The largest that spill next to nothing when compiled ahead of time. Hopper and later multiply out of shared memory,
    which leaves registers for twice the keys.
    """
    amd = torch.version.hip is not None
    hopper = device.type == "cpu" or (not amd and torch.cuda.get_device_capability(device)[0] >= 9)
    eight = 4 if amd else 8  # wavefronts are two warps wide
    narrow = dim <= 64
    keys = max(32, triton.next_power_of_2(longest_k))
    if half:
        if keys <= (128 if narrow else 64) * (2 if hopper else 1):
            return (AttentionTile(32 if hopper or narrow else 16, keys, 4 if narrow and keys <= 64 else eight),)
        if narrow:
            return AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)
        return AttentionTile(64, 32, 4), AttentionTile(32, 64, eight)
    if narrow and keys <= 64:
        return (AttentionTile(16, keys, eight),)
    if narrow:
        return AttentionTile(64, 32, eight), AttentionTile(32, 32, eight)
    return AttentionTile(32, 16, 4), AttentionTile(16, 32, eight)
