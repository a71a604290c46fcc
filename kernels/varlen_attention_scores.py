"""The mean attention a key gets from its image's queries, where ``varlen_attention`` leaves it to a second step.

``add_partials``: the whole-row kernel has left one sum for each span of queries; they are added in order.
``mean_scores``: the flash kernel cannot know final probabilities, so they are computed again from its lse, with keys as
rows: one program for a head and a tile of an image's keys, which walks the queries in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._attention import LOG2_E, load_bias, signed
from ._launch import SCORES_TILE, dot_precision, on_device_of, work_list
from ._math import dot
from ._packed import fill_behind, find_span, load_rows, span_of

PARTIAL_ENTRIES = 1024  # of a program: 8 a thread


@triton.jit(do_not_specialize=["num_keys", "batch", "chunks", "spans"])
def add_partials_kernel(
    partial_ptr,  # (spans, Tk, H), a sum over the queries of a span; written where the image has that span
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    scores_ptr,  # (Tk, H)
    num_keys,
    batch,
    chunks,
    spans,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    fill_behind(scores_ptr, cu_seqlens_k_ptr, batch, num_keys, 0.0, H)
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    _, queries = span_of(cu_seqlens_q_ptr, image)
    first, keys = span_of(cu_seqlens_k_ptr, image)
    entries = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = entries < keys * H
    at = partial_ptr + first * H + entries
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, tl.minimum(tl.cdiv(queries, SPAN), spans)):
        total += tl.load(at, mask=mask, other=0.0)
        at += num_keys.to(tl.int64) * H
    tl.store(scores_ptr + first * H + entries, total / tl.maximum(queries, 1).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["num_keys", "batch", "spans"])
def mean_scores_kernel(
    q_ptr,  # (Tq, H, d)
    k_ptr,  # (Tk, H, d)
    bias_ptr,  # (Tk,) or (Tk, H)
    lse_ptr,  # (Tq, H)
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    scores_ptr,  # (Tk, H)
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_bt,
    stride_bh,
    factor,
    num_keys,
    batch,
    spans,
    H: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    fill_behind(scores_ptr, cu_seqlens_k_ptr, batch, num_keys, 0.0, H)
    head = (tl.program_id(0) % H).to(tl.int64)
    image, place = find_span(tl.program_id(0) // H, cu_seqlens_k_ptr, batch, spans, BLOCK_K, FLAT)
    first_key, length_k = span_of(cu_seqlens_k_ptr, image)
    if place * BLOCK_K >= length_k:
        return
    first_query, length_q = span_of(cu_seqlens_q_ptr, image)
    keys = place * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ptr += first_key * stride_kt + head * stride_kh
    k = load_rows(k_ptr, keys, stride_kt, stride_kd, length_k, D, BLOCK_D, True)
    q_ptr += first_query * stride_qt + head * stride_qh
    bias = tl.zeros((BLOCK_K,), tl.float32)
    if HAS_BIAS:
        bias = load_bias(bias_ptr + first_key * stride_bt + head * stride_bh, keys, length_k, stride_bt)
    total = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for start in range(0, length_q, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, queries, stride_qt, stride_qd, length_q, D, BLOCK_D, True)
        at = lse_ptr + (first_query + queries) * H + head
        lse = tl.load(at, mask=queries < length_q, other=float("inf")) * LOG2_E
        lse = tl.where(lse == -float("inf"), float("inf"), lse)  # a query without a key attends to nothing
        products = dot(k, tl.trans(signed(q, SIGN)), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION)
        total += tl.exp2(tl.fma(products, factor, bias[:, None] - lse[None, :]))
    mean = tl.sum(total, axis=1) / tl.maximum(length_q, 1).to(tl.float32)
    tl.store(scores_ptr + (first_key + keys) * H + head, mean, mask=keys < length_k)


def add_partials(
    partial: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, span: int, max_seqlen_k: int
) -> Tensor:  # (Tk, H)
    """Sums over the spans of each image, in order, by its number of queries."""
    spans, keys, heads = partial.shape
    scores = partial.new_empty(keys, heads)
    batch = cu_seqlens_q.shape[0] - 1
    chunks = max(1, triton.cdiv(max_seqlen_k * heads, PARTIAL_ENTRIES))
    with on_device_of(partial):
        add_partials_kernel[(batch * chunks,)](
            partial,
            cu_seqlens_q,
            cu_seqlens_k,
            scores,
            keys,
            batch,
            chunks,
            spans,
            H=heads,
            SPAN=span,
            BLOCK=PARTIAL_ENTRIES,
            num_warps=4,
        )
    return scores


def mean_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    factor: float,
    sign: int,
    key_bias: Tensor | None,
) -> Tensor:  # (Tk, H)
    """The mean over an image's queries of ``2 ** (logits - lse)``."""
    keys, heads, dim = k.shape
    scores = lse.new_empty(keys, heads)
    batch = cu_seqlens_q.shape[0] - 1
    work = work_list(keys, batch, max_seqlen_k, SCORES_TILE)
    with on_device_of(q):
        mean_scores_kernel[(work.items * heads,)](
            q,
            k,
            key_bias,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            scores,
            *q.stride(),
            *k.stride(),
            0 if key_bias is None else key_bias.stride(0),
            key_bias.stride(1) if key_bias is not None and key_bias.dim() == 2 else 0,
            factor,
            keys,
            batch,
            work.spans,
            H=heads,
            D=dim,
            SIGN=sign,
            HAS_BIAS=key_bias is not None,
            FLAT=work.flat,
            PRECISION=dot_precision(),
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_K=SCORES_TILE,
            BLOCK_Q=32 if q.element_size() == 4 else 64,
            num_warps=8 if q.element_size() == 4 else 4,
        )
    return scores
