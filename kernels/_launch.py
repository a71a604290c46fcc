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
from triton.runtime import driver

from ._math import INTERPRETED

ROW_ELEMENTS = 4096  # of a tile of rows: 32 values for each thread of 4 warps
MAX_COLUMNS = 1024  # of such a tile; wider rows are taken in pieces


def row_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile for kernels that stream rows of a given width."""
    width = min(triton.next_power_of_2(max(columns, 1)), MAX_COLUMNS)
    return max(1, ROW_ELEMENTS // width), width


def apart_from(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A copy where it lies in x's memory: programs run in no order, none may write what another still reads."""
    if other is None or other.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return other
    return other.clone()


# of token_select
LONGEST_TILE = 4096  # an image up to this length stays in registers: 16 values for each thread of 8 warps
PIECE = 1024  # of an image that may be longer, or whose length nobody bounded: most are shorter than this
RANKED = 256  # entries in score order up to which all pairs cost less than a sort's stages
COMPARED = 16  # entries that a tile is compared with at once: 16 pairs for each thread of 8 warps
BATCH_TILE = 1024  # images whose counts are added at once: 32 values for each thread of one warp


def image_tile(longest: int) -> tuple[bool, int, int]:
    """Whether an image fits one tile, the tile, and its warps: one up to 256 entries, which then meet in no barrier."""
    if longest > LONGEST_TILE:
        return False, PIECE, 4
    block = max(16, triton.next_power_of_2(longest))
    return True, block, min(max(1, block // 256), 8)


def roomy(device: torch.device, registers: int = 255) -> dict[str, int]:
    """Registers that a thread may take: left alone, the assembler spills a few to fit one more program."""
    return {"maxnreg": registers} if generation(device) > 0 else {}  # AMD's compiler knows no such option


def selection_options(block: int, warps: int, device: torch.device) -> dict[str, int]:
    """Registers that a thread may take: left alone, the assembler spills a few to fit one more program."""
    if warps < 4 or generation(device) == 0:  # AMD's compiler knows no such option
        return {}
    return {"maxnreg": 255 if warps == 8 and block > 2048 else 128}


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


def generation(device: torch.device) -> int:
    """NVIDIA's; 0 for AMD's. On the CPU: of the target that kernels are compiled for ahead of time, or Hopper."""
    if device.type == "cuda":
        return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    if INTERPRETED.value or driver._active is None:  # nobody has chosen a target
        return 9
    target = driver.active.get_current_target()
    return 0 if target.backend == "hip" else target.arch // 10


def dot_precision() -> str:
    """How float32 factors are multiplied: PyTorch's own switch for CUDA matrix products."""
    # the older allow_tf32 sets this too, but raises when read after this was set
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# slow_fast, and the tables of ragged_patch_embed: programs loop over an image's rows, or a place's images

IMAGE_WARPS = 8  # 16 sums a thread; with 4 warps some targets spill
IMAGE_COLUMNS = 128  # whole cache lines in every dtype, and enough programs at small batches
WHOLE_ROW_ELEMENTS = 8192  # one program an image: twice the loads in flight


def image_column_tile(columns: int) -> tuple[int, int]:
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


def patch_tile(dtype: torch.dtype, generation: int = 9) -> tuple[int, int]:
    """Tokens of a tile, and how many factors of each sum are loaded at a time; more of either spills registers."""
    if dtype != torch.float32:
        return 128, 32
    return (64 if generation < 10 else 32), 16


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


AHEAD_OF_TIME = {  # an MI300X, A100, H200, B200
    0: Limits(304, 1 << 16, 1 << 15, False),
    8: Limits(108, 164 << 10, 163 << 10, False),
    9: Limits(132, 228 << 10, 227 << 10, True),
    10: Limits(148, 228 << 10, 227 << 10, True),
}


def limits(device: torch.device) -> Limits:
    if device.type == "cuda":
        return _found(device)
    return (
        Limits(INTERPRETED_PROGRAMS, 1 << 17, 1 << 17, True) if INTERPRETED.value else AHEAD_OF_TIME[generation(device)]
    )


@cache
def _found(device: torch.device) -> Limits:
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


# attention

QUERY_TILE = 64  # rows of one warpgroup's product; ViT lengths waste less of it than of 128
WHOLE_ROW_KEYS = 256  # 64 rows of logits: 128 registers a thread of 4 warps, so two programs a multiprocessor
SCORES_TILE = 64  # keys


class WorkList(NamedTuple):
    """How the spans of all images of a batch are numbered."""

    items: int  # in the grid, for one head
    spans: int  # of the longest image
    flat: bool  # numbered by tokens, as ``_packed.find_span`` says; else ``spans`` for each image


def work_list(tokens: int, batch: int, max_seqlen: int, span: int) -> WorkList:
    """The shorter of the two numberings, from what the host knows."""
    spans = max(1, triton.cdiv(min(max_seqlen, tokens), span))
    by_tokens = tokens // span + batch
    return WorkList(min(spans * batch, by_tokens), spans, by_tokens < spans * batch)


class AttentionPlan(NamedTuple):
    whole_row: bool
    queries: int  # of a tile
    keys: int
    span: int  # queries of a program
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most: what lets one more program onto a multiprocessor of sm_90


def attention_plan(
    q: Tensor,
    value_dim: int,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_bias: bool,
    class_row: bool,
    mean: bool,
) -> AttentionPlan:
    """How the forward of attention is cut for q (Tq, H, d)."""
    dim, capability = max(q.shape[2], value_dim), generation(q.device)
    if not capability:  # a second stage does not fit its scalar registers
        return AttentionPlan(False, 64, 64 if q.element_size() == 2 else 32, 64, warps=4, stages=1)
    if q.element_size() == 4:  # its factors lie in registers; a second stage of them spills
        return AttentionPlan(False, 64, 32, 64, warps=8, stages=1)
    if max_seqlen_k <= _whole_row_keys(capability, dim, has_bias, mean):
        keys = max(64, triton.next_power_of_2(max_seqlen_k))
        tiles = triton.cdiv(max_seqlen_q, QUERY_TILE)
        # K and V are read once a program: as many queries as leave four programs for each multiprocessor
        enough = 4 * _multiprocessors(q)
        together = next((n for n in (4, 2) if batch * q.shape[1] * triton.cdiv(tiles, n) >= enough), 1)
        capped = capability == 9 and dim <= 64 and not (mean and has_bias)
        registers = {64: 128, 128: 168}.get(keys) if capped else None
        return AttentionPlan(True, QUERY_TILE, keys, QUERY_TILE * together, warps=4, stages=2, registers=registers)
    # beside a bias or what the class row needs later, 64 spill
    wide = capability == 9 if dim > 64 else not (has_bias or (capability == 9 and class_row))
    keys = 64 if wide else 32
    if max_seqlen_q <= QUERY_TILE:
        return AttentionPlan(False, 64, keys, 64, warps=4, stages=2)
    # K and V come from the L2 cache once a program: with 64 queries for them it would be the limit
    # with 128 registers two programs run, and hide what loads a third stage would
    registers = 128 if capability == 9 and dim <= 64 else None
    return AttentionPlan(
        False, 128, keys, 128, warps=8, stages=3 if dim <= 64 and not has_bias else 2, registers=registers
    )


def _whole_row_keys(capability: int, dim: int, has_bias: bool, mean: bool) -> int:
    """Keys whose logits a program can hold for a tile of queries, by what else is in its registers."""
    if capability < 9:  # the right factors of products too
        return 64 if dim <= 64 else 0
    if mean and capability > 9:  # a row lies within a thread, so sums over rows are as large as the tile
        return 64
    if has_bias and capability > 9:  # and so is a bias
        return 128
    return WHOLE_ROW_KEYS if dim <= 64 and not (mean and has_bias) else WHOLE_ROW_KEYS // 2


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


ROW_KEYS = 1024  # keys of a class row held in registers; beyond, rows are cut
ROW_VALUES = 8192  # of k at a time: 64 values for each thread of 4 warps; with 8, sm_100 spills


def class_row(longest: int, dim: int) -> tuple[int, int, int]:
    """Keys and columns of a tile, and warps, for one query against a row of keys."""
    keys = min(max(triton.next_power_of_2(longest), 16), ROW_KEYS)
    # 16 columns of a half dtype are a sector of memory: narrower slices would read it twice
    columns = min(triton.next_power_of_2(max(dim, 1)), max(16, ROW_VALUES // keys))
    return keys, columns, 8 if keys * columns > ROW_VALUES else 4


class AttentionTile(NamedTuple):
    """Queries and keys along the sides of a tile of logits, and the warps that share it."""

    queries: int
    keys: int
    warps: int
    stages: int = 2
    roomy: bool = False


def attention_backward_tiles(device: torch.device, longest_k: int, dim: int, half: bool) -> tuple[AttentionTile, ...]:
    """For attention's gradient: one tile where it holds every key, else those of the passes over queries and keys.

    The largest that spill next to nothing when compiled ahead of time. Hopper and later multiply out of shared memory,
    which leaves registers for twice the keys.
    """
    here = generation(device)
    hopper = here >= 9
    eight = 4 if here == 0 else 8  # wavefronts are two warps wide
    narrow = dim <= 64
    keys = max(32, triton.next_power_of_2(longest_k))
    if half:
        if keys <= (128 if narrow else 64) * (2 if hopper else 1):
            stages = 1 if here == 8 and keys > 64 else 2  # a second one spills
            queries = 32 if (hopper or narrow) and keys <= 128 else 16
            warps = 4 if narrow and keys <= 64 else eight
            return (AttentionTile(queries, keys, warps, stages, roomy=here == 10),)
        if narrow:
            return AttentionTile(64, 64, 4), AttentionTile(32, 64, 4)
        return AttentionTile(64, 32, 4), AttentionTile(32, 64, eight)
    if narrow and keys <= 64:
        return (AttentionTile(16, keys, eight),)
    if narrow:
        return AttentionTile(32, 32, eight), AttentionTile(32, 32, eight)
    return AttentionTile(32, 16, 4), AttentionTile(16, 32, eight)
