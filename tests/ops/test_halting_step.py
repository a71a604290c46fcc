"""halting_step against A-ViT's rule, written token by token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops import available_backends, use_backend
from mtvit_ops.ops import HaltingState, halting_step, initial_halting_state
from mtvit_ops.testing import assert_equal, assert_matches_formula, offsets, random_tensor


class Case(NamedTuple):
    lengths: tuple[int, ...]
    rows: tuple[int, ...] | None = None  # None: all rows
    num_rows: int | None = None  # None: as many as listed
    readout: tuple[int, ...] = ()
    dim: int = 5
    dead: int = 0  # fillers of -1, or, without a list, NaN rows
    eps: float = 0.01
    last: bool = False
    fresh: bool = False  # the state before the first layer
    strided: bool = False
    batch_tile: int | None = None  # images that a kernel takes at once, made so few that these are more


CASES = {
    "first-layer": Case((4, 4), readout=(0, 4), fresh=True),
    "later-layer": Case((5, 5), readout=(0, 5)),
    "last-layer": Case((5, 5), readout=(0, 5), last=True),
    "listed": Case((3, 4), rows=(0, 2, 3, 6, 8, 9, 11), num_rows=12, readout=(0, 6)),
    "listed-last": Case((3, 4), rows=(0, 2, 3, 6, 8, 9, 11), num_rows=12, readout=(0, 6), last=True),
    # a class token that has halted adds nothing more
    "readout-halted": Case((2, 2), rows=(1, 2, 5, 6), num_rows=8, readout=(0, 4)),
    "readout-out-of-order": Case((5, 5), readout=(5, 0, 2)),
    "no-readout": Case((4, 3)),
    "dead": Case((3, 2), rows=(0, 2, 3, 6, 8), num_rows=10, readout=(0, 6), dead=4),
    "dead-last": Case((3, 2), rows=(0, 2, 3, 6, 8), num_rows=10, readout=(0, 6), dead=4, last=True),
    "dead-all-rows": Case((3, 2), readout=(0, 3), dead=4),
    "zero-length": Case((0, 4, 0, 0, 3, 0), readout=(0, 4)),
    "all-empty": Case((0, 0), rows=(), num_rows=3, readout=(0,)),
    "R=0": Case((0, 0)),
    "B0": Case((), rows=(), num_rows=3, readout=(1,)),
    "one-token": Case((1,), readout=(0,)),
    "last-row-only": Case((1,), rows=(6,), num_rows=7, readout=(6,)),
    "D=1": Case((4, 3), readout=(0,), dim=1),
    "D=384": Case((4, 3), readout=(0, 4), dim=384),
    "eps": Case((5, 5), readout=(0, 5), eps=0.3),
    "strided-x": Case((5, 5), readout=(0, 5), strided=True),
    # one below and one above a tile of entries and of rows, and rows behind the last listed one
    "long": Case((511, 513), rows=(*range(511), *range(600, 1113)), num_rows=1200, readout=(0, 600, 1150), dead=2),
    # wider than a tile of columns, forward and backward
    "D=1030": Case((3, 2), readout=(0, 3), dim=1030),
    "many-images": Case((1, 0) * 9, rows=tuple(range(1, 10)), num_rows=40, readout=(1, 9), dead=20, batch_tile=16),
}
SCALE, CENTER = 0.5, 0.25
# gates and sums of which none comes closer than 0.009 to 1 - eps: no dtype's rounding changes who halts
GATES = (-2.0, -0.5, 0.5, 1.5, 2.5, 4.5)  # scores 0.22, 0.38, 0.5, 0.62, 0.73, 0.88
SPENT = (0.0, 0.25, 0.5)


def formula(case: Case, x: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
    cumulative, remainder, ponder, counters, output = HaltingState(**state)
    alive = range(sum(case.lengths)) if case.rows is None else case.rows
    sums = [list(values.unbind()) for values in (cumulative, remainder, ponder)]
    scores, lived = [torch.zeros_like(cumulative[0])] * len(x) if len(x) else [], counters.tolist()
    share, staying = dict.fromkeys(range(len(x))), set()
    for row in alive:
        h = torch.sigmoid(x[row, 0] * SCALE - CENTER).to(cumulative.dtype)
        scores[row] = h
        spent = torch.ones_like(h) if case.last else h
        total = sums[0][row] + spent
        sums[0][row] = total
        if total.item() > 1 - case.eps:
            share[row] = sums[1][row]
            sums[2][row] = sums[2][row] + 1 + sums[1][row]
        else:
            share[row] = spent
            sums[1][row] = sums[1][row] - spent
            sums[2][row] = sums[2][row] + 1
            lived[row] += 1
            staying.add(row)
    read = [
        output[place] if share[row] is None else output[place] + share[row] * x[row]
        for place, row in enumerate(case.readout)
    ]
    listed, kept = list(alive), []
    counts, start = [], 0
    for length in case.lengths:
        kept.append([row for row in listed[start : start + length] if row in staying])
        counts.append(len(kept[-1]))
        start += length
    rows = [row for image in kept for row in image]
    size = len(x) if case.rows is None else len(case.rows) + case.dead

    def stack(values: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(values).to(like.dtype) if values else like.clone()

    return (
        *(stack(values, like) for values, like in zip(sums, (cumulative, remainder, ponder), strict=True)),
        torch.tensor(lived, dtype=torch.int32, device=x.device),
        stack(read, output),
        stack(scores, cumulative),
        torch.tensor(rows + [-1] * (size - len(rows)), dtype=torch.int32, device=x.device),
        offsets(counts, x.device),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_rule(
    case: Case, backend: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.batch_tile is not None and backend == "triton":
        from mtvit_ops.kernels import _launch

        monkeypatch.setattr(_launch, "BATCH_TILE", case.batch_tile)
    live = sum(case.lengths)
    num_rows = case.num_rows or live + (case.dead if case.rows is None else 0)
    x = random_tensor(num_rows, 2 * case.dim if case.strided else case.dim, dtype=dtype, device=device)[:, : case.dim]
    x[:, 0] = torch.tensor(GATES, device=device).repeat(num_rows)[:num_rows]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    readout = torch.tensor(case.readout, dtype=torch.int32, device=device)
    rows = None
    if case.rows is not None:
        rows = torch.tensor([*case.rows, *[-1] * case.dead], dtype=torch.int32, device=device)
    else:
        x[live:] = math.nan
    state = initial_halting_state(x, readout)
    if not case.fresh:
        cumulative = torch.tensor(SPENT, dtype=wide, device=device).repeat_interleave(2).repeat(num_rows)[:num_rows]
        state = HaltingState(
            cumulative,
            1 - cumulative,
            2 * cumulative,
            torch.arange(num_rows, dtype=torch.int32, device=device),
            random_tensor(*state.output.shape, dtype=wide, device=device),
        )
    cu_seqlens = offsets(case.lengths, device)

    def op(x: Tensor, **sums: Tensor) -> tuple[Tensor, ...]:
        step = halting_step(
            x, rows, cu_seqlens, readout, HaltingState(**sums),
            gate_scale=SCALE, gate_center=CENTER, eps=case.eps, last=case.last,
        )  # fmt: skip
        return (*step.state, step.scores, step.rows, step.cu_seqlens)

    assert_matches_formula(op, lambda **tensors: formula(case, **tensors), {"x": x, **state._asdict()})


def test_a_sum_of_exactly_one_minus_eps_halts_without_weight(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 3, dtype=dtype, device=device)  # a score of 0.5
    first = torch.zeros(1, dtype=torch.int32, device=device)
    before = initial_halting_state(x + 1, first)
    step = halting_step(x, None, offsets((1,), device), first, before, gate_scale=1.0, gate_center=0.0, eps=0.5)
    assert step.cu_seqlens.tolist() == [0, 0]
    assert step.state.cumulative.item() == 0.5
    assert step.state.counters.item() == 1
    assert step.state.ponder.item() == 1  # without the remainder
    assert_equal("output", step.state.output, before.output)


def test_a_gate_that_is_no_number_halts_nothing_and_spoils_its_sums() -> None:
    if not available_backends()["cpp"].available:
        pytest.skip("no native operators here")
    x = torch.ones(3, 4)
    x[1, 0] = math.nan
    found = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            readout = int32(0, 1, 2)
            begin = initial_halting_state(x, readout)
            found.append(halting_step(x, None, int32(0, 3), readout, begin, gate_scale=1.0, gate_center=2.0))
    native, plain = found
    assert_equal("rows", native.rows[: int(native.cu_seqlens[-1])], plain.rows[: int(plain.cu_seqlens[-1])])
    for name, value in native.state._asdict().items():
        torch.testing.assert_close(value, getattr(plain.state, name), equal_nan=True, msg=name)
    assert native.state.remainder.isnan().tolist() == [False, True, False]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good() -> dict:
    x, readout = torch.ones(4, 3), int32(0, 2)
    return {
        "x": x,
        "rows": int32(0, 2, 3),
        "cu_seqlens": int32(0, 1, 3),
        "readout_rows": readout,
        "state": initial_halting_state(x, readout),
        "gate_scale": 1.0,
        "gate_center": 0.0,
    }


def state(**changes: Tensor) -> dict:
    return {"state": good()["state"]._replace(**changes)}


BAD = {
    "x-rank": ({"x": torch.ones(1, 4, 3)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.ones(4, 3).int()}, TypeError, "x must have dtype"),
    "x-without-gate": ({"x": torch.ones(4, 0)}, ValueError, "x must have"),
    "rows-dtype": ({"rows": torch.arange(3)}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": int32(0, 2, 3).to("meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": int32(0, 2, 4)}, ValueError, "rows must"),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0, 1, 3])}, TypeError, "cu_seqlens must have dtype int32"),
    "offsets-start": ({"cu_seqlens": int32(1, 1, 3)}, ValueError, "cu_seqlens must start at 0"),
    "offsets-fall": ({"cu_seqlens": int32(0, 3, 2)}, ValueError, "cu_seqlens must not decrease"),
    "offsets-beyond": ({"cu_seqlens": int32(0, 2, 4)}, ValueError, "cu_seqlens must end"),
    "readout-dtype": ({"readout_rows": torch.tensor([0, 2])}, TypeError, "readout_rows must have dtype int32"),
    "readout-beyond": ({"readout_rows": int32(0, 4)}, ValueError, "readout_rows must"),
    "readout-dead": ({"readout_rows": int32(0, -1)}, ValueError, "readout_rows must"),
    "cumulative-length": (state(cumulative=torch.zeros(3)), ValueError, "state.cumulative must have shape"),
    "remainder-dtype": (state(remainder=torch.ones(4).half()), TypeError, "state.remainder must have dtype float32"),
    "ponder-device": (state(ponder=torch.zeros(4, device="meta")), ValueError, "state.ponder must be on cpu"),
    "counters-dtype": (state(counters=torch.ones(4)), TypeError, "state.counters must have dtype int32"),
    "output-shape": (state(output=torch.zeros(1, 3)), ValueError, r"state.output must have shape \(2, 3\)"),
    "state-tuple": ({"state": tuple(good()["state"])}, TypeError, "state must be a HaltingState, got tuple"),
    "gate-nan": ({"gate_scale": math.nan}, ValueError, "gate_scale must be in"),
    "gate-tensor": ({"gate_center": torch.tensor(1.0)}, TypeError, "gate_center must be a number"),
    "eps-zero": ({"eps": 0.0}, ValueError, "eps must be in"),
    "eps-above": ({"eps": 1.5}, ValueError, "eps must be in"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        halting_step(**{**good(), **changes})


@pytest.mark.parametrize(
    ("x", "readout", "error", "message"),
    [
        (torch.ones(4), int32(0), ValueError, r"x must have shape \(R, D\)"),
        (torch.ones(4, 3).int(), int32(0), TypeError, "x must have dtype"),
        (torch.ones(4, 3), None, TypeError, "readout_rows must be a tensor, got NoneType"),
    ],
    ids=["rank", "integer", "no-rows"],
)
def test_no_state_of_bad_input(x: Tensor, readout: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        initial_halting_state(x, readout)


def test_any_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    """A turned ``x``, which a kernel cannot read in place."""
    x = random_tensor(6, 10, dtype=dtype, device=device)
    offsets = torch.tensor([0, 5, 10], dtype=torch.int32, device=device)
    results = []
    for tokens in (x.T, x.T.contiguous()):
        state = initial_halting_state(tokens, offsets[:-1])
        step = halting_step(tokens, None, offsets, offsets[:-1], state, gate_scale=1.0, gate_center=0.0)
        results.append((*step.state, step.scores, step.rows, step.cu_seqlens))
    for turned, plain in zip(*results, strict=True):
        assert_equal("result", turned, plain)
