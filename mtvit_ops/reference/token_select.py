"""Keeping tokens by score, threshold or mask: the meaning of ``ops.token_select``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import token_images


def token_select(
    scores: Tensor | None,  # (T,)
    rows: Tensor | None,  # (T,)
    cu_seqlens: Tensor,  # (B + 1,)
    mask: Tensor | None,  # (T,) bool
    keep_counts: Tensor | None,  # (B,)
    keep: int,  # -1: not given
    threshold: float | None,
    num_prefix_tokens: int,
    by_score: bool,
    capacity: int,
    return_dropped: bool,
    dropped_capacity: int,
    max_seqlen: int,  # a bound that kernels need
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rows, cu_seqlens, dropped rows, dropped cu_seqlens
    given = mask if scores is None else scores
    assert given is not None
    num_tokens, batch = given.shape[0], cu_seqlens.shape[0] - 1
    image, place = token_images(cu_seqlens, num_tokens)
    if rows is None:
        rows = torch.arange(num_tokens, device=given.device, dtype=torch.int32)
    is_prefix = place < num_prefix_tokens
    order = _order(scores, image, is_prefix)  # best first within each image
    if mask is not None:
        kept = is_prefix | mask
    elif threshold is not None:
        assert scores is not None
        kept = is_prefix | (scores > threshold)
    else:
        wanted = cu_seqlens.new_full((batch,), keep) if keep_counts is None else keep_counts
        rank = torch.empty_like(place).index_copy_(0, order, place)
        kept = rank < torch.cat((wanted, wanted.new_zeros(1)))[image]
    listing = order if by_score else torch.arange(num_tokens, device=given.device)
    live = image < batch
    result = _compact(rows, image, kept & live, listing, batch, capacity)
    if return_dropped:
        return *result, *_compact(rows, image, ~kept & live, listing, batch, dropped_capacity)
    return *result, rows.new_empty(0), torch.zeros_like(cu_seqlens)


def _order(scores: Tensor | None, image: Tensor, is_prefix: Tensor) -> Tensor:
    """Entries by image, then prefix, then falling score; NaN last; equals in the order they stand in."""
    group = 4 * image + 2 * (~is_prefix)
    if scores is None:
        return torch.argsort(group, stable=True)
    key = torch.where(is_prefix, 0.0, scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    by_score = torch.argsort(key, descending=True, stable=True)
    group = group + (scores.isnan() & ~is_prefix)
    return by_score[torch.argsort(group[by_score], stable=True)]


def _compact(
    rows: Tensor, image: Tensor, chosen: Tensor, listing: Tensor, batch: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """The chosen entries' rows in listing order, -1 behind them, and their offsets."""
    picked = chosen[listing]
    slot = torch.cumsum(picked, 0) - 1
    # what is not chosen, or finds no room, lands in one extra slot that is cut off
    slot = slot.where(picked & (slot < capacity), capacity)
    out = rows.new_full((capacity + 1,), -1).scatter_(0, slot, rows[listing])[:capacity]
    counts = torch.zeros(batch + 1, dtype=torch.int64, device=rows.device).scatter_add_(0, image, chosen.long())[:batch]
    return out.clone(), torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0)).to(torch.int32)
