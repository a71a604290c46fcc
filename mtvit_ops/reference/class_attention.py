"""The class token's softmax row over packed keys: the meaning of ``ops.class_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._segments import to_packed, to_padded, wide_dtype


def class_attention(
    q_class: Tensor,  # (B, H, d)
    k: Tensor,  # (T, H, d)
    cu_seqlens: Tensor,  # (B + 1,)
    max_seqlen: int,
    scale: float,
    key_bias: Tensor | None,  # (T,) or (T, H)
) -> Tensor:  # (T, H) float32, float64 for float64
    wide = wide_dtype(k.dtype)
    keys, has_key = to_padded(k.to(wide), cu_seqlens, max_seqlen)  # (B, M, H, d)
    logits = torch.einsum("bhd,bkhd->bkh", q_class.to(wide), keys) * scale
    if key_bias is not None:
        bias = key_bias.to(wide) if key_bias.dim() == 2 else key_bias.to(wide)[:, None]
        bias, _ = to_padded(bias, cu_seqlens, max_seqlen)  # (B, M, H or 1)
        logits = logits + bias
    logits = logits.masked_fill(~has_key[..., None], -torch.inf)
    lse = torch.logsumexp(logits, dim=1, keepdim=True)
    # an image without a single finite key has no row, not a row of NaN
    probabilities = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0))
    return to_packed(probabilities, cu_seqlens, k.shape[0])


def class_attention_backward(
    grad: Tensor,  # (T, H)
    probabilities: Tensor,  # (T, H)
    q_class: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of q_class, k and, (T, H), of the bias
    rows, _ = to_padded(probabilities, cu_seqlens, max_seqlen)
    grad_rows, _ = to_padded(grad.to(rows.dtype), cu_seqlens, max_seqlen)
    keys, _ = to_padded(k.to(rows.dtype), cu_seqlens, max_seqlen)
    grad_logits = rows * (grad_rows - (rows * grad_rows).sum(dim=1, keepdim=True))  # (B, M, H)
    grad_q = torch.einsum("bkh,bkhd->bhd", grad_logits, keys) * scale
    grad_k = torch.einsum("bkh,bhd->bkhd", grad_logits, q_class.to(rows.dtype)) * scale
    return (
        grad_q.to(q_class.dtype),
        to_packed(grad_k, cu_seqlens, k.shape[0]).to(k.dtype),
        to_packed(grad_logits, cu_seqlens, k.shape[0]),
    )
