"""A representative row per image, and its increment handed back: the meaning of ``ops.slow_fast_*``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import pick_rows, put_rows, to_padded, token_images, wide_dtype


def slow_fast_merge(
    x: Tensor,  # (R, D)
    weights: Tensor,  # (T,)
    rows: Tensor | None,  # (T,)
    cu_seqlens: Tensor,  # (B + 1,)
    max_seqlen: int,
    normalize: bool,
) -> Tensor:  # (B, D)
    wide = wide_dtype(x.dtype)
    share = _shares(weights.to(wide), cu_seqlens, max_seqlen, normalize)
    tokens = (x if rows is None else pick_rows(x, rows)).to(wide)
    return _sum_by_image(tokens * share[:, None], cu_seqlens, max_seqlen).to(x.dtype)


def slow_fast_merge_backward(
    grad: Tensor,  # (B, D)
    x: Tensor,
    weights: Tensor,
    rows: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # gradients of x and weights
    wide = wide_dtype(x.dtype)
    share = _shares(weights.to(wide), cu_seqlens, max_seqlen, normalize)
    tokens = (x if rows is None else pick_rows(x, rows)).to(wide)
    grad_token = _of_image(grad.to(wide), cu_seqlens, tokens.shape[0])  # (T, D)
    grad_x = grad_token * share[:, None]
    image, _ = token_images(cu_seqlens, tokens.shape[0])
    # what stands past the last offset, NaN too, has no gradient
    grad_share = (grad_token * tokens).sum(dim=1).where(image < cu_seqlens.shape[0] - 1, 0.0)
    if normalize:
        total = _of_image(
            _sum_by_image(weights.to(wide)[:, None], cu_seqlens, max_seqlen), cu_seqlens, weights.shape[0]
        )[:, 0]
        mean = _of_image(
            _sum_by_image((grad_share * share)[:, None], cu_seqlens, max_seqlen), cu_seqlens, weights.shape[0]
        )[:, 0]
        grad_share = torch.where(total == 0, 0.0, (grad_share - mean) / total)
    if rows is not None:
        grad_x = put_rows(grad_x, rows, x.shape[0])
    return grad_x.to(x.dtype), grad_share.to(weights.dtype)


def slow_fast_update(
    x: Tensor,  # (R, D)
    rows: Tensor | None,  # (T,)
    cu_seqlens: Tensor,  # (B + 1,)
    max_seqlen: int,  # only its gradient needs it
    increment: Tensor,  # (B, D)
) -> Tensor:  # (R, D)
    wide = wide_dtype(x.dtype)
    num_tokens = x.shape[0] if rows is None else rows.shape[0]
    step = _of_image(increment.to(wide), cu_seqlens, num_tokens)
    return (x.to(wide) + (step if rows is None else put_rows(step, rows, x.shape[0]))).to(x.dtype)


def slow_fast_update_backward(
    grad: Tensor,  # (R, D)
    rows: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:  # (B, D): the gradient of the increment; that of x is ``grad`` itself
    wide = wide_dtype(grad.dtype)
    return _sum_by_image((grad if rows is None else pick_rows(grad, rows)).to(wide), cu_seqlens, max_seqlen).to(
        grad.dtype
    )


def _shares(weights: Tensor, cu_seqlens: Tensor, max_seqlen: int, normalize: bool) -> Tensor:
    image, _ = token_images(cu_seqlens, weights.shape[0])
    weights = weights.where(image < cu_seqlens.shape[0] - 1, 0.0)
    if not normalize:
        return weights
    total = _of_image(_sum_by_image(weights[:, None], cu_seqlens, max_seqlen), cu_seqlens, weights.shape[0])[:, 0]
    return torch.where(total == 0, 0.0, weights / total)


def _sum_by_image(values: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(T, D) summed to (B, D) in a fixed order."""
    padded, _ = to_padded(values, cu_seqlens, max_seqlen)
    return padded.sum(dim=1)


def _of_image(values: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(B, D) handed to every token of the image (T, D); zeros past the last offset."""
    image, _ = token_images(cu_seqlens, num_tokens)
    return torch.cat((values, values.new_zeros(1, values.shape[1])))[image]
