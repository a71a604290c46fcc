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
