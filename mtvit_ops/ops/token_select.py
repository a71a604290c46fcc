"""Which tokens live on: scores, counts, a threshold or a mask become the next row list."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check_choice,
    check_count,
    check_cu_seqlens,
    check_offset_values,
    check_real,
    check_rows,
    check_tensor,
)
from .._register import register_op
from ..reference import token_select as reference

ORDERS = ("ascending", "score")


class TokenSelection(NamedTuple):
    """The next row list, and on request the list of what was dropped; -1 fills the room behind the live entries."""

    rows: Tensor  # (capacity,) int32
    cu_seqlens: Tensor  # (B + 1,) int32
    dropped_rows: Tensor | None = None  # (dropped capacity,) int32
    dropped_cu_seqlens: Tensor | None = None  # (B + 1,) int32


def token_select(
    scores: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    *,
    keep: int | Tensor | None = None,
    threshold: float | None = None,
    mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    order: Literal["ascending", "score"] = "ascending",
    return_dropped: bool = False,
    capacity: int | None = None,
    max_seqlen: int | None = None,
) -> TokenSelection:
    """Shorten a row list by exactly one of a count, a threshold or a mask.

    Args:
        scores: one score per entry of ``rows``, (T,), any float dtype; may be None with ``mask``. NaN ranks below
            -inf and passes no threshold.
        rows: the current list, (T,), int32; None: entry i is row i.
        cu_seqlens: offsets of the images in it, (B + 1,), int32, from 0, never falling, at most T. Entries past the
            last offset are dead and ignored.
        keep: tokens to keep per image, prefix included: one int for all images, or (B,) int32. Each in
            [num_prefix_tokens, the image's length]. The highest scores win, equal scores by the smaller position.
        threshold: keep where ``scores > threshold``; may be infinite, not NaN.
        mask: keep where True, (T,), bool.
        num_prefix_tokens: entries at the head of each image that are always kept, >= 0; all of a shorter image's.
        order: of the entries within an image: ``"ascending"``, as they stood, or ``"score"``, the prefix, then falling
            scores.
        return_dropped: also list what was dropped, in the same order.
        capacity: length of the new list where the host cannot know it (per-image counts, threshold, mask), >= the
            number of kept tokens; None: T, which always suffices. With one int ``keep`` it is B * keep.
        max_seqlen: at least the longest image's number of entries, as the host knows it; None: T. A bound of at most
            4096 lets a GPU hold an image at once.

    Returns:
        TokenSelection(rows, cu_seqlens, dropped_rows, dropped_cu_seqlens); the last two are None unless asked for. The
        live count is ``cu_seqlens[-1]``, on the device; entries behind it are -1. The dropped list has room for
        T - B * keep entries with an int ``keep``, else for T.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, none or several of keep, threshold and mask;
            on the CPU also bad offsets, a count beyond its image or below the prefix, a capacity or a max_seqlen too
            small. On a GPU counts are clamped to the image, what exceeds the capacity is lost, and a max_seqlen below
            the longest image leaves entries undefined.

    Integers: no gradient. Deterministic, with the tie rule above. No device synchronisation. Images may be empty, and
    may lose every token.

    Equivalent PyTorch, for one image and a count: ``rows[scores.topk(keep).indices.sort().values]``.
    """
    given = scores if scores is not None else mask
    if given is None:
        raise ValueError("scores must be given unless a mask is, got None for both")
    if scores is not None:
        check_tensor("scores", scores, ("T",), FLOATS)
    if mask is not None:
        check_tensor("mask", mask, given.shape if scores is not None else ("T",), torch.bool, given)
    tokens = given.shape[0]
    if rows is not None:
        check_rows("rows", rows, given, tokens)
    check_cu_seqlens("cu_seqlens", cu_seqlens, given)
    batch = cu_seqlens.shape[0] - 1
    check_count("num_prefix_tokens", num_prefix_tokens)
    check_choice("order", order, ORDERS)
    if (keep is not None) + (threshold is not None) + (mask is not None) != 1:
        names = [
            name for name, value in (("keep", keep), ("threshold", threshold), ("mask", mask)) if value is not None
        ]
        raise ValueError(f"exactly one of keep, threshold and mask must be given, got {' and '.join(names) or 'none'}")
    if scores is None and mask is None:
        raise ValueError("scores must be given with keep or threshold, got None")
    if threshold is not None:
        check_real("threshold", threshold, -math.inf, math.inf)

    count, keep_counts = -1, None
    room, dropped_room = tokens, tokens
    if isinstance(keep, Tensor):
        check_tensor("keep", keep, (batch,), torch.int32, given)
        keep_counts = keep
    elif keep is not None:
        check_count("keep", keep, num_prefix_tokens)
        if batch * keep > tokens:
            raise ValueError(
                f"keep must be at most each image's tokens, got {keep} for {batch} images of {tokens} in all"
            )
        count, room, dropped_room = keep, batch * keep, tokens - batch * keep
    if capacity is not None:
        check_count("capacity", capacity)
        room = capacity
    if max_seqlen is not None:
        check_count("max_seqlen", max_seqlen)
    result = TOKEN_SELECT(
        scores,
        rows,
        cu_seqlens,
        mask,
        keep_counts,
        count,
        None if threshold is None else float(threshold),
        num_prefix_tokens,
        order == "score",
        room,
        return_dropped,
        dropped_room if return_dropped else 0,
        tokens if max_seqlen is None else max_seqlen,
    )
    return TokenSelection(*result) if return_dropped else TokenSelection(*result[:2])


def _fake(
    scores: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    keep_counts: Tensor | None,
    keep: int,
    threshold: float | None,
    num_prefix_tokens: int,
    by_score: bool,
    capacity: int,
    return_dropped: bool,
    dropped_capacity: int,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        cu_seqlens.new_empty(capacity),
        torch.empty_like(cu_seqlens),
        cu_seqlens.new_empty(dropped_capacity if return_dropped else 0),
        torch.empty_like(cu_seqlens),
    )


def _value_checks(
    scores: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    keep_counts: Tensor | None,
    keep: int,
    threshold: float | None,
    num_prefix_tokens: int,
    by_score: bool,
    capacity: int,
    return_dropped: bool,
    dropped_capacity: int,
    max_seqlen: int,
) -> None:
    given = mask if scores is None else scores
    assert given is not None
    offsets = check_offset_values("cu_seqlens", cu_seqlens, given.shape[0], max_seqlen)
    lengths = [after - before for before, after in zip(offsets, offsets[1:])]
    if keep_counts is not None or keep >= 0:
        counts = [keep] * len(lengths) if keep_counts is None else keep_counts.tolist()
        for image, (count, length) in enumerate(zip(counts, lengths)):
            if not min(num_prefix_tokens, length) <= count <= length:
                raise ValueError(
                    f"keep must be in [{min(num_prefix_tokens, length)}, {length}] for image {image}, got {count}"
                )
        kept = sum(counts)
    else:
        if mask is None:
            assert scores is not None
            assert threshold is not None
            mask = scores > threshold
        kept = sum(
            min(num_prefix_tokens, length) + int(mask[start + num_prefix_tokens : start + length].sum())
            for start, length in zip(offsets, lengths)
        )
    if kept > capacity:
        raise ValueError(f"capacity must hold the {kept} kept tokens, got {capacity}")


def _native(*args: Any) -> Any:
    """The native kernel, which needs no bound; a wrong one is an error wherever values are looked at."""
    *rest, max_seqlen = args
    given, cu_seqlens = args[3] if args[0] is None else args[0], args[2]
    if max_seqlen < given.shape[0] and cu_seqlens.shape[0] > 1:
        longest = int(cu_seqlens.diff().max())
        if longest > max_seqlen:
            raise ValueError(f"max_seqlen must be at least the longest image, {longest}, got {max_seqlen}")
    return torch.ops.mtvit_ops_cpp.token_select.default(*rest)


def _cuda(*args: Any) -> Any:
    return torch.ops.mtvit_ops_cuda.token_select.default(*args[:-1])


TOKEN_SELECT = register_op(
    "token_select",
    "(Tensor? scores, Tensor? rows, Tensor cu_seqlens, Tensor? mask, Tensor? keep_counts, SymInt keep,"
    " float? threshold, int num_prefix_tokens, bool by_score, SymInt capacity, bool return_dropped,"
    " SymInt dropped_capacity, SymInt max_seqlen)"
    " -> (Tensor rows, Tensor cu_seqlens, Tensor dropped_rows, Tensor dropped_cu_seqlens)",
    reference=reference.token_select,
    fake=_fake,
    value_checks=_value_checks,
    native=_native,
    triton="token_select",
    cuda=_cuda,
)
