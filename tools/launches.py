"""Sample arguments for every launcher in ``kernels/``: what the kernel report compiles.

A new op is a function here that yields the launcher's name, a name for the case, and the arguments, on the CPU. Shapes
are those of DeiT-T, S and B; one batch is divisible by 16, the others are odd, because Triton compiles these apart.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
PATCH, SIDE = 16, 224
BATCH: int | None = None  # images of every sample, where they are to be measured


class Shape(NamedTuple):
    """A batch of equally long images, and makers of what ops take."""

    name: str
    images: int
    tokens: int  # of an image
    heads: int
    dtype: torch.dtype = BFLOAT16

    @property
    def batch(self) -> int:
        return BATCH or self.images

    @property
    def packed(self) -> int:
        return self.batch * self.tokens

    @property
    def dim(self) -> int:
        return 64 * self.heads

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype)

    def x(self) -> Tensor:
        return self.values(self.packed, self.dim)

    def rows(self) -> Tensor:
        return torch.arange(self.packed, dtype=torch.int32)

    def offsets(self) -> Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32) * self.tokens

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Strided views of one (T, 3, H, d), as the model's linear gives them."""
        return self.values(self.packed, 3, self.heads, 64).unbind(1)

    def per_head(self, dtype: torch.dtype = FLOAT32) -> Tensor:
        return self.values(self.packed, self.heads, dtype=dtype)


TINY, SMALL, BASE = Shape("DeiT-T", 3, 197, 3), Shape("DeiT-S", 64, 197, 6), Shape("DeiT-B", 5, 197, 12)
SIZES = (TINY, SMALL, BASE)

Sample = tuple[str, str, tuple[Any, ...]]  # launcher, case, arguments
Samples = Callable[[], Iterator[Sample]]
TABLE: list[Samples] = []


def launches(function: Samples) -> Samples:
    """Into the table."""
    TABLE.append(function)
    return function


