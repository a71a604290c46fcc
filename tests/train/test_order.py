"""The order of training: nothing but seed, epoch and step, the same at every number of processes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtvit_ops.train.order import TrainOrder, derive_seed


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, int, int, bool, int]:
    """Images, batch size, processes, paired, seed."""
    world, paired = draw(st.integers(1, 4)), draw(st.booleans())
    batch = world * (1 + paired) * draw(st.integers(1, 4))
    return draw(st.integers(batch, 60)), batch, world, paired, draw(st.integers(0, 2**63 - 1))


@given(case=orders(), epoch=st.integers(0, 5))
def test_processes_share_what_one_would_see(case: tuple[int, int, int, bool, int], epoch: int) -> None:
    images, size, world, paired, seed = case
    alone = TrainOrder(images, size, seed)
    whole = list(alone.batches(epoch))
    assert len(whole) == alone.steps == images // size
    seen = [key for batch in whole for key in batch]
    assert len(set(seen)) == len(seen) == alone.steps * size
    assert all(key[0] == epoch and 0 <= key[1] < images for key in seen)
    shares = [list(TrainOrder(images, size, seed, rank, world, paired).batches(epoch)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(part) for part in parts] == [size // world] * world
        assert sorted(key for part in parts for key in part) == sorted(batch)
        if paired:  # what is mixed with the reverse of its own batch is mixed with the reverse of the whole one
            partner = dict(zip(batch, reversed(batch)))
            assert all(partner[key] == other for part in parts for key, other in zip(part, reversed(part)))
        else:
            assert [key for part in parts for key in part] == batch


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_any_step_can_be_the_first(rank: int, world: int) -> None:
    order = TrainOrder(23, 4, 7, rank, world, paired=True)
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
