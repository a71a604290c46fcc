"""Checks at the door: the argument's name, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str],
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
) -> None:
    """Refuse anything but a tensor of this shape (names are free sizes), dtype and device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    got = value.shape
    fits = len(got) == len(shape)
    if fits:
        for want, have in zip(shape, got):  # a plain loop: this runs at every op's door
            if want != have and not isinstance(want, str):
                fits = False
    if not fits:
        wanted = "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(got)}")
    if dtype is not None:
        found = value.dtype
        if found is not dtype and (isinstance(dtype, torch.dtype) or found not in dtype):
            allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
            raise TypeError(f"{name} must have dtype {' or '.join(map(_short, allowed))}, got {_short(found)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {value.device}")


def check_float(name: str, value: Any, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """A floating-point tensor; with ``like``, of its dtype and on its device."""
    check_tensor(name, value, shape, FLOATS if like is None else like.dtype, like)


def check_cu_seqlens(name: str, value: Any, like: Tensor) -> None:
    """The form of offsets; their values are checked by the kernel on the CPU."""
    check_tensor(name, value, ("B + 1",), torch.int32, like)
    if value.shape[0] == 0:
        raise ValueError(f"{name} must have B + 1 >= 1 entries, got 0")


def check_rows(name: str, value: Any, like: Tensor, length: int | str = "T") -> None:
    """The form of a row list; its values are checked by the kernel on the CPU."""
    check_tensor(name, value, (length,), torch.int32, like)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """One of a few values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, minimum: int = 0, maximum: int | None = None) -> None:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        span = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be {span}, got {value}")


def check_last_stride(name: str, value: Tensor) -> None:
    """A tensor whose last dimension is contiguous, for kernels that read it in place."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got strides {tuple(value.stride())}")


def check_sequence(name: str, value: Any) -> None:
    """A tuple or list."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple, got {type(value).__name__}")


def check_real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """A number in [low, high], or (low, high] with ``open_low``; NaN is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (low < value <= high if open_low else low <= value <= high):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}")


def check_offset_values(name: str, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None = None) -> list[int]:
    """Values of offsets on the CPU: from 0, never falling, within the tokens; returns them."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    longest = 0
    for before, after in zip(offsets, offsets[1:]):
        if after < before:
            raise ValueError(f"{name} must not decrease, got {before} followed by {after}")
        longest = max(longest, after - before)
    if offsets[-1] > num_tokens:
        raise ValueError(f"{name} must end within the {num_tokens} tokens, got {offsets[-1]}")
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen of {name} must be at least the longest sequence, {longest}, got {max_seqlen}")
    return offsets


def check_row_values(name: str, rows: Tensor, num_rows: int, lowest: int = -1) -> None:
    """Values of a row list on the CPU: -1 (dead entry, unless ``lowest`` is 0) or a row that exists."""
    if rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < lowest or high >= num_rows:
        raise ValueError(f"{name} must be in [{lowest}, {num_rows}), got {low if low < lowest else high}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
