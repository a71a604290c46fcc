"""Stage: what ops and models promise on a GPU: no wait for the device, a graph can hold it, the same bits twice."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from measure import graph_of, outputs
from stage import ROOT, Stage, in_words
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mtvit_ops
from mtvit_ops import _backend
from mtvit_ops.testing import assert_equal

sys.path.append(str(ROOT / "tools"))
import launches

CASES_EACH = 4  # of a launcher's samples
Call = Callable[[], tuple[Tensor, ...]]
Case = tuple[str, Callable[[], Call]]  # made when its turn comes
MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "avit": {"gate_scale": 1.0, "gate_center": 1.0},
    "evovit": {},
    "lifevit": {},
    "lifevit, threshold": {"mode": "threshold"},
    "mtvit": {},
}


def op_cases(stage: Stage, each: int = CASES_EACH) -> Iterator[Case]:
    """Calls of each op on random values, by name and case; each call starts from the same arguments."""
    seen: dict[str, int] = {}
    for samples in launches.TABLE:
        for name, case, args in samples():
            if seen.get(name, 0) == each or not hasattr(torch.ops.mtvit_ops, name):
                continue
            if stage.smoke and max(tensor.numel() for tensor in tensors_of(args)) > 5e5:
                continue
            seen[name] = seen.get(name, 0) + 1
            yield f"{name}, {case}", lambda name=name, args=args: call_of(name, args, stage.device)


def call_of(name: str, args: tuple[Any, ...], device: torch.device) -> Call:
    op = getattr(torch.ops.mtvit_ops, name).default
    args = tree_map_only(Tensor, lambda tensor: filled(tensor, device), args)

    def call() -> tuple[Tensor, ...]:
        if not name.endswith("_"):
            return tuple(value for value in flat(op(*args)) if isinstance(value, Tensor))
        target = args[0].clone()
        op(target, *args[1:])
        return (target,)

    return call


def filled(tensor: Tensor, device: torch.device) -> Tensor:
    """The sample on the device with its strides: random floats, integers as they are."""
    kept = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # drawn on the host: after a capture that failed, PyTorch's generator on the device refuses to draw
    return kept.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor)


def tensors_of(args: Any) -> list[Tensor]:
    return [value for value in flat(args) if isinstance(value, Tensor)]


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for entry in value for leaf in flat(entry)]
    return [value]


def model_cases(stage: Stage) -> Iterator[Case]:
    """Forward passes of every method at DeiT-S, batch 8."""
    for title in MODELS:
        yield f"model {title}", lambda title=title: model_call(stage, title)


def model_call(stage: Stage, title: str) -> Call:
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 6, "num_heads": 2} if stage.smoke else {}
    dtype = torch.float32 if stage.smoke else torch.bfloat16
    model = mtvit_ops.create_model(f"{title.split(',')[0]}_small_patch16_224", **sizes, **MODELS[title])
    model = model.to(stage.device, dtype).eval()
    images = torch.randn(8, 3, model.config.img_size, model.config.img_size).to(stage.device, dtype)
    return lambda: outputs(model(images))


def check(stage: Stage, case: str, make: Callable[[], Call]) -> None:
    """A row: what holds, and what does not in words."""
    row: dict[str, Any] = {"table": "promises", "case": case}
    call = make()
    with notes() as said:
        row["twice"] = verdict(lambda: equal(call(), call()))
    # a reference that serves where a kernel should would keep the promises too
    row["served"] = said[0] if said else "kernel"
    if stage.device.type != "cuda":
        row["waits"] = row["graph"] = "not asked: no CUDA device"
    else:
        row["waits"] = verdict(lambda: without_waiting(call))
        row["graph"] = verdict(lambda: in_a_graph(call))
    stage.emit(**row)


def verdict(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        return in_words(error)
    return "ok"


def equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for place, (value, other) in enumerate(zip(got, wanted, strict=True)):
        assert_equal(f"result {place}", value.cpu(), other.cpu())


def without_waiting(call: Callable[[], object]) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_a_graph(call: Callable[[], tuple[Tensor, ...]]) -> None:
    wanted, kept = call(), []

    def keep() -> None:
        kept[:] = call()

    graph = graph_of(keep)
    for value in kept:
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    equal(tuple(kept), wanted)


@contextmanager
def notes() -> Iterator[list[str]]:
    """What the package's logger says about who serves."""
    said: list[str] = []
    _backend.say_once.cache_clear()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("mtvit_ops")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    stage = Stage(__doc__)
    if not stage.smoke:
        stage.share_out((os.cpu_count() or 1) // 2)
    with torch.no_grad():
        for case, make in stage.todo(chain(model_cases(stage), op_cases(stage))):
            if stage.time_left() < 2:
                stage.emit(table="promises", case=case, twice="out of time", served="", waits="", graph="")
                break
            try:
                check(stage, case, make)
            except Exception as error:  # the case could not even be made
                stage.emit(table="promises", case=case, twice=in_words(error), served="", waits="", graph="")
