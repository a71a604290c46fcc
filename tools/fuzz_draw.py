"""Random arguments for the operators that tools/fuzz_cases.py calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_DTYPES = (torch.float64, torch.int32, torch.int64, torch.bool)
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


class Draw:
    """Random arguments; ``bad`` says how often something is drawn that does not fit."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed & 0x7FFFFFFF)
        self.bad = self.random.choice((0.0, 0.0, 0.15))
        self.dtype = self.random.choice(DTYPES)

    def spoilt(self) -> bool:
        return self.random.random() < self.bad

    def size(self, most: int = 40) -> int:
        return self.random.choice((0, 1, 2, self.random.randint(0, most), self.random.randint(0, most)))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values of a normal distribution, in one of many memory layouts."""
        dtype = dtype or self.dtype
        if self.spoilt():
            dtype = self.random.choice(DTYPES + ODD_DTYPES)
        if self.spoilt():
            shape = tuple(max(0, size + self.random.choice((-1, 0, 1))) for size in shape)
        if self.spoilt():
            shape = shape[1:] if self.random.random() < 0.5 else (*shape, 2)
        layout = self.random.randrange(5)
        if layout == 1:  # every other row
            made = torch.randn(*(2 * size if place == 0 else size for place, size in enumerate(shape)))[::2]
        elif layout == 2 and shape:  # the left part of wider rows
            made = torch.randn(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
        elif layout == 3:  # turned
            made = torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))
        elif layout == 4 and shape and self.random.random() < 0.3:  # one row, many times
            made = torch.randn(1, *shape[1:]).expand(*shape)
        else:
            made = torch.randn(*shape)
        return made.to(dtype)

    def offsets(self, batch: int, total: int) -> Tensor:
        """From 0, never falling, ending at ``total`` or before; or not."""
        inner = sorted(self.random.randint(0, total) for _ in range(batch))
        values = [0, *inner][: batch + 1]
        if self.spoilt():
            place = self.random.randrange(len(values))
            values[place] = self.random.choice((-1, total + 1, 2**31 - 1, -(2**31), self.random.randint(-5, total + 5)))
        if self.spoilt():
            values = values[:-1]
        made = torch.tensor(values, dtype=torch.int64 if self.spoilt() else torch.int32)
        return made.repeat_interleave(2)[::2] if self.random.random() < 0.2 else made

    def rows(self, count: int, num_rows: int) -> Tensor:
        """Different rows in ascending order, some entries dead; or not."""
        count = min(count, num_rows)
        values = sorted(self.random.sample(range(num_rows), count)) + [-1] * self.random.choice((0, 0, 3))
        if self.spoilt() and values:
            values[self.random.randrange(len(values))] = self.random.choice((-2, num_rows, 2**31 - 1, -(2**31)))
        return torch.tensor(values, dtype=torch.int64 if self.spoilt() else torch.int32)

    def longest(self, offsets: Tensor) -> int:
        found = int(offsets.diff().max()) if len(offsets) > 1 else 0
        return (
            max(0, found + self.random.choice((0, 0, 5))) if not self.spoilt() else self.random.choice((-1, found - 1))
        )

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.random.random() < 0.5 else None
