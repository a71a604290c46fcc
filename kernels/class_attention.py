"""class_attention: the softmax row of one query per sequence, and its gradient.

Grid: one program for a sequence, a head and a run of up to ROW_KEYS keys, which is the whole row at a ViT's lengths.
Its logits stay in registers, collected over slices of the head's width, so that k is read once and the result written
once: 2 * d bytes (half dtypes) and 4 for a token and head. Longer rows are cut into runs: a first launch leaves each
run's maximum and sum, a second adds those up in their order. The gradient reads k once and writes grad_k once; every
program finds the row's mean gradient itself from the two float32 numbers a key has. Of q's gradient a run leaves a
partial sum, and these are added in order. No atomics: results do not depend on who comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import class_row, on_device_of
from ._math import rounded
from ._memory import zero_behind

WHOLE, COLLECT, FINISH = 0, 1, 2  # a row in one launch; of two launches: the first, the second


@triton.jit
def class_attention_fwd_kernel(
    q_ptr,  # (B, H, d)
    k_ptr,  # (T, H, d)
    cu_seqlens_ptr,  # (B + 1,)
    bias_ptr,  # (T,) or (T, H)
    out_ptr,  # (T, H) float32
    partial_ptr,  # (B * H, runs, 2) float32: maximum and sum
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_bt,
    stride_bh,
    scale,
    batch,
    num_tokens,
    num_runs,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pair, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = pair // H, pair % H
    if run == 0:
        end = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        zero_behind(out_ptr, end * H, tl.cast(num_tokens, tl.int64) * H, BLOCK_K)
    start = tl.load(cu_seqlens_ptr + image).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + image + 1) - start
    keys = run * BLOCK_K + tl.arange(0, BLOCK_K)
    live = keys < length
    tokens = start + keys
    logits = tl.zeros((BLOCK_K,), tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        wide = columns < D
        q = tl.load(q_ptr + image * stride_qb + head * stride_qh + columns * stride_qd, mask=wide, other=0.0)
        at = k_ptr + tokens[:, None] * stride_kt + head * stride_kh + columns[None, :] * stride_kd
        k = tl.load(at, mask=live[:, None] & wide[None, :], other=0.0)
        logits += tl.sum(k.to(tl.float32) * q.to(tl.float32)[None, :], axis=1)
    logits *= scale
    if HAS_BIAS:
        logits += tl.load(bias_ptr + tokens * stride_bt + head * stride_bh, mask=live, other=0.0).to(tl.float32)
    logits = tl.where(live, logits, float("-inf"))
    if PHASE == 2:
        runs = tl.arange(0, BLOCK_R)
        at = partial_ptr + (pair * num_runs + runs) * 2
        tops = tl.load(at, mask=runs < num_runs, other=float("-inf"))
        sums = tl.load(at + 1, mask=runs < num_runs, other=0.0)
        top = _finite(tl.max(tops, axis=0))
        total = tl.sum(sums * tl.exp(tops - top), axis=0)
        weights = tl.exp(logits - top)
    else:
        highest = tl.max(logits, axis=0)
        top = _finite(highest)
        weights = tl.exp(logits - top)
        total = tl.sum(weights, axis=0)
    if PHASE == 1:
        at = partial_ptr + (pair * num_runs + run) * 2
        tl.store(at, highest)
        tl.store(at + 1, total)
    else:
        # without a finite key there is no row; NaN stays NaN
        tl.store(out_ptr + tokens * H + head, weights / tl.where(total == 0.0, 1.0, total), mask=live)


@triton.jit
def _finite(top):
    """A maximum that can be subtracted: 0 where there was nothing."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def class_attention_bwd_kernel(
    grad_ptr,  # (T, H)
    probabilities_ptr,  # (T, H) float32
    q_ptr,  # (B, H, d)
    k_ptr,  # (T, H, d)
    cu_seqlens_ptr,  # (B + 1,)
    grad_q_ptr,  # (runs, B, H, d)
    grad_k_ptr,  # (T, H, d)
    grad_bias_ptr,  # (T, H) float32
    stride_gt,
    stride_gh,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    scale,
    batch,
    num_tokens,
    num_runs,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = pair // H, pair % H
    if run == 0:
        first, last = tl.load(cu_seqlens_ptr + batch).to(tl.int64) * H, tl.cast(num_tokens, tl.int64) * H
        zero_behind(grad_k_ptr, first * D, last * D, BLOCK_K)
        zero_behind(grad_bias_ptr, first, last, BLOCK_K)
    start = tl.load(cu_seqlens_ptr + image).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + image + 1) - start
    mean = 0.0
    for other in range(0, num_runs):
        keys = other * BLOCK_K + tl.arange(0, BLOCK_K)
        tokens, live = start + keys, keys < length
        p = tl.load(probabilities_ptr + tokens * H + head, mask=live, other=0.0)
        grad = tl.load(grad_ptr + tokens * stride_gt + head * stride_gh, mask=live, other=0.0)
        mean += tl.sum(p * grad.to(tl.float32), axis=0)
    keys = run * BLOCK_K + tl.arange(0, BLOCK_K)
    tokens, live = start + keys, keys < length
    p = tl.load(probabilities_ptr + tokens * H + head, mask=live, other=0.0)
    grad = tl.load(grad_ptr + tokens * stride_gt + head * stride_gh, mask=live, other=0.0).to(tl.float32)
    grad = p * (grad - mean)
    tl.store(grad_bias_ptr + tokens * H + head, grad, mask=live)
    for first in tl.static_range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        wide = columns < D
        mask = live[:, None] & wide[None, :]
        q = tl.load(q_ptr + image * stride_qb + head * stride_qh + columns * stride_qd, mask=wide, other=0.0)
        at = k_ptr + tokens[:, None] * stride_kt + head * stride_kh + columns[None, :] * stride_kd
        k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        grad_q = tl.sum(grad[:, None] * k, axis=0) * scale
        at = grad_q_ptr + ((run * batch + image) * H + head) * D + columns
        tl.store(at, rounded(grad_q, grad_q_ptr.dtype.element_ty), mask=wide)
        grad_k = grad[:, None] * q.to(tl.float32)[None, :] * scale
        at = grad_k_ptr + (tokens[:, None] * H + head) * D + columns[None, :]
        tl.store(at, rounded(grad_k, grad_k_ptr.dtype.element_ty), mask=mask)


