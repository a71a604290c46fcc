"""Attention over packed sequences, padded out and masked: the meaning of ``ops.varlen_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import to_packed, to_padded, wide_dtype

NO_SCORES, CLASS_SCORES, MEAN_SCORES = 0, 1, 2


def varlen_attention(
    q: Tensor,  # (Tq, H, d)
    k: Tensor,  # (Tk, H, d)
    v: Tensor,  # (Tk, H, dv)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    key_bias: Tensor | None,  # (Tk,) or (Tk, H)
    scores: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (Tq, H, dv), (Tq, H), (Tk, H) or (0, H)
    logits, has_query = _logits(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, key_bias)
    lse = torch.logsumexp(logits, dim=-1)  # (B, H, Mq)
    probabilities = _probabilities(logits, lse)  # (B, H, Mq, Mk)
    values, _ = to_padded(v.to(logits.dtype), cu_seqlens_k, max_seqlen_k)  # (B, Mk, H, dv)
    out = to_packed(torch.einsum("bhqk,bkhd->bqhd", probabilities, values), cu_seqlens_q, q.shape[0])
    # entries past the last sequence saw no key: -inf, as for a sequence without keys
    lse = to_packed(lse.transpose(1, 2), cu_seqlens_q, q.shape[0], fill=-torch.inf)
    return out.to(q.dtype), lse, _scores(probabilities, has_query, cu_seqlens_k, k.shape[0], scores)


def varlen_attention_backward(
    grad_out: Tensor,  # (Tq, H, dv)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # gradients of q, k, v and, (Tk, H), of the bias
    logits, _ = _logits(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, key_bias)
    wide = logits.dtype
    probabilities = _probabilities(logits, torch.logsumexp(logits, dim=-1))
    grad, _ = to_padded(grad_out.to(wide), cu_seqlens_q, max_seqlen_q)
    queries, _ = to_padded(q.to(wide), cu_seqlens_q, max_seqlen_q)
    keys, _ = to_padded(k.to(wide), cu_seqlens_k, max_seqlen_k)
    values, _ = to_padded(v.to(wide), cu_seqlens_k, max_seqlen_k)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    mean_grad = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
    grad_logits = probabilities * (grad_probabilities - mean_grad)  # (B, H, Mq, Mk)
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_logits, keys) * scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_logits, queries) * scale
    grad_v = torch.einsum("bhqk,bqhd->bkhd", probabilities, grad)
    grad_bias = grad_logits.sum(dim=2).transpose(1, 2)  # (B, Mk, H)
    return (
        to_packed(grad_q, cu_seqlens_q, q.shape[0]).to(q.dtype),
        to_packed(grad_k, cu_seqlens_k, k.shape[0]).to(k.dtype),
        to_packed(grad_v, cu_seqlens_k, v.shape[0]).to(v.dtype),
        to_packed(grad_bias, cu_seqlens_k, k.shape[0]),
    )


def _logits(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B, H, Mq, Mk), -inf where there is no key, and which query slots are tokens (B, Mq)."""
    wide = wide_dtype(q.dtype)
    queries, has_query = to_padded(q.to(wide), cu_seqlens_q, max_seqlen_q)
    keys, has_key = to_padded(k.to(wide), cu_seqlens_k, max_seqlen_k)
    logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * scale
    if key_bias is not None:
        bias = key_bias.to(wide) if key_bias.dim() == 2 else key_bias.to(wide)[:, None]
        bias, _ = to_padded(bias, cu_seqlens_k, max_seqlen_k)  # (B, Mk, H or 1)
        logits = logits + bias.transpose(1, 2)[:, :, None]
    return logits.masked_fill(~has_key[:, None, None], -torch.inf), has_query


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    # a row without a single finite key sums to nothing instead of to NaN
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _scores(probabilities: Tensor, has_query: Tensor, cu_seqlens_k: Tensor, num_keys: int, scores: int) -> Tensor:
    if scores == NO_SCORES:
        return probabilities.new_zeros(0, probabilities.shape[1])
    rows = probabilities * has_query[:, None, :, None]
    if scores == CLASS_SCORES:
        per_key = rows[:, :, :1].sum(dim=2)  # (B, H, Mk); a sum, so that no query at all gives zeros
    else:
        per_key = rows.sum(dim=2) / has_query.sum(dim=1).clamp_min(1)[:, None, None]
    return to_packed(per_key.transpose(1, 2), cu_seqlens_k, num_keys)
