"""What the op benchmark compares, at DeiT-S in bfloat16: our ops and what plain PyTorch offers for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attention_cases import attention, attention_gradient, class_row
from op_case import OpCase, Sizes
from row_cases import (
    halting,
    layer_norm,
    linear,
    linear_residual,
    merging,
    residual,
    residual_norm,
    selection,
    updating,
)

from mtvit_ops.testing import random_lengths


def cases(sizes: Sizes) -> Iterator[Callable[[], OpCase]]:
    """Makers, in order of worth."""
    longest = sizes.tokens
    for tokens in (longest, sizes.kept, 1 + longest // 4):
        yield lambda tokens=tokens: attention(sizes, [tokens] * sizes.batch, f"{tokens} tokens")
    lengths = random_lengths(sizes.batch, round(0.7 * longest), round(0.3 * longest))
    yield lambda: attention(sizes, lengths, f"{min(lengths)} to {max(lengths)} tokens")
    yield from (lambda make=make: make(sizes) for make in (layer_norm, residual, residual_norm))
    for name, wide, deep in (("qkv", 3, 1), ("fc1, GELU", 4, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
        for live in (1.0, 0.5):
            yield (
                lambda name=name, wide=wide * sizes.dim, deep=deep * sizes.dim, live=live: linear(
                    sizes, name, wide, deep, live
                )
            )
    yield from (lambda make=make: make(sizes) for make in (linear_residual, selection, halting, merging, updating))
    yield lambda: class_row(sizes)
    yield lambda: attention_gradient(sizes, [longest] * sizes.batch)
