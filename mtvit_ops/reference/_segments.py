"""Packed sequences and padded ones, without asking the device for a count."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_images(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Image (T,) int64 of each packed entry, B for entries past the last offset, and its place in it (T,) int64."""
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    image = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    return image, index - cu_seqlens.long()[image]


def to_padded(packed: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(T, ...) as (B, M, ...) with zeros behind each sequence, and which slots are tokens (B, M).

    M is ``max_seqlen``, or T where that is smaller.
    """
    max_seqlen = min(max_seqlen, packed.shape[0])  # a loose bound costs nothing
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    index = start[:, None] + torch.arange(max_seqlen, device=packed.device)
    valid = index < end[:, None]
    # one row of zeros at the end is what the empty slots read
    source = torch.cat((packed, packed.new_zeros(1, *packed.shape[1:])))
    return source[index.where(valid, packed.shape[0])], valid


def to_packed(padded: Tensor, cu_seqlens: Tensor, num_tokens: int, fill: float = 0.0) -> Tensor:
    """Inverse of ``to_padded``; entries past the last offset are ``fill``."""
    batch, length = padded.shape[:2]
    image, place = token_images(cu_seqlens, num_tokens)
    flat = padded.reshape(batch * length, *padded.shape[2:])
    source = torch.cat((flat, flat.new_full((1, *flat.shape[1:]), fill)))
    return source[(image * length + place).where(image < batch, batch * length)]


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], with zeros for the dead entries (-1)."""
    source = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return source[rows.where(rows >= 0, x.shape[0]).long()]


def put_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) of zeros with values at their rows; dead entries (-1) go nowhere."""
    target = values.new_zeros(num_rows + 1, *values.shape[1:])
    return target.index_copy(0, rows.where(rows >= 0, num_rows).long(), values)[:num_rows]
