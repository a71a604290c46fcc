"""Packed attention over sequences of any lengths, with a key bias and token scores from the same pass."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_count,
    check_cu_seqlens,
    check_float,
    check_offset_values,
    check_real,
    check_tensor,
)
from .._register import register_op
from ..reference import varlen_attention as reference

SCORES: dict[str | None, int] = {
    None: reference.NO_SCORES,
    "class": reference.CLASS_SCORES,
    "mean": reference.MEAN_SCORES,
}


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    scale: float | None = ...,
    key_bias: Tensor | None = ...,
    scores: None = ...,
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    scale: float | None = ...,
    key_bias: Tensor | None = ...,
    scores: Literal["class", "mean"],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    scores: Literal["class", "mean"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention inside each sequence of a packed batch.

    Args:
        q: queries, (Tq, H, d), float32, bfloat16, float16 or float64. Any strides: views of one (T, 3, H, d) are read
            in place (a last stride other than 1 is copied by the native kernel).
        k: keys, (Tk, H, d), dtype of ``q``.
        v: values, (Tk, H, dv), dtype of ``q``; dv may differ from d.
        cu_seqlens_q: offsets of the sequences in ``q``, (B + 1,), int32, from 0, never falling, at most Tq.
        max_seqlen_q: at least the longest query sequence, in tokens; a bound known to the host.
        cu_seqlens_k, max_seqlen_k: the same for keys and values; None: as the queries'.
        scale: factor on the logits, in [-1e9, 1e9]; None: d ** -0.5.
        key_bias: added to the scaled logits of a key, (Tk,) for all heads or (Tk, H), dtype of ``q`` or float32.
            -inf removes the key; the Triton kernels take sizes beyond 2.3e38 for infinite.
        scores: ``"class"``: each key's attention from the first query of its sequence; ``"mean"``: the mean of its
            attention over the queries of its sequence.

    Returns:
        (Tq, H, dv) in the dtype of ``q``; with ``scores`` a pair of it and (Tk, H) float32 (float64 for float64).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also offsets that do not start at
            0, fall, or end beyond the tokens, and a ``max_seqlen`` below the longest sequence. On a GPU the values of
            offsets are not looked at, and after wrong ones the results are undefined.

    Softmax and sums are kept in float32 (float64 for float64); on a GPU float32 factors are multiplied as
    ``torch.backends.cuda.matmul.fp32_precision`` says. Gradients flow to q, k, v and ``key_bias`` (the sum over
    queries, and over heads for a (Tk,) bias, of the logits' gradient), not through the scores: use ``class_attention``
    for those. Deterministic. No device synchronisation. Sequences may be empty: without keys the output is 0, without
    queries the scores are 0. Rows past the last offset are 0.

    Equivalent PyTorch, for each sequence:
        ``F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias, scale=scale)`` on (H, n, d).
    """
    check_float("q", q, ("Tq", "H", "d"))
    _, heads, dim = q.shape
    check_tensor("k", k, ("Tk", heads, dim), q.dtype, q)
    check_tensor("v", v, (k.shape[0], heads, "dv"), q.dtype, q)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_count("max_seqlen_q", max_seqlen_q)
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"k must have {q.shape[0]} tokens like q unless cu_seqlens_k is given, got {k.shape[0]}")
        cu_seqlens_k = cu_seqlens_q
    else:
        check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, torch.int32, q)
    if max_seqlen_k is None:
        if cu_seqlens_k is not cu_seqlens_q:
            raise ValueError("max_seqlen_k must be given with cu_seqlens_k, got None")
        max_seqlen_k = max_seqlen_q
    else:
        check_count("max_seqlen_k", max_seqlen_k)
    if key_bias is not None:
        shape = (k.shape[0],) if isinstance(key_bias, Tensor) and key_bias.dim() == 1 else (k.shape[0], heads)
        check_tensor("key_bias", key_bias, shape, (q.dtype, torch.float32), q)
    check_choice("scores", scores, tuple(SCORES))
    if scale is None:
        scale = dim**-0.5 if dim > 0 else 1.0
    else:
        check_real("scale", scale, -1e9, 1e9)
    out, _, per_key = VARLEN_ATTENTION(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, float(scale), key_bias, SCORES[scores]
    )
    return out if scores is None else (out, per_key.detach())


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, scale: Any, bias: Any, scores: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = 0 if scores == reference.NO_SCORES else k.shape[0]
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[0], q.shape[1], dtype=wide),
        q.new_empty(keys, q.shape[1], dtype=wide),
    )


def _value_checks(q: Tensor, k: Tensor, v: Any, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_: Any) -> None:
    check_offset_values("cu_seqlens_q", cu_q, q.shape[0], max_q)
    check_offset_values("cu_seqlens_k", cu_k, k.shape[0], max_k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, scale, bias, _ = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1], cu_q, cu_k, bias)
    ctx.sizes = max_q, max_k, scale


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k, bias = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_bias = VARLEN_ATTENTION_BACKWARD(
        grad_out, q, k, v, out, lse, cu_q, cu_k, *ctx.sizes, bias
    )
    grad_bias = None if bias is None else (grad_bias.sum(dim=1) if bias.dim() == 1 else grad_bias).to(bias.dtype)
    # none for offsets, longest lengths, scale and the kind of scores
    return grad_q, grad_k, grad_v, None, None, None, None, None, grad_bias, None


def _refuses(q: Tensor, *_: Any) -> str | None:
    return "the native kernel takes no float64" if q.dtype == torch.float64 else None


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "the Triton kernels take no float64"
    widths = q.shape[2], v.shape[2]
    if min(widths) < 1 or max(widths) > 128:
        return f"the Triton kernel takes heads 1 to 128 wide, not {widths[0]} (values {widths[1]})"
    return None


_SIZES = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? key_bias"
)
VARLEN_ATTENTION_BACKWARD = register_op(
    "varlen_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SIZES})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.varlen_attention_backward,
    fake=lambda grad_out, q, k, v, out, lse, *_: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        lse.new_empty(k.shape[0], k.shape[1]),
    ),
    native=True,
    refuses=_refuses,
    triton="varlen_attention_backward",
    triton_refuses=lambda grad_out, *rest: _triton_refuses(*rest),
)
VARLEN_ATTENTION = register_op(
    "varlen_attention",
    f"(Tensor q, Tensor k, Tensor v, {_SIZES}, int scores) -> (Tensor out, Tensor lse, Tensor scores)",
    reference=reference.varlen_attention,
    fake=_fake,
    value_checks=_value_checks,
    native=True,
    refuses=_refuses,
    triton="varlen_attention",
    triton_refuses=_triton_refuses,
    setup_context=_setup_context,
    backward=_backward,
)
