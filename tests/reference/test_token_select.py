"""token_select, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mtvit_ops.reference import token_select as reference

NAN, INF = math.nan, math.inf
# images of 4 and 3 tokens; an entry of a dead one behind them
SCORES = [0.0, 3.0, 1.0, 3.0, 5.0, NAN, -INF, 9.0]
ROWS = [10, 11, 12, 13, 20, 21, 22, 99]
TABLE = {  # what is asked for; kept rows and offsets; dropped rows and offsets
    "keep-2": ({"keep": 2}, [11, 13, 20, 22], [0, 2, 4], [10, 12, 21], [0, 2, 3]),
    "keep-2-by-score": ({"keep": 2, "by_score": True}, [11, 13, 20, 22], [0, 2, 4], [12, 10, 21], [0, 2, 3]),
    "keep-2-prefix": ({"keep": 2, "num_prefix_tokens": 1}, [10, 11, 20, 22], [0, 2, 4], [12, 13, 21], [0, 2, 3]),
    "counts": ({"keep_counts": [1, 3]}, [11, 20, 21, 22], [0, 1, 4], [10, 12, 13], [0, 3, 3]),
    "counts-by-score": (
        {"keep_counts": [1, 3], "by_score": True},
        [11, 20, 22, 21],
        [0, 1, 4],
        [13, 12, 10],
        [0, 3, 3],
    ),
    "threshold": ({"threshold": 1.0}, [11, 13, 20], [0, 2, 3], [10, 12, 21, 22], [0, 2, 4]),
    "threshold-prefix-by-score": (
        {"threshold": 0.5, "num_prefix_tokens": 1, "by_score": True},
        [10, 11, 13, 12, 20],
        [0, 4, 5],
        [22, 21],
        [0, 0, 2],
    ),
    "mask": ({"mask": [1, 0, 0, 1, 0, 1, 0, 1]}, [10, 13, 21], [0, 2, 3], [11, 12, 20, 22], [0, 2, 4]),
    "mask-by-score": (
        {"mask": [1, 0, 0, 1, 0, 1, 0, 1], "by_score": True},
        [13, 10, 21],
        [0, 2, 3],
        [11, 12, 20, 22],
        [0, 2, 4],
    ),
}


@pytest.mark.parametrize(("asked", "rows", "ends", "dropped", "dropped_ends"), TABLE.values(), ids=TABLE)
def test_by_hand(asked: dict, rows: list, ends: list, dropped: list, dropped_ends: list) -> None:
    mask, counts = asked.get("mask"), asked.get("keep_counts")
    got = reference.token_select(
        torch.tensor(SCORES),
        torch.tensor(ROWS, dtype=torch.int32),
        torch.tensor([0, 4, 7], dtype=torch.int32),
        None if mask is None else torch.tensor(mask, dtype=torch.bool),
        None if counts is None else torch.tensor(counts, dtype=torch.int32),
        asked.get("keep", -1),
        asked.get("threshold"),
        asked.get("num_prefix_tokens", 0),
        asked.get("by_score", False),
        6,
        True,
        6,
        4,
    )
    assert all(value.dtype == torch.int32 for value in got)
    assert [value.tolist() for value in got] == [
        rows + [-1] * (6 - len(rows)),
        ends,
        dropped + [-1] * (6 - len(dropped)),
        dropped_ends,
    ]
