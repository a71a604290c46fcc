"""The net under the op tests holds."""

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [lambda: torch.empty(5), lambda: torch.empty_like(torch.ones(5)), lambda: torch.ones(2).new_empty(5)],
    ids=["empty", "empty_like", "new_empty"],
)
def test_uninitialised_floats_are_nan(make) -> None:
    assert make().isnan().all()


def test_uninitialised_rows_are_no_rows() -> None:
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
