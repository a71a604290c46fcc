"""Launch configurations, one place for numbers that belong to the hardware, and how a launch is made."""

from __future__ import annotations

import contextlib

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


# --- layer norm: tiles that hold whole rows ---

MAX_WARPS = 16  # 1024 threads on AMD, the most a group has
FORWARD_VALUES = 32  # of a tile for each thread: rows of 384 bfloat16 values come eight at a time
BACKWARD_VALUES = 16  # of each of four tiles: two inputs, two running sums
BACKWARD_PROGRAMS = 528  # four for each of an H200's 132 multiprocessors; fixed, so that results depend on no device
BACKWARD_TILES = 2  # at least, a program: partial sums are written once for all of them
SUM_ROWS, SUM_COLUMNS = 256, 16  # of the partial sums: few turns, each with many loads under way


def whole_row_tile(columns: int, values: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of whole rows, about ``values`` for each thread; rows past 8192 spill."""
    width = triton.next_power_of_2(max(columns, 1))
    if columns % 16:  # rows are not aligned: single values are loaded, each by an address of its own
        values //= 2
    warps = min(max(4, width // (32 * values)), MAX_WARPS)
    return max(1, 128 * values // width), width, warps


def partial_sums(tiles: int) -> tuple[int, int]:
    """Programs that share so many tiles, each with running sums of its own, and tiles a program."""
    programs = min(triton.cdiv(tiles, BACKWARD_TILES), BACKWARD_PROGRAMS)
    return programs, triton.cdiv(tiles, programs)
