"""Stage: every op beside what plain PyTorch offers, equality first, with the share of what this device reaches."""

from __future__ import annotations

from typing import Any

import torch
from measure import best, ceilings, compare, outputs
from op_case import OpCase, Sizes
from op_cases import cases
from stage import Stage, in_words

from mtvit_ops.testing import assert_close_to_float64, assert_equal

ROUNDS = 40


def assert_same(case: OpCase) -> dict[str, str]:
    """Candidates that do not compute what they should, in words; ours may not be among them."""
    exact, wrong = outputs(case.exact()), {}
    plain = outputs(case.plain())
    for name, run in case.runs.items():
        try:
            for place, (got, truth, loose) in enumerate(zip(outputs(run()), exact, plain, strict=True)):
                if truth.is_floating_point():
                    assert_close_to_float64(f"result {place}", got, truth, loose)
                else:
                    assert_equal(f"result {place}", got, truth)
        except Exception as error:
            wrong[name] = in_words(error)
    return wrong


def timed(case: OpCase, stage: Stage, roof: dict[str, float]) -> dict[str, Any]:
    """Times of the candidates that compute what they should, and what is wrong with the others."""
    if not case.op.endswith("_"):
        wrong = assert_same(case)
    else:  # in place: each candidate adds to what the one before left
        wrong = {}
        for name, run in case.runs.items():
            wrong |= assert_same(case._replace(runs={name: run}))
    live = {name: run for name, run in case.runs.items() if name not in wrong}
    times = compare(live, stage.device, 3 if stage.smoke else ROUNDS)
    for found in times.values():
        if (milliseconds := best(found)) is not None:
            found["share"] = max(
                case.bytes / milliseconds / 1e6 / roof["gigabytes_a_second"],
                case.flops / milliseconds / 1e9 / roof["teraflops"],
            )
    return {**times, **{name: {"error": why} for name, why in wrong.items()}}


if __name__ == "__main__":
    stage = Stage(__doc__)
    sizes = Sizes(stage.device)
    if stage.smoke:
        sizes = Sizes(stage.device, 2, 17, 2, backend="eager")
    roof = ceilings(stage.device, stage.smoke)
    stage.emit(table="ceilings", **roof)
    with torch.no_grad():
        for make in stage.todo(cases(sizes)):
            if stage.time_left() < 5:
                break
            try:
                case = make()
                row = {"op": case.op, "case": case.case, "bytes": case.bytes, "flops": case.flops}
                stage.emit(table="ops", **row, times=timed(case, stage, roof))
            except Exception as error:  # one case's trouble is not the next one's
                stage.emit(table="ops", op="?", case="", error=in_words(error), times={})
