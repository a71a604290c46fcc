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
    mean: bool,
) -> AttentionPlan:
    """How the forward of attention is cut for q (Tq, H, d)."""
    dim, capability = max(q.shape[2], value_dim), _capability(q)
    if not capability:  # a second stage does not fit its scalar registers
        return AttentionPlan(False, 64, 64 if q.element_size() == 2 else 32, 64, warps=4, stages=1)
    if q.element_size() == 4:  # its factors lie in registers
        return AttentionPlan(False, 64, 32, 64, warps=8, stages=2)
    if max_seqlen_k <= _whole_row_keys(capability, dim, has_bias, mean):
        keys = max(64, triton.next_power_of_2(max_seqlen_k))
        tiles = triton.cdiv(max_seqlen_q, QUERY_TILE)
        # K and V are read once a program: as many queries as leave four programs for each multiprocessor
        enough = 4 * _multiprocessors(q)
        together = next((n for n in (4, 2) if batch * q.shape[1] * triton.cdiv(tiles, n) >= enough), 1)
        capped = capability == 9 and dim <= 64 and not (mean and has_bias)
        registers = {64: 128, 128: 168}.get(keys) if capped else None
        return AttentionPlan(True, QUERY_TILE, keys, QUERY_TILE * together, warps=4, stages=2, registers=registers)
    keys = 64 if capability == 9 or (dim <= 64 and not has_bias) else 32  # elsewhere 64 would spill
    if max_seqlen_q <= QUERY_TILE:
        return AttentionPlan(False, 64, keys, 64, warps=4, stages=2)
    # K and V come from the L2 cache once a program: with 64 queries for them it would be the limit
    # 128 registers let two programs run, with or without bias and class row: what spills is used outside the loops
    registers = 128 if capability == 9 and dim <= 64 else None
    return AttentionPlan(False, 128, keys, 128, warps=8, stages=3 if dim <= 64 else 2, registers=registers)


def _whole_row_keys(capability: int, dim: int, has_bias: bool, mean: bool) -> int:
    """Keys whose logits a program can hold for a tile of queries, by what else is in its registers."""
    if capability < 9:  # the right factors of products too
        return 64 if dim <= 64 else 0
    if mean and capability > 9:  # a row lies within a thread, so sums over rows are as large as the tile
        return 64
    return WHOLE_ROW_KEYS if dim <= 64 and not (mean and has_bias) else WHOLE_ROW_KEYS // 2


def _capability(tensor: Tensor) -> int:
    """NVIDIA's generation; 0 for AMD's; the interpreter does as a Hopper."""
    if not tensor.is_cuda:
        return 9
    return 0 if torch.version.hip else torch.cuda.get_device_capability(tensor.device)[0]


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
