"""Helpers that touch memory, for kernels over packed tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zero_behind(ptr, first, last, BLOCK: tl.constexpr):
    """Zeros in [first, last) of a contiguous array, shared out among the programs along grid x.

    The kernel that writes the live entries writes those behind the last offset too: no second launch, no count asked.
    """
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first + tl.program_id(0).to(tl.int64) * BLOCK, last, step):
        at = start + tl.arange(0, BLOCK)
        tl.store(ptr + at, tl.zeros((BLOCK,), tl.float32).to(ptr.dtype.element_ty), mask=at < last)
