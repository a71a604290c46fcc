"""varlen_attention_backward: gradients of q, k, v and the key bias, probabilities recomputed from the log-sum-exp.

Where one tile holds every key of a sequence, one program does a sequence and a head: it walks the queries once,
finishes grad_q tile by tile and keeps grad_k, grad_v and grad_bias (one number for a key and head; whoever asked adds
up heads) in registers. Five products of tiles; q, k, v and grad_out are read once, and ``out`` is not: the sum of
grad_out * out is also that of p * grad_p over the keys, which are all there. The tile halves where a sequence is short.

Longer sequences take two launches, a program for a sequence, a head and a tile of its tokens. The first, over tiles of
queries, walks the keys for grad_q and leaves delta = sum(grad_out * out) for the second, which, over tiles of keys,
walks the queries for the rest. Seven products instead of the five that atomics would need, and the same bits every
time. Heads lie next to each other along grid x, then tiles, then sequences: neighbours share the memory they read.

Logits stay in natural units: a bias of 1e30 in all keys then cancels against the log-sum-exp to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import AttentionTile, attention_backward_tiles, dot_precision, on_device_of, roomy
from ._math import dot, rounded
from ._memory import zero_behind

SMALLEST_ROW = 64  # keys of the tile that a program of the first kind halves its own down to


@triton.jit
def _load(ptr, tokens, stride_t, columns, stride_d, mask):
    return tl.load(ptr + tokens[:, None] * stride_t + columns[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _store(ptr, tokens, stride_t, columns, value, mask):
    tl.store(ptr + tokens[:, None] * stride_t + columns[None, :], rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    bias_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_bias_ptr,
    start_q,
    length_q,
    start_k,
    length_k,
    stride_gt,
    stride_gd,
    stride_qt,
    stride_qd,
    stride_kt,
    stride_kd,
    stride_vt,
    stride_vd,
    stride_bt,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One sequence and head, all of whose keys fit BLOCK_K; pointers are the head's."""
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wide, value_wide = (columns < D)[None, :], (value_columns < DV)[None, :]
    keys = tl.arange(0, BLOCK_K)
    live = keys < length_k
    tokens = start_k + keys
    k = _load(k_ptr, tokens, stride_kt, columns, stride_kd, live[:, None] & wide)
    v = _load(v_ptr, tokens, stride_vt, value_columns, stride_vd, live[:, None] & value_wide)
    bias = tl.where(live, 0.0, float("-inf"))
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tokens * stride_bt, mask=live, other=float("-inf")).to(tl.float32)
    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    grad_bias = tl.zeros((BLOCK_K,), tl.float32)
    varies = tl.where(length_k == 1, 0.0, 1.0)  # the weight of a single key is 1, whatever its logit
    for first in range(0, length_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        there = queries < length_q
        tokens_q = start_q + queries
        q = _load(q_ptr, tokens_q, stride_qt, columns, stride_qd, there[:, None] & wide)
        grad = _load(grad_ptr, tokens_q, stride_gt, value_columns, stride_gd, there[:, None] & value_wide)
        lse = tl.load(lse_ptr + tokens_q * H, mask=there, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key, no probability
        logits = dot(k, tl.trans(q), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION) * scale + bias[:, None]
        p = tl.exp(logits - lse[None, :])
        if (
            q.dtype == tl.float32
        ):  # lse is rounded: beside half dtypes nothing, in float32 it would be the largest error
            mass = tl.sum(p, axis=0)
            p /= tl.where(mass == 0.0, 1.0, mass)[None, :]
        grad_v = dot(rounded(p, grad.dtype), grad, grad_v, PRECISION)
        grad_p = dot(v, tl.trans(grad), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION)
        delta = tl.sum(p * grad_p, axis=0)
        grad_logits = p * (grad_p - delta[None, :])
        grad_bias += tl.sum(grad_logits, axis=1)
        narrow = rounded(grad_logits, q.dtype)
        grad_k = dot(narrow, q, grad_k, PRECISION)
        grad_q = dot(tl.trans(narrow), k, tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), PRECISION)
        _store(grad_q_ptr, tokens_q, H * D, columns, grad_q * (scale * varies), there[:, None] & wide)
    tl.store(grad_bias_ptr + tokens * H, grad_bias * varies, mask=live)
    _store(grad_k_ptr, tokens, H * D, columns, grad_k * (scale * varies), live[:, None] & wide)
    _store(grad_v_ptr, tokens, H * DV, value_columns, grad_v, live[:, None] & value_wide)


@triton.jit
def varlen_attention_bwd_row_kernel(
    grad_ptr,  # (Tq, H, dv)
    q_ptr,  # (Tq, H, d)
    k_ptr,  # (Tk, H, d)
    v_ptr,  # (Tk, H, dv)
    lse_ptr,  # (Tq, H) float32
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    bias_ptr,  # (Tk,) or (Tk, H)
    grad_q_ptr,  # (Tq, H, d)
    grad_k_ptr,  # (Tk, H, d)
    grad_v_ptr,  # (Tk, H, dv)
    grad_bias_ptr,  # (Tk, H) float32
    stride_gt,
    stride_gh,
    stride_gd,
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
    scale,
    batch,
    num_queries,
    num_keys,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    head, image = (tl.program_id(0) % H).to(tl.int64), tl.program_id(0) // H
    end, total = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64) * H, tl.cast(num_queries, tl.int64) * H
    zero_behind(grad_q_ptr, end * D, total * D, BLOCK_K * BLOCK_D)
    end, total = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64) * H, tl.cast(num_keys, tl.int64) * H
    zero_behind(grad_k_ptr, end * D, total * D, BLOCK_K * BLOCK_D)
    zero_behind(grad_v_ptr, end * DV, total * DV, BLOCK_K * BLOCK_DV)
    zero_behind(grad_bias_ptr, end, total, BLOCK_K)
    start_q = tl.load(cu_seqlens_q_ptr + image).to(tl.int64)
    length_q = (tl.load(cu_seqlens_q_ptr + image + 1) - start_q).to(tl.int32)
    start_k = tl.load(cu_seqlens_k_ptr + image).to(tl.int64)
    length_k = (tl.load(cu_seqlens_k_ptr + image + 1) - start_k).to(tl.int32)
    grad_ptr += head * stride_gh
    q_ptr += head * stride_qh
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    lse_ptr += head
    if HAS_BIAS:
        bias_ptr += head * stride_bh
    grad_q_ptr += head * D
    grad_k_ptr += head * D
    grad_v_ptr += head * DV
    grad_bias_ptr += head
    # the bound is the host's, the length the device's: an image shorter than it pays for the tile it fills
    for halvings in tl.static_range(LEVELS):
        above = -1 if halvings == LEVELS - 1 else BLOCK_K >> halvings + 1
        if (length_k > above) & (length_k <= BLOCK_K >> halvings):
            _row(
                grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, bias_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_bias_ptr,
                start_q, length_q, start_k, length_k, stride_gt, stride_gd, stride_qt, stride_qd, stride_kt, stride_kd,
                stride_vt, stride_vd, stride_bt, scale, H, D, DV, HAS_BIAS, PRECISION,
                BLOCK_K >> halvings, BLOCK_Q, BLOCK_D, BLOCK_DV,
            )  # fmt: skip