def table(stems: list[str] | None = None) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Case, launcher and arguments for the files named, or for all."""
    found = _launchers(stems)
    for samples in TABLE:
        for launcher, case, args in samples():
            if launcher in found:
                yield f"{launcher} {case}", found[launcher], args


def stems() -> list[str]:
    """Files in ``kernels/`` that hold launchers."""
    folder = importlib.import_module("mtvit_ops.kernels").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def names() -> set[str]:
    """Launchers with samples."""
    return {launcher for samples in TABLE for launcher, _, _ in samples()}


def _launchers(wanted: list[str] | None) -> dict[str, Callable[..., Any]]:
    modules = [importlib.import_module(f"mtvit_ops.kernels.{stem}") for stem in wanted or stems()]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }


def _both(sizes: tuple[Shape, ...] = SIZES) -> Iterator[Shape]:
    """Every size in bfloat16, one in float32."""
    yield from sizes
    yield SMALL._replace(dtype=FLOAT32)


@launches
def scatter_residual() -> Iterator[Sample]:
    for size in _both():
        x, rows = size.x(), size.rows()
        scales = {"": None, ", scale (D,)": size.values(size.dim), ", scale (T, 1)": size.values(size.packed, 1)}
        for text, scale in scales.items():
            yield "scatter_residual_", f"{size}{text}", (x, rows, x.clone(), scale)
            yield "scatter_residual_backward", f"{size}{text}", (x, rows, x.clone(), scale)
    x = SMALL.x()
    yield "scatter_residual", f"{SMALL}, no rows", (x, None, x.clone(), None)
    yield "scatter_residual_backward", f"{SMALL}, no rows", (x, None, x.clone(), None)


@launches
def gather_layer_norm() -> Iterator[Sample]:
    for size in _both():
        x, weight, stat = size.x(), size.values(size.dim), size.values(size.packed, dtype=FLOAT32)
        yield "gather_layer_norm", str(size), (x, size.rows(), weight, weight, 1e-6)
        yield "gather_layer_norm_backward", str(size), (x, x.clone(), size.rows(), weight, stat, stat)
    x, wide, stat = SMALL.x(), SMALL.values(SMALL.dim, dtype=FLOAT32), SMALL.values(SMALL.packed, dtype=FLOAT32)
    for text, rows in ((", float32 weights", SMALL.rows()), (", float32 weights, no rows", None)):
        yield "gather_layer_norm", f"{SMALL}{text}", (x, rows, wide, wide, 1e-6)
        yield "gather_layer_norm_backward", f"{SMALL}{text}", (x, x.clone(), rows, wide, stat, stat)


@launches
def scatter_residual_layer_norm() -> Iterator[Sample]:
    for size in _both():
        x, weight = size.x(), size.values(size.dim)
        rest = (x.clone(), weight, weight, 1e-6)
        yield "scatter_residual_layer_norm_", str(size), (x, size.rows(), *rest, None)
        yield "scatter_residual_layer_norm", f"{size}, no rows", (x, None, *rest, None)
    yield "scatter_residual_layer_norm_", f"{size}, scale (D,)", (x, size.rows(), *rest, weight)
    yield "scatter_residual_layer_norm", f"{size}, scale (T, 1)", (x, size.rows(), *rest, size.values(size.packed, 1))


@launches
def ragged_linear() -> Iterator[Sample]:
    for size in (*_both(), TINY._replace(dtype=FLOAT16)):
        dim, offsets = size.dim, size.offsets()
        for text, wide, deep, gelu in (("qkv", 3 * dim, dim, False), ("fc1", 4 * dim, dim, True)):
            layer = (size.values(size.packed, deep), size.values(wide, deep), size.values(wide), offsets)
            yield "ragged_linear", f"{size}, {text}", (*layer, gelu)
            if size.images < 16:  # its product with the weight's shape runs for real
                yield "ragged_linear_backward", f"{size}, {text}", (size.values(size.packed, wide), *layer, gelu)
        for text, deep in (("proj", dim), ("fc2", 4 * dim)):
            layer = (size.values(size.packed, deep), size.values(dim, deep), size.values(dim), offsets)
            yield "ragged_linear_residual_", f"{size}, {text}", (size.x(), size.rows(), *layer, None)
        yield "ragged_linear_residual", f"{size}, fc2, no rows, scale (D,)", (size.x(), None, *layer, size.values(dim))


SCORES = {"": 0, ", class scores": 1, ", mean scores": 2}


@launches
def varlen_attention() -> Iterator[Sample]:
    def cases() -> Iterator[tuple[str, Shape, Tensor | None, int]]:
        for tokens in (50, 99, 197, 577):
            for text, scores in SCORES.items():
                yield text, SMALL._replace(images=8, tokens=tokens), None, scores
        for dtype in (FLOAT16, FLOAT32):
            for text, scores in SCORES.items():
                yield text, TINY._replace(dtype=dtype), None, scores
        yield ", bias (T,)", TINY, TINY.values(TINY.packed), 1
        yield ", bias (T, H)", TINY, TINY.per_head(), 2
        yield ", bias (T,)", TINY._replace(dtype=FLOAT32), TINY.values(TINY.packed, dtype=FLOAT32), 1

    for text, size, bias, scores in cases():
        (q, k, v), offsets, longest = size.qkv(), size.offsets(), size.tokens
        sizes = offsets, offsets, longest, longest, 0.125, bias
        yield "varlen_attention", f"{size}, {size.tokens} tokens{text}", (q, k, v, *sizes, scores)
        if scores == 0 or bias is not None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            args = (out, q, k, v, out.clone(), size.per_head(), *sizes)
            yield "varlen_attention_backward", f"{size}, {size.tokens} tokens{text}", args


@launches
def class_attention() -> Iterator[Sample]:
    shapes = (SMALL._replace(images=8, tokens=50), TINY, SMALL._replace(images=8, tokens=577))
    for size in (*shapes, TINY._replace(dtype=FLOAT32), TINY._replace(dtype=FLOAT16)):
        _, k, _ = size.qkv()
        q, rest = size.values(size.batch, size.heads, 64), (size.offsets(), size.tokens, 0.125)
        case = f"{size}, {size.tokens} tokens"
        yield "class_attention", case, (q, k, *rest, None)
        yield "class_attention_backward", case, (size.per_head(), size.per_head(), q, k, *rest)
    _, k, _ = TINY.qkv()
    q, rest = TINY.values(TINY.batch, TINY.heads, 64), (TINY.offsets(), TINY.tokens, 0.125)
    yield "class_attention", f"{TINY}, bias (T,)", (q, k, *rest, TINY.values(TINY.packed))
    yield "class_attention", f"{TINY}, bias (T, H)", (q, k, *rest, TINY.per_head())


@launches
def token_select() -> Iterator[Sample]:
    # every size of tile, and lists of which the host knows no bound
    for images, tokens, bounded in (
        (64, 197, True),
        (3, 50, True),
        (3, 577, True),
        (2, 1500, True),
        (3, 4096, True),
        (64, 197, False),
    ):
        size = Shape("", images, tokens, 6)
        wide = size.packed
        bound = tokens if bounded else wide
        rows, offsets = size.rows(), size.offsets()
        text = f"{size.batch} x {tokens}{'' if bounded else ' without bound'}"
        counts, mask = torch.full((size.batch,), 40, dtype=torch.int32), torch.zeros(wide, dtype=torch.bool)
        for dtype in (FLOAT32, BFLOAT16):
            scores = torch.zeros(wide, dtype=dtype)
            for rule, *given in (
                ("keep", scores, None, offsets, None, None, 40, None),
                ("counts", scores, rows, offsets, None, counts, -1, None),
                ("threshold", scores, rows, offsets, None, None, -1, 0.5),
                ("mask", scores, rows, offsets, mask, None, -1, None),
            ):
                for by_score, dropped in ((False, False), (False, True), (True, True)):
                    rest = (1, by_score, wide, dropped, wide if dropped else 0, bound)
                    case = f"{text}, {dtype}, {rule}, by score {by_score}, dropped {dropped}"
                    yield "token_select", case, (*given, *rest)


@launches
def halting_step() -> Iterator[Sample]:
    for size in _both():
        gate = (10.0, 30.0, 0.01)
        offsets, sums = size.offsets(), size.values(size.packed, dtype=FLOAT32)
        output = size.values(size.batch, size.dim, dtype=FLOAT32)
        counters = torch.ones(size.packed, dtype=torch.int32)
        for text, rows, last in (("", size.rows(), False), (", no rows", None, False), (", last", size.rows(), True)):
            lists = (size.x(), rows, offsets, offsets[:-1])
            state = (sums, sums.clone(), sums.clone(), counters, output)
            yield "halting_step", f"{size}{text}", (*lists, *state, *gate, last)
            grads = (sums, sums.clone(), sums.clone(), output, sums.clone())
            read = (size.values(size.packed), size.values(size.batch, size.dim))
            yield "halting_step_backward", f"{size}{text}", (*grads, *read, *lists[1:], sums, sums.clone(), *gate, last)


@launches
def slow_fast() -> Iterator[Sample]:
    for size in _both():
        x, listed = size.x(), (size.offsets(), size.tokens)
        increment = size.values(size.batch, size.dim)
        for text, rows in (("", size.rows()), (", no rows", None)):
            yield "slow_fast_update", f"{size}{text}", (x, rows, *listed, increment)
            yield "slow_fast_update_backward", f"{size}{text}", (x, rows, *listed)
            weights = size.values(size.packed, dtype=FLOAT32)
            for switch, normalize in ((", normalised", True), ("", False))[: 1 if rows is None else 2]:
                args = (x, weights, rows, *listed, normalize)
                yield "slow_fast_merge", f"{size}{text}{switch}", args
                yield "slow_fast_merge_backward", f"{size}{text}{switch}", (increment, *args)


@launches
def ragged_patch_embed() -> Iterator[Sample]:
    for size in _both():
        images = size.values(size.batch, 3, SIDE, SIDE)
        tails = torch.zeros(size.batch, dtype=torch.int32)
        geometry = ((7, 32, 0), (10, 23, 3), (14, 16, 0))  # patches along a side, kernel, padding
        weights = [size.values(size.dim, 3, kernel, kernel) for _, kernel, _ in geometry]
        biases = [size.values(size.dim) for _ in geometry]
        tables = [size.values(1 + grid**2, size.dim) for grid, _, _ in geometry]
        steps = [kernel for _, kernel, _ in geometry], [padding for _, _, padding in geometry]
        args = (images, tails, size.values(1, size.dim), weights, biases, tables, *steps)
        yield "ragged_patch_embed", str(size), args
        yield "ragged_patch_embed_backward", str(size), (size.x(), *args, True)
