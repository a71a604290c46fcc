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


# slow_fast, and the tables of ragged_patch_embed: programs loop over an image's rows, or a place's images

IMAGE_WARPS = 8  # 16 sums a thread; with 4 warps some targets spill
IMAGE_COLUMNS = 128  # whole cache lines in every dtype, and enough programs at small batches
WHOLE_ROW_ELEMENTS = 8192  # one program an image: twice the loads in flight


def image_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for programs that take one image and some columns."""
    width = min(triton.next_power_of_2(max(columns, 1)), IMAGE_COLUMNS)
    return max(1, min(ROW_ELEMENTS // width, 128)), width


def image_row_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for programs that take one image and all columns."""
    width = min(triton.next_power_of_2(max(columns, 1)), MAX_COLUMNS)
    return max(1, min(WHOLE_ROW_ELEMENTS // width, 128)), width


# ragged_patch_embed: products over the pixels of patches

PATCH_WARPS = 8  # a 128 x 128 float32 sum: 64 registers a thread
PATCH_STAGES = 4
PLAN_BLOCK = 256  # images of a step; most batches are one
WEIGHT_PROGRAMS = 264  # two for each multiprocessor of an H200
WEIGHT_STEPS = 4  # tiles of patches that a span takes at least


def patch_tile(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a tile, and how many factors of each sum are loaded at a time; more of either spills registers."""
    return (64, 16) if dtype == torch.float32 else (128, 32)


def patch_columns(columns: int) -> int:
    """Columns of a tile: 128, or 64 where that leaves fewer empty."""
    if columns <= 64:
        return max(16, triton.next_power_of_2(columns))
    return 64 if -columns % 128 > -columns % 64 else 128


def weight_spans(tiles: int, steps: int) -> int:
    """In how many parts the patches are taken for the gradient of a weight: by shapes, never by counts."""
    return max(1, min(WEIGHT_PROGRAMS // tiles, steps // WEIGHT_STEPS))


# layer norm: tiles that hold whole rows

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
