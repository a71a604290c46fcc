"""Which images a step sees, in every process, from nothing but seed, epoch and step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .._checks import check_count


class TrainOrder:
    """Batches of an epoch for one process, as lists of (epoch, index) keys; any point can be resumed.

    Args:
        num_images: in the set, >= ``batch_size``.
        batch_size: over all processes, a multiple of ``2 * world_size`` if ``paired``, else of ``world_size``.
        seed: of the order.
        rank, world_size: of this process.
        paired: give each process both images of a pair (i, batch_size - 1 - i), its own batch again so ordered: what
            mixes a batch with its reverse then mixes the same pairs at every world size.

    Raises:
        TypeError, ValueError: bad values.

    All processes together see what one process alone would see, each image at most once an epoch; the images of an
    incomplete last batch are left out, others in each epoch.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, paired: bool = False
    ) -> None:
        check_count("world_size", world_size, 1)
        check_count("rank", rank, 0, world_size - 1)
        check_count("batch_size", batch_size, 1)
        unit = world_size * (2 if paired else 1)
        if batch_size % unit:
            what = "2 * " if paired else ""
            raise ValueError(f"batch_size must be a multiple of {what}world_size = {unit}, got {batch_size}")
        if num_images < batch_size:
            raise ValueError(f"batch_size must be at most the {num_images} training images, got {batch_size}")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self._places = _places(batch_size, rank, world_size, paired)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.num_images // self.batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The batches of an epoch from a step on."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for step in range(first_step, self.steps):
            start = step * self.batch_size
            yield [(epoch, order[start + place]) for place in self._places]


def derive_seed(*parts: int) -> int:
    """One seed from several numbers >= 0, the same everywhere."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _places(batch_size: int, rank: int, world_size: int, paired: bool) -> list[int]:
    """What of a whole batch a process takes."""
    if not paired:
        share = batch_size // world_size
        return list(range(rank * share, (rank + 1) * share))
    half = batch_size // 2 // world_size
    front = range(rank * half, (rank + 1) * half)
    return [*front, *(batch_size - 1 - place for place in reversed(front))]