@triton.jit
def varlen_attention_bwd_q_kernel(
    grad_ptr,  # (Tq, H, dv)
    q_ptr,  # (Tq, H, d)
    k_ptr,  # (Tk, H, d)
    v_ptr,  # (Tk, H, dv)
    out_ptr,  # (Tq, H, dv)
    lse_ptr,  # (Tq, H) float32
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    bias_ptr,  # (Tk,) or (Tk, H)
    delta_ptr,  # (Tq, H) float32
    grad_q_ptr,  # (Tq, H, d)
    stride_gt,
    stride_gh,
    stride_gd,
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
    scale,
    batch,
    num_queries,
    num_tiles,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    head, tile, image = (program % H).to(tl.int64), program // H % num_tiles, program // H // num_tiles
    end = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    zero_behind(grad_q_ptr, end * (H * D), tl.cast(num_queries, tl.int64) * (H * D), BLOCK_Q * BLOCK_D)
    start_q = tl.load(cu_seqlens_q_ptr + image).to(tl.int64)
    length_q = (tl.load(cu_seqlens_q_ptr + image + 1) - start_q).to(tl.int32)
    if tile * BLOCK_Q >= length_q:
        return
    start_k = tl.load(cu_seqlens_k_ptr + image).to(tl.int64)
    length_k = (tl.load(cu_seqlens_k_ptr + image + 1) - start_k).to(tl.int32)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wide, value_wide = (columns < D)[None, :], (value_columns < DV)[None, :]
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = queries < length_q
    tokens = start_q + queries
    q = _load(q_ptr + head * stride_qh, tokens, stride_qt, columns, stride_qd, there[:, None] & wide)
    grad = _load(grad_ptr + head * stride_gh, tokens, stride_gt, value_columns, stride_gd, there[:, None] & value_wide)
    out = _load(out_ptr + head * DV, tokens, H * DV, value_columns, 1, there[:, None] & value_wide)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + tokens * H + head, delta, mask=there)
    lse = tl.load(lse_ptr + tokens * H + head, mask=there, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # no key, no probability
    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in tl.range(0, length_k, BLOCK_K, disable_licm=True):  # what is hoisted spills
        keys = first + tl.arange(0, BLOCK_K)
        live = keys < length_k
        tokens_k = start_k + keys
        k = _load(k_ptr + head * stride_kh, tokens_k, stride_kt, columns, stride_kd, live[:, None] & wide)
        v = _load(v_ptr + head * stride_vh, tokens_k, stride_vt, value_columns, stride_vd, live[:, None] & value_wide)
        bias = tl.where(live, 0.0, float("-inf"))
        if HAS_BIAS:
            bias = tl.load(bias_ptr + head * stride_bh + tokens_k * stride_bt, mask=live, other=float("-inf")).to(
                tl.float32
            )
        logits = dot(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION) * scale + bias[None, :]
        p = tl.exp(logits - lse[:, None])
        grad_p = dot(grad, tl.trans(v), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION)
        grad_logits = p * (grad_p - delta[:, None])
        grad_q = dot(rounded(grad_logits, k.dtype), k, grad_q, PRECISION)
    varies = tl.where(length_k == 1, 0.0, 1.0)  # the weight of a single key is 1, whatever its logit
    _store(grad_q_ptr + head * D, tokens, H * D, columns, grad_q * (scale * varies), there[:, None] & wide)


@triton.jit
def varlen_attention_bwd_k_kernel(
    grad_ptr,  # (Tq, H, dv)
    q_ptr,  # (Tq, H, d)
    k_ptr,  # (Tk, H, d)
    v_ptr,  # (Tk, H, dv)
    lse_ptr,  # (Tq, H) float32
    delta_ptr,  # (Tq, H) float32
    cu_seqlens_q_ptr,  # (B + 1,)
    cu_seqlens_k_ptr,  # (B + 1,)
    bias_ptr,  # (Tk,) or (Tk, H)
    grad_k_ptr,  # (Tk, H, d)
    grad_v_ptr,  # (Tk, H, dv)
    grad_bias_ptr,  # (Tk, H) float32
    stride_gt,
    stride_gh,
    stride_gd,
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
    scale,
    batch,
    num_keys,
    num_tiles,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    head, tile, image = (program % H).to(tl.int64), program // H % num_tiles, program // H // num_tiles
    end, total = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64) * H, tl.cast(num_keys, tl.int64) * H
    zero_behind(grad_k_ptr, end * D, total * D, BLOCK_K * BLOCK_D)
    zero_behind(grad_v_ptr, end * DV, total * DV, BLOCK_K * BLOCK_DV)
    zero_behind(grad_bias_ptr, end, total, BLOCK_K)
    start_k = tl.load(cu_seqlens_k_ptr + image).to(tl.int64)
    length_k = (tl.load(cu_seqlens_k_ptr + image + 1) - start_k).to(tl.int32)
    if tile * BLOCK_K >= length_k:
        return
    start_q = tl.load(cu_seqlens_q_ptr + image).to(tl.int64)
    length_q = (tl.load(cu_seqlens_q_ptr + image + 1) - start_q).to(tl.int32)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wide, value_wide = (columns < D)[None, :], (value_columns < DV)[None, :]
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    live = keys < length_k
    tokens = start_k + keys
    k = _load(k_ptr + head * stride_kh, tokens, stride_kt, columns, stride_kd, live[:, None] & wide)
    v = _load(v_ptr + head * stride_vh, tokens, stride_vt, value_columns, stride_vd, live[:, None] & value_wide)
    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    grad_bias = tl.zeros((BLOCK_K,), tl.float32)
    bias = tl.zeros((BLOCK_K,), tl.float32)  # keys behind the last are not stored, so they need no removal
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tokens * stride_bt + head * stride_bh, mask=live, other=0.0).to(tl.float32)
    for first in range(0, length_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        there = queries < length_q
        tokens_q = start_q + queries
        q = _load(q_ptr + head * stride_qh, tokens_q, stride_qt, columns, stride_qd, there[:, None] & wide)
        grad = _load(
            grad_ptr + head * stride_gh, tokens_q, stride_gt, value_columns, stride_gd, there[:, None] & value_wide
        )
        lse = tl.load(lse_ptr + tokens_q * H + head, mask=there, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + tokens_q * H + head, mask=there, other=0.0)
        # keys along the rows: sums over queries then run along a row
        logits = dot(k, tl.trans(q), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION) * scale + bias[:, None]
        p = tl.exp(logits - lse[None, :])
        grad_v = dot(rounded(p, grad.dtype), grad, grad_v, PRECISION)
        grad_p = dot(v, tl.trans(grad), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION)
        grad_logits = p * (grad_p - delta[None, :])
        grad_bias += tl.sum(grad_logits, axis=1)
        grad_k = dot(rounded(grad_logits, q.dtype), q, grad_k, PRECISION)
    varies = tl.where(length_k == 1, 0.0, 1.0)
    tl.store(grad_bias_ptr + tokens * H + head, grad_bias * varies, mask=live)
    _store(grad_k_ptr + head * D, tokens, H * D, columns, grad_k * (scale * varies), live[:, None] & wide)
    _store(grad_v_ptr + head * DV, tokens, H * DV, value_columns, grad_v, live[:, None] & value_wide)


def varlen_attention_backward(
    grad_out: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (queries, heads, dim), (keys, _, value_dim), batch = q.shape, v.shape, cu_seqlens_q.shape[0] - 1
    longest_q, longest_k = min(max_seqlen_q, queries), min(max_seqlen_k, keys)
    if batch == 0 or heads == 0 or longest_q == 0 or longest_k == 0:
        grad_bias = lse.new_zeros(keys, heads)
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), grad_bias
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_bias = lse.new_empty(keys, heads)
    out, lse = out.contiguous(), lse.contiguous()  # as the forward op gives them
    inputs, grads = (grad_out, q, k, v), (grad_q, grad_k, grad_v, grad_bias)
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), key_bias
    bias_strides = (0, 0) if key_bias is None else (*key_bias.stride(), 0)[:2]
    numbers = *(stride for tensor in inputs for stride in tensor.stride()), *bias_strides, scale, batch
    constants = {
        "H": heads,
        "D": dim,
        "DV": value_dim,
        "HAS_BIAS": key_bias is not None,
        "PRECISION": dot_precision(),
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
    }

    def sizes(tile: AttentionTile) -> dict[str, int]:
        sides = {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
        return {**sides, "num_warps": tile.warps, "num_stages": tile.stages, **(roomy(q.device) if tile.roomy else {})}

    tile, *second = attention_backward_tiles(q.device, longest_k, max(dim, value_dim), q.element_size() == 2)
    with on_device_of(q):
        if not second:
            levels = max(1, tile.keys // SMALLEST_ROW).bit_length()
            varlen_attention_bwd_row_kernel[(batch * heads,)](
                *inputs, lse, *offsets, *grads, *numbers, queries, keys, LEVELS=levels, **constants, **sizes(tile)
            )
            return grads
        delta = lse.new_empty(queries, heads)
        tiles = triton.cdiv(longest_q, tile.queries)
        varlen_attention_bwd_q_kernel[(batch * tiles * heads,)](
            *inputs, out, lse, *offsets, delta, grad_q, *numbers, queries, tiles, **constants, **sizes(tile)
        )
        tile = second[0]
        tiles = triton.cdiv(longest_k, tile.keys)
        varlen_attention_bwd_k_kernel[(batch * tiles * heads,)](
            *inputs, lse, delta, *offsets, *grads[1:], *numbers, keys, tiles, **constants, **sizes(tile)
        )
    return grads
