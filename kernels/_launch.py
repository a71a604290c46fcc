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
    """Tokens along the sides of a tile of logits, and how its program runs."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_backward_tile(longest_k: int, wide: int, element_size: int) -> AttentionTile:
    """Of attention's gradient; a tile that holds all keys needs one pass instead of two."""
    most = 256 * 64 * 2 // (max(wide, 64) * element_size)  # keys whose k, v and gradients fit registers and shared memory
    if longest_k <= most:
        keys = max(32, triton.next_power_of_2(longest_k))
        return AttentionTile(32 if keys > 64 else 64, keys, 8 if keys > 64 else 4, 2)
    return AttentionTile(64, 64, 4, 2)
