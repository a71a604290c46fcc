"""Decoded pictures of many sizes in a few large tensors, which loader workers share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 256 << 20  # bytes: what stays empty at a chunk's end is small beside it


class _Place(NamedTuple):
    chunk: int
    offset: int
    shape: tuple[int, int, int]


class PixelCache:
    """Pictures one after another in chunks of uint8.

    Forked workers see the same memory because nothing is written after the filling; for spawned ones PyTorch moves the
    chunks into shared memory, once and one by one, as it hands them over. So forked workers need no shared memory,
    of which a container has little.
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._places: list[_Place] = []
        self._used = 0  # of the last chunk
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def append(self, pixels: NDArray[Any]) -> None:
        """Keep a copy of a picture, (height, width, 3) uint8."""
        if not self._chunks or self._used + pixels.size > len(self._chunks[-1]):
            # memory that is never written costs nothing, so a last chunk may be long
            self._chunks.append(torch.empty(max(_CHUNK, pixels.size), dtype=torch.uint8))
            self._used = 0
        height, width, channels = pixels.shape
        self._places.append(_Place(len(self._chunks) - 1, self._used, (height, width, channels)))
        self._chunks[-1].numpy()[self._used : self._used + pixels.size] = pixels.reshape(-1)
        self._used += pixels.size
        self.nbytes += pixels.size

    def close(self) -> None:
        """Cut the last chunk to its length, for it may be copied whole."""
        if self._chunks:
            self._chunks[-1] = self._chunks[-1][: self._used].clone()

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The picture itself, (height, width, 3) uint8, not to be written to."""
        chunk, offset, (height, width, channels) = self._places[index]
        flat = self._chunks[chunk].numpy()[offset : offset + height * width * channels]
        return flat.reshape(height, width, channels)


def available_memory() -> int | None:
    """Bytes of memory that this process can have now without swapping, within the container's limit.

    Under ``torchrun`` each process of the machine counts on its share: they decode at the same time, each for itself.
    None: nobody knows.
    """
    known = [found for found in (_of_machine(), _of_container(Path("/sys/fs/cgroup"))) if found is not None]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(known) // max(1, int(processes) if processes.isdecimal() else 1) if known else None


def _of_machine() -> int | None:
    try:
        import psutil
    except ImportError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not on this system
            return None
    return int(psutil.virtual_memory().available)


def _of_container(folder: Path) -> int | None:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # files that were read count as used, but give way
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # no control group, or no limit ("max")
        return None
    return max(0, limit - used + cached)
