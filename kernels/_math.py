"""Helpers on loaded values: what every kernel needs, and what keeps the interpreter honest about bfloat16."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 bit patterns and rounds towards zero (triton#11584, #11585): kernels widen right
# after a load, and take products and roundings from here. On a GPU these branches compile to nothing.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; PRECISION ("ieee" or "tf32") matters for float32 factors."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """A float32 value in the dtype of a result, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        nearest = tl.where(x != x, bits | 0x400000, nearest) & -65536
        return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)
