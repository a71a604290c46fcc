"""What the attention kernels share: logits in powers of 2, the end of a tile of queries, the class row."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._math import dot, rounded

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_bias(bias_ptr, keys, num_keys, stride_bt):
    """What is added to the logits of these keys, in powers of 2; -inf where there is no key."""
    bias = tl.load(bias_ptr + keys.to(tl.int64) * stride_bt, mask=keys < num_keys, other=-float("inf"))
    return bias.to(tl.float32) * LOG2_E


@triton.jit
def finite(maximum):
    """0 for -inf: the maximum of a row without a key is subtracted from -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def signed(q, SIGN: tl.constexpr):
    """Queries with the sign of the scale: the factor stays positive, and the largest product has the largest logit."""
    if SIGN == 1:
        return q
    else:
        return (q.to(tl.float32) * SIGN).to(q.dtype)


@triton.jit
def exponentials(
    q,  # (queries, BLOCK_D), signed
    k,  # (keys, BLOCK_D)
    bias_ptr,  # loaded for each tile: it would take as many registers as the logits of a query
    maximum,  # (queries,), of the logits so far, in powers of 2
    keys,
    num_keys,
    stride_bt,
    factor,  # |scale| * log2(e)
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``2 ** (logits - new maximum)`` of a tile, and the new maximum."""
    logits = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION)
    if HAS_BIAS:
        logits = tl.fma(logits, factor, load_bias(bias_ptr, keys, num_keys, stride_bt)[None, :])
        maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        p = tl.exp2(logits - finite(maximum)[:, None])
    else:
        if MASKED:
            logits = tl.where((keys < num_keys)[None, :], logits, -float("inf"))
        maximum = tl.maximum(maximum, tl.max(logits, axis=1) * factor)
        p = tl.exp2(tl.fma(logits, factor, -finite(maximum)[:, None]))
    return p, maximum


@triton.jit
def reciprocal(total):
    """0 for rows without a key."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def store_tile(
    out_ptr,
    lse_ptr,
    acc,
    maximum,
    total,
    rows,
    num_rows,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write ``out = acc / total`` and lse of a tile of queries; gives lse in powers of 2."""
    no_key = total == 0.0
    lse = tl.where(no_key, -float("inf"), maximum + tl.log2(tl.where(no_key, 1.0, total)))
    columns = tl.arange(0, BLOCK_DV)
    at = out_ptr + rows.to(tl.int64)[:, None] * (H * DV) + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < DV)[None, :]
    tl.store(at, rounded(acc * reciprocal(total)[:, None], out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + rows.to(tl.int64) * H, lse * LN_2, mask=rows < num_rows)
    return lse


@triton.jit
def store_class_row(
    scores_ptr,
    q_ptr,
    k,  # (keys, BLOCK_D)
    bias_ptr,
    lse,  # of the first query, in powers of 2
    keys,
    num_queries,
    num_keys,
    stride_qd,
    stride_bt,
    factor,
    H: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The attention of an image's first query to a tile of keys.

    Its logits are computed once more: taking one row out of a tile of probabilities would cost more. Where K already
    lies in shared memory, as a product with 16 columns, the fewest there are; else a product would take registers that
    no loop over keys has left.
    """
    columns = tl.arange(0, BLOCK_D)
    if IN_SHARED:
        first = tl.arange(0, 16) == 0
        mask = (columns < D)[:, None] & (first & (num_queries > 0))[None, :]
        q = tl.load(q_ptr + columns[:, None] * stride_qd + tl.zeros((1, 16), tl.int32), mask=mask, other=0.0)
        products = dot(k, signed(q, SIGN), tl.zeros((k.shape[0], 16), tl.float32), PRECISION)
        logits = tl.sum(tl.where(first[None, :], products, 0.0), axis=1) * factor
    else:
        q = tl.load(q_ptr + columns * stride_qd, mask=(columns < D) & (num_queries > 0), other=0.0)
        logits = tl.sum(k.to(tl.float32) * signed(q, SIGN).to(tl.float32)[None, :], axis=1) * factor
    if HAS_BIAS:
        logits += load_bias(bias_ptr, keys, num_keys, stride_bt)
    share = tl.where(num_queries > 0, tl.exp2(logits - finite(lse)), 0.0)
    tl.store(scores_ptr + keys.to(tl.int64) * H, share, mask=keys < num_keys)
