"""varlen_attention: softmax attention inside each sequence of a packed batch, with token scores from the same pass.

Two ways through the keys, chosen by the bound on an image's keys (``_launch.attention_plan``):

- WHOLE_ROW: all keys in one tile. K and V of an image and head are read once and serve a span of up to 256 queries, 64
  at a time. Nothing is rescaled, probabilities are final in registers, and "mean" is a sum over what is there.
- else any number of keys, tile after tile under a running maximum; "mean" is then a second launch.

Grid: one program for a head (fastest) and a span of an image's queries; those past an image's end leave at once. Where
the bound on lengths gives more programs than the tokens can need, they are numbered by tokens (``_packed.find_span``),
so a batch of very different lengths pays for what is there. Starting with the longest images would help the last wave
only, and takes a sort: not done. Memory sees q, k, v and out once, and 4 bytes a head and token for lse and scores; K
and V are read again, from the L2 cache, by each span. Rows past the last offset are shared out among all programs.

Deterministic: every result has one writer, and sums over spans go through a buffer and are added in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import exponentials, finite, reciprocal, signed, store_class_row, store_tile
from ._launch import attention_plan, dot_precision, on_device_of, work_list
from ._math import dot, rounded
from ._packed import fill_behind, find_span, load_rows, span_of
from .varlen_attention_scores import add_partials, mean_scores

NO_SCORES, CLASS_SCORES, MEAN_SCORES = 0, 1, 2
SMALLEST_FACTOR = 2.0**-126  # below it, as for a scale of 0, all logits are 0


# counts differ from call to call: they get no kernel of their own
@triton.jit(do_not_specialize=["num_queries", "num_keys", "batch", "spans"])
def varlen_attention_kernel(
    q_ptr,  # (Tq, H, d)
    k_ptr,  # (Tk, H, d)
    v_ptr,  # (Tk, H, dv)
    bias_ptr,  # (Tk,) or (Tk, H)
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    out_ptr,  # (Tq, H, dv)
    lse_ptr,  # (Tq, H) float32
    scores_ptr,  # (Tk, H) float32; PARTIAL: (spans, Tk, H), sums over the queries of a span
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_bt,
    stride_bh,
    factor,  # |scale| * log2(e)
    num_queries,
    num_keys,
    batch,
    spans,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLASS: tl.constexpr,
    MEAN: tl.constexpr,
    PARTIAL: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    fill_behind(out_ptr, cu_seqlens_q_ptr, batch, num_queries, 0.0, H * DV)
    fill_behind(lse_ptr, cu_seqlens_q_ptr, batch, num_queries, -float("inf"), H)
    if CLASS or (MEAN and not PARTIAL):
        fill_behind(scores_ptr, cu_seqlens_k_ptr, batch, num_keys, 0.0, H)
    head = (tl.program_id(0) % H).to(tl.int64)
    image, place = find_span(tl.program_id(0) // H, cu_seqlens_q_ptr, batch, spans, SPAN, FLAT)
    first_query, length_q = span_of(cu_seqlens_q_ptr, image)
    start = place * SPAN
    # scores of an image without queries are zeros, and its first program writes them
    if place >= spans or (start >= length_q and (place > 0 or not (CLASS or MEAN))):
        return
    first_key, length_k = span_of(cu_seqlens_k_ptr, image)
    q_ptr += first_query * stride_qt + head * stride_qh
    k_ptr += first_key * stride_kt + head * stride_kh
    v_ptr += first_key * stride_vt + head * stride_vh
    scores_ptr += first_key * H + head
    if HAS_BIAS:
        bias_ptr += first_key * stride_bt + head * stride_bh
    if WHOLE_ROW:
        keys = tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, keys, stride_kt, stride_kd, length_k, D, BLOCK_D, True)
        v = load_rows(v_ptr, keys, stride_vt, stride_vd, length_k, DV, BLOCK_DV, True)
    first_lse = tl.zeros((BLOCK_Q,), tl.float32)
    # a thread has rows r and r + 8 of a product's tile: those are added at once, the others after the last tile
    sums = tl.zeros((BLOCK_Q // 16, 8, BLOCK_K), tl.float32)
    for first_row in tl.range(
        start,
        tl.minimum(start + SPAN, length_q),
        BLOCK_Q,
        num_stages=STAGES if WHOLE_ROW else 1,
        disable_licm=WHOLE_ROW,
    ):
        rows = first_row + tl.arange(0, BLOCK_Q)
        q = signed(load_rows(q_ptr, rows, stride_qt, stride_qd, length_q, D, BLOCK_D, True), SIGN)
        acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
        maximum = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        if WHOLE_ROW:
            p, maximum = exponentials(
                q, k, bias_ptr, maximum, keys, length_k, stride_bt, factor, HAS_BIAS, True, PRECISION
            )
            total = tl.sum(p, axis=1)
            if MEAN:  # before the product: of a row of logits there is room for one copy
                shares = p * tl.where(rows < length_q, reciprocal(total), 0.0)[:, None]
                sums += tl.sum(tl.reshape(shares, (BLOCK_Q // 16, 2, 8, BLOCK_K)), axis=1)
            acc = dot(rounded(p, v.dtype), v, acc, PRECISION)
        else:
            whole = length_k // BLOCK_K * BLOCK_K
            for MASKED in tl.static_range(2):  # the tiles without a mask first
                for at in tl.range(
                    whole if MASKED else 0, length_k if MASKED else whole, BLOCK_K, num_stages=STAGES, disable_licm=True
                ):
                    keys = at + tl.arange(0, BLOCK_K)
                    k = load_rows(k_ptr, keys, stride_kt, stride_kd, length_k, D, BLOCK_D, MASKED == 1)
                    p, higher = exponentials(
                        q, k, bias_ptr, maximum, keys, length_k, stride_bt, factor, HAS_BIAS, MASKED == 1, PRECISION
                    )
                    v = load_rows(v_ptr, keys, stride_vt, stride_vd, length_k, DV, BLOCK_DV, MASKED == 1)
                    shrink = tl.exp2(maximum - finite(higher))
                    acc = dot(rounded(p, v.dtype), v, acc * shrink[:, None], PRECISION)
                    total = total * shrink + tl.sum(p, axis=1)
                    maximum = higher
        lse = store_tile(
            out_ptr + (first_query * H + head) * DV,
            lse_ptr + first_query * H + head,
            acc,
            maximum,
            total,
            rows,
            length_q,
            H,
            DV,
            BLOCK_DV,
        )
        if CLASS:
            first_lse = tl.where(rows == 0, finite(lse), first_lse)
    if CLASS:  # noqa: SIM102
        if place == 0:
            class_lse = tl.sum(first_lse, axis=0)
            for at in tl.range(0, 1 if WHOLE_ROW else length_k, BLOCK_K, num_stages=1 if WHOLE_ROW else 2):
                keys = at + tl.arange(0, BLOCK_K)
                if not WHOLE_ROW:
                    k = load_rows(k_ptr, keys, stride_kt, stride_kd, length_k, D, BLOCK_D, True)
                store_class_row(
                    scores_ptr,
                    q_ptr,
                    k,
                    bias_ptr,
                    class_lse,
                    keys,
                    length_q,
                    length_k,
                    stride_qd,
                    stride_bt,
                    factor,
                    H,
                    D,
                    SIGN,
                    HAS_BIAS,
                    WHOLE_ROW,
                    BLOCK_D,
                    PRECISION,
                )
    if MEAN:
        per_key = tl.sum(tl.sum(sums, axis=0), axis=0)
        if PARTIAL:
            scores_ptr += place.to(tl.int64) * num_keys * H
        else:
            per_key = per_key / tl.maximum(length_q, 1).to(tl.float32)
        tl.store(scores_ptr + tl.arange(0, BLOCK_K) * H, per_key, mask=tl.arange(0, BLOCK_K) < length_k)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    key_bias: Tensor | None,
    scores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, dim = q.shape
    num_keys, value_dim = k.shape[0], v.shape[2]
    batch = cu_seqlens_q.shape[0] - 1
    if min(tokens, num_keys, heads, batch) == 0:
        return (
            q.new_zeros(tokens, heads, value_dim),
            q.new_full((tokens, heads), -math.inf, dtype=torch.float32),
            q.new_zeros(0 if scores == NO_SCORES else num_keys, heads, dtype=torch.float32),
        )
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, tokens), min(max_seqlen_k, num_keys)
    has_bias, class_row, mean = key_bias is not None, scores == CLASS_SCORES, scores == MEAN_SCORES
    extras = {"has_bias": has_bias, "class_row": class_row, "mean": mean}
    plan = attention_plan(q, value_dim, batch, max_seqlen_q, max_seqlen_k, **extras)
    work = work_list(tokens, batch, max_seqlen_q, plan.span)
    out = q.new_empty(tokens, heads, value_dim)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    mean_inside = mean and plan.whole_row
    partial = mean_inside and work.spans > 1
    shape = (work.spans, num_keys) if partial else (num_keys,) if mean_inside or class_row else (0,)
    per_key = q.new_empty(*shape, heads, dtype=torch.float32)
    factor = abs(scale) * math.log2(math.e)
    sign = 0 if factor < SMALLEST_FACTOR else 1 if scale > 0 else -1
    factor = factor if sign else 1.0
    limit = {} if plan.registers is None else {"maxnreg": plan.registers}
    with on_device_of(q):
        varlen_attention_kernel[(work.items * heads,)](
            q,
            k,
            v,
            key_bias,
            cu_seqlens_q,
            cu_seqlens_k,
            out,
            lse,
            per_key,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            0 if key_bias is None else key_bias.stride(0),
            key_bias.stride(1) if key_bias is not None and key_bias.dim() == 2 else 0,
            factor,
            tokens,
            num_keys,
            batch,
            work.spans,
            H=heads,
            D=dim,
            DV=value_dim,
            SIGN=sign,
            HAS_BIAS=has_bias,
            CLASS=class_row,
            MEAN=mean_inside,
            PARTIAL=partial,
            FLAT=work.flat,
            WHOLE_ROW=plan.whole_row,
            PRECISION=dot_precision(),
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
            BLOCK_Q=plan.queries,
            BLOCK_K=plan.keys,
            SPAN=plan.span,
            STAGES=plan.stages,
            num_warps=plan.warps,
            **limit,
        )
    if partial:
        per_key = add_partials(per_key, cu_seqlens_q, cu_seqlens_k, plan.span, max_seqlen_k)
    elif mean and not mean_inside:
        per_key = mean_scores(q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, factor, sign, key_bias)
    return out, lse, per_key
