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


# slow_fast: programs loop over an image's rows

SLOW_FAST_WARPS = 4
IMAGE_COLUMNS = 128  # whole cache lines in every dtype, and enough programs at small batches
WHOLE_ROW_ELEMENTS = 8192  # one program an image: twice the loads in flight


def image_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for programs that take one image and some columns."""
    width = min(triton.next_power_of_2(max(columns, 1)), IMAGE_COLUMNS)
    return max(1, min(ROW_ELEMENTS // width, 128)), width


def whole_row_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for programs that take one image and all columns."""
    width = min(triton.next_power_of_2(max(columns, 1)), MAX_COLUMNS)
    return max(1, min(WHOLE_ROW_ELEMENTS // width, 128)), width


# ragged_patch_embed: products over the pixels of patches

PATCH_TOKENS = 128
PATCH_WARPS = 8  # a 128 x 128 float32 sum: 64 registers a thread
PATCH_STAGES = 3
PLAN_BLOCK = 256  # images of a step; most batches are one
WEIGHT_PROGRAMS = 264  # two for each multiprocessor of an H200
WEIGHT_STEPS = 4  # tiles of patches that a span takes at least


def patch_tile(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a tile, and how many factors of each sum are loaded at a time: 128 bytes a row."""
    return PATCH_TOKENS, 32 if dtype == torch.float32 else 64


def patch_columns(columns: int) -> int:
    """Columns of a tile: 128, or 64 where that leaves fewer empty."""
    if columns <= 64:
        return max(16, triton.next_power_of_2(columns))
    return 128 if -columns % 128 <= -columns % 64 else 64


def weight_spans(tiles: int, steps: int) -> int:
    """In how many parts the patches are taken for the gradient of a weight: by shapes, never by counts."""
    return max(1, min(WEIGHT_PROGRAMS // tiles, steps // WEIGHT_STEPS))
