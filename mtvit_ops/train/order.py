"""Which images a step sees, in every process, from nothing but seed, epoch and step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .._checks import check_count


class TrainOrder:
    """Batches of an epoch for one process, as lists of ``TrainViews``' keys; any point can be resumed.

    Args:
        num_images: in the set, >= ``batch_size``.
        batch_size: over all processes, a multiple of ``2 * world_size`` if ``paired``, else of ``world_size``.
        seed: of the order.
        rank, world_size: of this process.
        paired: give each process both images of a pair (i, batch_size - 1 - i), its own batch again so ordered: what
            mixes a batch with its reverse then mixes the same pairs at every world size.
        repeats: views of an image that follow each other in an epoch, >= 1 (repeated augmentation).

    Raises:
        TypeError, ValueError: bad values.

    All processes together see what one process alone would see, each image at most once an epoch; the images of an
    incomplete last batch are left out, others in each epoch.

    With ``repeats`` an epoch has as many steps as without, so it shows about one in ``repeats`` of the images, so often
    each; others in each epoch. Its list is the shuffled images, each written ``repeats`` times in a row, and a step
    takes the next ``batch_size`` places of that list: an image's views stand beside each other in one batch (but for
    one that a batch's end cuts in two), at any world size. DeiT's batches over all its processes are the same ones; it
    deals the views of an image to several processes, where here a process's share, too, is a piece of the list.

    Source of repeats: Augment your batch, arXiv 1901.09335; MultiGrain, arXiv 1902.05509; DeiT, arXiv 2012.12877.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        paired: bool = False,
        repeats: int = 1,
    ) -> None:
        check_count("world_size", world_size, 1)
        check_count("rank", rank, 0, world_size - 1)
        check_count("batch_size", batch_size, 1)
        check_count("repeats", repeats, 1)
        unit = world_size * (2 if paired else 1)
        if batch_size % unit:
            what = "2 * " if paired else ""
            raise ValueError(f"batch_size must be a multiple of {what}world_size = {unit}, got {batch_size}")
        if num_images < batch_size:
            raise ValueError(f"batch_size must be at most the {num_images} training images, got {batch_size}")
        self.num_images, self.batch_size, self.seed, self.repeats = num_images, batch_size, seed, repeats
        self._places = _places(batch_size, rank, world_size, paired)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.num_images // self.batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, ...]]]:
        """The batches of an epoch from a step on: (epoch, index), and for a further view its number, from 1, too."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for step in range(first_step, self.steps):
            start = step * self.batch_size
            yield [self._key(epoch, order, start + place) for place in self._places]

    def _key(self, epoch: int, order: list[int], place: int) -> tuple[int, ...]:
        which, repeat = divmod(place, self.repeats)
        # the first view is the one that there is without repeats
        return (epoch, order[which], repeat) if repeat else (epoch, order[which])


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
