"""Launch configurations, one place for numbers that belong to the hardware, and how a launch is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial
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


# ragged_linear


class LinearTile(NamedTuple):
    """A tile of a matrix product, and how it is worked on."""

    rows: int
    columns: int
    depth: int  # of one step along K
    warps: int
    stages: int  # steps whose loads are on their way at once
    registers: int | None = None  # at most, a thread


HALF_TILES = (  # largest first
    LinearTile(128, 256, 64, 8, 3),  # least traffic a product; alone on its processor, so only where K is long
    LinearTile(128, 128, 64, 8, 3, 128),  # two a processor: one multiplies while the other writes
    LinearTile(128, 64, 64, 4, 4),  # widths of 192 and 576
    LinearTile(64, 64, 64, 4, 4),  # a few images
    LinearTile(64, 32, 64, 4, 5),  # one image: more programs, deeper pipelines
)
FLOAT_TILES = (LinearTile(64, 64, 32, 4, 3),)  # 32 accumulators a thread leave room for float32 factors
LONG_DEPTH = 768  # from here on the products of a tile take longer than its epilogue
INTERPRETED_PROGRAMS = 3  # few, so that each walks over several tiles


class Limits(NamedTuple):
    """Of a device: what decides how many programs run at once, and how deep they load ahead."""

    processors: int
    shared_processor: int  # bytes
    shared_program: int
    warp_groups: bool  # four warps multiply out of shared memory, where TMA puts the factors: registers to spare

    @property
    def warps(self) -> int:  # of a processor, at 128 or at 256 registers a thread
        return 16 if self.warp_groups else 8

    @property
    def held(self) -> int:  # of the stages, those in registers
        return 0 if self.warp_groups else 1


@cache
def limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(INTERPRETED_PROGRAMS, 1 << 17, 1 << 17, True)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # half of the memory: two programs a processor
        return Limits(found.multi_processor_count, 1 << 16, 1 << 15, False)
    shared = found.shared_memory_per_multiprocessor, found.shared_memory_per_block_optin
    return Limits(found.multi_processor_count, *shared, found.major in (9, 10))  # 12 has TMA, but not the rest


def linear_tile(tokens: int, columns: int, depth: int, like: Tensor) -> LinearTile:
    """The largest tile that wastes few columns and gives every processor one, at capacity."""
    tiles = FLOAT_TILES if like.dtype == torch.float32 else HALF_TILES
    here = limits(like.device)
    least = triton.cdiv(columns, tiles[-1].columns) * tiles[-1].columns
    for tile in tiles:
        across = triton.cdiv(columns, tile.columns)
        enough = triton.cdiv(tokens, tile.rows) * across >= here.processors
        if tile.columns == 256 and not (here.warp_groups and depth >= LONG_DEPTH):
            continue
        if enough and across * tile.columns <= 1.1 * least:
            break
    stages = here.shared_program // _stage_bytes(tile, like) + here.held
    if not here.warp_groups:
        tile = tile._replace(registers=None)
    return tile._replace(stages=max(1, min(tile.stages, stages)))


def linear_programs(tile: LinearTile, like: Tensor) -> int:
    """How many programs of this tile the device holds at once."""
    here = limits(like.device)
    by_shared = here.shared_processor // (max(1, tile.stages - here.held) * _stage_bytes(tile, like))
    return here.processors * max(1, min(by_shared, here.warps // tile.warps))


def _stage_bytes(tile: LinearTile, like: Tensor) -> int:
    return (tile.rows + tile.columns) * tile.depth * like.element_size()


def descriptors_fit(*matrices: Tensor) -> bool:
    """Whether the device has TMA, and may be told of these matrices: rows and bases at multiples of 16 bytes."""
    return limits(matrices[0].device).warp_groups and all(
        matrix.element_size() == 2  # float32 products read registers, which descriptors fill too many of
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )


def with_scratch(run: Callable[..., object]) -> Callable[..., object]:
    """A launch of a kernel that makes its own descriptors, for which Triton asks the caller for memory."""
    context = copy_context()  # the caller's allocator, if there is one, stays
    context.run(triton.set_allocator, _scratch)
    return partial(context.run, run)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