def class_attention(
    q_class: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, key_bias: Tensor | None
) -> Tensor:
    (tokens, heads, dim), batch = k.shape, q_class.shape[0]
    longest = min(max_seqlen, tokens)
    if batch == 0 or heads == 0 or longest == 0:
        return k.new_zeros(tokens, heads, dtype=torch.float32)
    out = k.new_empty(tokens, heads, dtype=torch.float32)
    block_k, block_d, warps = class_row(longest, dim)
    runs = triton.cdiv(longest, block_k)
    partial = None if runs == 1 else out.new_empty(batch * heads, runs, 2)
    cu_seqlens = cu_seqlens.contiguous()
    with on_device_of(k):
        for phase in (WHOLE,) if runs == 1 else (COLLECT, FINISH):
            class_attention_fwd_kernel[(batch * heads, runs)](
                q_class,
                k,
                cu_seqlens,
                key_bias,
                out,
                partial,
                *q_class.stride(),
                *k.stride(),
                0 if key_bias is None else key_bias.stride(0),
                0 if key_bias is None or key_bias.dim() == 1 else key_bias.stride(1),
                scale,
                batch,
                tokens,
                runs,
                H=heads,
                D=dim,
                HAS_BIAS=key_bias is not None,
                PHASE=phase,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                BLOCK_R=triton.next_power_of_2(runs),
                num_warps=warps,
            )
    return out


def class_attention_backward(
    grad: Tensor,
    probabilities: Tensor,
    q_class: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, heads, dim), batch = k.shape, q_class.shape[0]
    longest = min(max_seqlen, tokens)
    if batch == 0 or heads == 0 or longest == 0:
        grad_bias = probabilities.new_zeros(tokens, heads)
        return q_class.new_zeros(q_class.shape), k.new_zeros(k.shape), grad_bias
    grad_k, grad_bias = k.new_empty(k.shape), probabilities.new_empty(tokens, heads)
    block_k, block_d, warps = class_row(longest, dim)
    runs = triton.cdiv(longest, block_k)
    partial = k.new_empty(runs, *q_class.shape, dtype=k.dtype if runs == 1 else torch.float32)
    with on_device_of(k):
        class_attention_bwd_kernel[(batch * heads, runs)](
            grad,
            probabilities.contiguous(),
            q_class,
            k,
            cu_seqlens.contiguous(),
            partial,
            grad_k,
            grad_bias,
            *grad.stride(),
            *q_class.stride(),
            *k.stride(),
            scale,
            batch,
            tokens,
            runs,
            H=heads,
            D=dim,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return partial[0] if runs == 1 else partial.sum(dim=0).to(k.dtype), grad_k, grad_bias
