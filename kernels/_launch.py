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
WHOLE_ROW_KEYS = 256  # of 64 logits rows: 128 registers a thread of 4 warps, which leaves two programs a multiprocessor
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
    keys: int  # of a tile
    queries: int  # of a tile
    span: int  # queries of a program
    warps: int
    stages: int


def attention_plan(tensor: Tensor, batch: int, max_seqlen_q: int, max_seqlen_k: int, value_dim: int) -> AttentionPlan:
    """Tiles for q (Tq, H, d)."""
    heads, dim = tensor.shape[1], max(tensor.shape[2], value_dim)
    if tensor.element_size() == 2 and max_seqlen_k <= _whole_row_keys(tensor, dim):
        keys = max(64, triton.next_power_of_2(max_seqlen_k))
        tiles = triton.cdiv(max(max_seqlen_q, 1), QUERY_TILE)
        # K and V are read once a program: as many queries as leave four programs for each multiprocessor
        enough = 4 * _multiprocessors(tensor)
        many = next((n for n in (4, 2) if batch * heads * triton.cdiv(tiles, n) >= enough), 1)
        return AttentionPlan(True, keys, QUERY_TILE, QUERY_TILE * many, 4, 2)
    if tensor.element_size() == 4:
        return AttentionPlan(False, 32, 64, 64, 4, 2)  # products of float32 keep their factors in registers
    if max_seqlen_q <= QUERY_TILE:
        return AttentionPlan(False, 64, 64, 64, 4, 2)
    # K and V come from the L2 cache once a program: with 64 queries it would be the limit
    return AttentionPlan(False, 64, 128, 128, 8, 3 if dim <= 64 else 2)


def _whole_row_keys(tensor: Tensor, dim: int) -> int:
    """Below Hopper a product's right factor lies in registers: a row of keys would not fit beside its logits."""
    if tensor.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(tensor.device)[0] < 9):
        return 64 if dim <= 64 else 0
    return WHOLE_ROW_KEYS if dim <= 64 else WHOLE_ROW_KEYS // 2


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
