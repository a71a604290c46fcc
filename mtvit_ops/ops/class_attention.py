"""The class token's softmax row alone, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_cu_seqlens, check_float, check_offset_values, check_real, check_tensor
from .._register import register_op
from ..reference import class_attention as reference


def class_attention(
    q_class: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence, the class token, to the sequence's keys.

    Args:
        q_class: the class queries, (B, H, d), float32, bfloat16, float16 or float64.
        k: packed keys, (T, H, d), dtype of ``q_class``, any strides.
        cu_seqlens: offsets of the sequences in ``k``, (B + 1,), int32, from 0, never falling, at most T.
        max_seqlen: at least the longest sequence, in tokens.
        scale: factor on the logits, in [-1e9, 1e9]; None: d ** -0.5.
        key_bias: added to the scaled logits, (T,) or (T, H), dtype of ``k`` or float32.

    Returns:
        Softmax probabilities, (T, H), float32 (float64 for float64); they sum to 1 over each sequence and head.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also bad offsets.

    Gradients flow to ``q_class``, ``k`` and ``key_bias``. Deterministic. No device synchronisation. Empty sequences
    have no entry; entries past the last offset are 0.

    Equivalent PyTorch, for each sequence: ``softmax(einsum("hd,nhd->nh", q, k) * scale + key_bias, dim=0)``.
    """
    check_float("q_class", q_class, ("B", "H", "d"))
    batch, heads, dim = q_class.shape
    check_tensor("k", k, ("T", heads, dim), q_class.dtype, q_class)
    check_tensor("cu_seqlens", cu_seqlens, (batch + 1,), torch.int32, q_class)
    check_cu_seqlens("cu_seqlens", cu_seqlens, q_class)
    check_count("max_seqlen", max_seqlen)
    if key_bias is not None:
        shape = (k.shape[0],) if isinstance(key_bias, Tensor) and key_bias.dim() == 1 else (k.shape[0], heads)
        check_tensor("key_bias", key_bias, shape, (k.dtype, torch.float32), k)
    if scale is None:
        scale = dim**-0.5 if dim > 0 else 1.0
    else:
        check_real("scale", scale, -1e9, 1e9)
    return CLASS_ATTENTION(q_class, k, cu_seqlens, max_seqlen, float(scale), key_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q_class, k, cu_seqlens, max_seqlen, scale, bias = inputs
    ctx.save_for_backward(output, q_class, k, cu_seqlens)
    ctx.rest = max_seqlen, scale, None if bias is None else (bias.dim(), bias.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    probabilities, q_class, k, cu_seqlens = ctx.saved_tensors
    max_seqlen, scale, bias = ctx.rest
    grad_q, grad_k, grad_bias = CLASS_ATTENTION_BACKWARD(grad, probabilities, q_class, k, cu_seqlens, max_seqlen, scale)
    grad_bias = None if bias is None else (grad_bias.sum(dim=1) if bias[0] == 1 else grad_bias).to(bias[1])
    return grad_q, grad_k, None, None, None, grad_bias  # none for offsets, longest length and scale


CLASS_ATTENTION_BACKWARD = register_op(
    "class_attention_backward",
    "(Tensor grad, Tensor probabilities, Tensor q_class, Tensor k, Tensor cu_seqlens, SymInt max_seqlen, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.class_attention_backward,
    fake=lambda grad, probabilities, q_class, k, *_: (
        torch.empty_like(q_class, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(probabilities),
    ),
    triton="class_attention",
)
CLASS_ATTENTION = register_op(
    "class_attention",
    "(Tensor q_class, Tensor k, Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? key_bias) -> Tensor",
    reference=reference.class_attention,
    fake=lambda q_class, k, *_: k.new_empty(
        k.shape[0], k.shape[1], dtype=torch.float64 if k.dtype == torch.float64 else torch.float32
    ),
    value_checks=lambda q_class, k, cu_seqlens, max_seqlen, *_: check_offset_values(
        "cu_seqlens", cu_seqlens, k.shape[0], max_seqlen
    ),
    triton="class_attention",
    setup_context=_setup_context,
    backward=_backward,
)
