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


# of token_select
LONGEST_TILE = 4096  # an image up to this length stays in registers: 8 values for each thread of 16 warps
PIECE = 1024  # of an image that may be longer, or whose length nobody bounded: most are shorter than this
RANKED = 256  # entries in score order up to which all pairs cost less than a sort's stages
COMPARED = 16  # entries that a tile is compared with at once: 16 pairs for each thread of 8 warps
BATCH_TILE = 1024  # images whose counts are added at once: 32 values for each thread of one warp


def image_tile(longest: int) -> tuple[bool, int, int]:
    """Whether an image fits one tile, the tile, and its warps: one up to 256 entries, which then meet in no barrier."""
    if longest > LONGEST_TILE:
        return False, PIECE, 4
    block = max(16, triton.next_power_of_2(longest))
    return True, block, min(max(1, block // 256), 16)


def ranking_tile(longest: int) -> tuple[bool, int, int]:
    """Whether an image is sorted, or compared in pieces; the tile or piece, and its warps."""
    if RANKED < longest <= LONGEST_TILE:
        block = triton.next_power_of_2(longest)
        return True, block, block // 128 if block <= 1024 else 16
    return False, min(max(16, triton.next_power_of_2(longest)), RANKED), 8


def batch_tile(images: int) -> int:
    return min(max(16, triton.next_power_of_2(images)), BATCH_TILE)


LIST_TILE = 512  # entries or rows that halting_step takes at once: 4 for each thread of 4 warps


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision() -> str:
    """How float32 factors are multiplied: PyTorch's own switch for CUDA matrix products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
