"""The order of training: nothing but seed, epoch and step, the same at every number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtvit_ops.train.order import TrainOrder, derive_seed


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, int, int, bool, int, int]:
    """Images, batch size, processes, paired, seed, repeats."""
    world, paired = draw(st.integers(1, 4)), draw(st.booleans())
    batch = world * (1 + paired) * draw(st.integers(1, 4))
    repeats = draw(st.sampled_from([1, 1, 2, 3, 40]))
    return draw(st.integers(batch, 60)), batch, world, paired, draw(st.integers(0, 2**63 - 1)), repeats


@given(case=orders(), epoch=st.integers(0, 5))
def test_processes_share_what_one_would_see(case: tuple[int, int, int, bool, int, int], epoch: int) -> None:
    images, size, world, paired, seed, repeats = case
    alone = TrainOrder(images, size, seed, repeats=repeats)
    whole = list(alone.batches(epoch))
    assert len(whole) == alone.steps == images // size
    seen = [key for batch in whole for key in batch]
    assert len(set(seen)) == len(seen) == alone.steps * size
    assert all(key[0] == epoch and 0 <= key[1] < images for key in seen)
    shares = [
        list(TrainOrder(images, size, seed, rank, world, paired, repeats).batches(epoch)) for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(part) for part in parts] == [size // world] * world
        assert sorted(key for part in parts for key in part) == sorted(batch)
        if paired:  # what is mixed with the reverse of its own batch is mixed with the reverse of the whole one
            partner = dict(zip(batch, reversed(batch)))
            assert all(partner[key] == other for part in parts for key, other in zip(part, reversed(part)))
        else:
            assert [key for part in parts for key in part] == batch


@given(case=orders(), epoch=st.integers(0, 5))
def test_views_of_an_image_stand_in_a_row(case: tuple[int, int, int, bool, int, int], epoch: int) -> None:
    images, size, _, _, seed, repeats = case
    seen = [key for batch in TrainOrder(images, size, seed, repeats=repeats).batches(epoch) for key in batch]
    once = [key for batch in TrainOrder(images, size, seed).batches(epoch) for key in batch]
    # as many places as without, filled by the first images of the same shuffle, the last of them perhaps cut off
    assert len(seen) == len(once)
    assert [(key[0], key[1]) for key in seen] == [once[place // repeats] for place in range(len(seen))]
    assert [key[2:] for key in seen] == [
        (place % repeats,) if place % repeats else () for place in range(len(seen))
    ]  # a first view is the one of training without repeats


def test_images_left_out_by_repeats_come_in_other_epochs() -> None:
    order = TrainOrder(24, 4, 0, repeats=3)
    epochs = [Counter(key[1] for batch in order.batches(epoch) for key in batch) for epoch in range(30)]
    assert all(list(counts.values()) == [3] * 8 for counts in epochs)
    assert set().union(*epochs) == set(range(24))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_any_step_can_be_the_first(rank: int, world: int, repeats: int) -> None:
    order = TrainOrder(23, 4, 7, rank, world, paired=True, repeats=repeats)
    for epoch, first in product(range(2), range(order.steps + 1)):
        assert list(order.batches(epoch, first)) == list(order.batches(epoch))[first:]


def test_epochs_and_seeds_differ_and_generators_stay() -> None:
    before = torch.get_rng_state()
    orders = {
        tuple(index for batch in TrainOrder(20, 5, seed).batches(epoch) for _, index in batch)
        for seed, epoch in product(range(3), range(3))
    }
    assert len(orders) == 9
    assert torch.equal(torch.get_rng_state(), before)
    left_out = {
        frozenset(range(22)) - {key[1] for batch in TrainOrder(22, 5, 0).batches(epoch) for key in batch}
        for epoch in range(4)
    }
    assert len(left_out) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        ((10, 3, 0, 0, 2), ValueError, "batch_size must be a multiple of world_size = 2, got 3"),
        ((10, 6, 0, 0, 2, True), ValueError, r"batch_size must be a multiple of 2 \* world_size = 4, got 6"),
        ((3, 4, 0), ValueError, "batch_size must be at most the 3 training images, got 4"),
        ((10, 4, 0, 2, 2), ValueError, r"rank must be in \[0, 1\], got 2"),
        ((10, 4, 0, 0, 0), ValueError, "world_size must be >= 1, got 0"),
        ((10, 4, 0, 0, 1, False, 0), ValueError, "repeats must be >= 1, got 0"),
        ((10, 4, 0, 0, 1, False, 1.5), TypeError, "repeats must be an int, got float"),
        ((10, 4.0, 0), TypeError, "batch_size must be an int, got float"),
    ],
)
def test_bad_values(arguments: tuple[int, ...], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        TrainOrder(*arguments)


def test_seeds_are_written_down() -> None:
    """A change of these numbers would break every interrupted run."""
    assert derive_seed(0) == 7896617691693857887
    assert derive_seed(3, 1, 4) == 1798932345466327501
    assert len({derive_seed(0, 1, step, rank) for step in range(50) for rank in range(4)}) == 200
    assert 0 <= derive_seed(2**63 - 1, 2**40) < 2**63
