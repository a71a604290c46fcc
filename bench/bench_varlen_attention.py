"""Packed attention against a loop over images with PyTorch's own, at the heads of DeiT-S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import BATCHES, DTYPES, LENGTHS, attention_lengths
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import varlen_attention
from mtvit_ops.testing import assert_close_to_float64

HEADS, DIM = 6, 64


def sdpa_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """(T, H, d) each, one image after the other."""
    out, start = torch.empty_like(q), 0
    for length in lengths:
        part = slice(start, start + length)
        heads = (tensor[part].transpose(0, 1)[None] for tensor in (q, k, v))  # (1, H, n, d)
        out[part] = F.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
        start += length
    return out


@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_varlen_attention(dtype: str, name: str, batch: int, compare: Callable[..., Any], smoke: bool) -> None:
    lengths = [min(length, 9) for length in attention_lengths(name, batch)] if smoke else attention_lengths(name, batch)
    qkv = torch.randn(sum(lengths), 3, HEADS, DIM).to(DTYPES[dtype])
    q, k, v = qkv.unbind(1)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest = max(lengths)
    with torch.inference_mode():
        exact = sdpa_loop(q.double(), k.double(), v.double(), lengths)
        plain = sdpa_loop(q, k, v, lengths)
        assert_close_to_float64("out", varlen_attention(q, k, v, cu_seqlens, longest), exact, plain)
    compare(
        {
            "SDPA loop": lambda: sdpa_loop(q, k, v, lengths),
            "varlen_attention": lambda: varlen_attention(q, k, v, cu_seqlens, longest),
            "with class scores": lambda: varlen_attention(q, k, v, cu_seqlens, longest, scores="class"),
            "with mean scores": lambda: varlen_attention(q, k, v, cu_seqlens, longest, scores="mean"),
        },
        "varlen_attention",
        short=True,
        table="attention",
        dtype=dtype,
        batch=batch,
        tokens=name,
    )
