"""The small ops, native against reference, at DeiT-S with half of the tokens alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import BATCHES

from mtvit_ops import RaggedTokens, use_backend
from mtvit_ops.ops import (
    gather_layer_norm,
    halting_step,
    initial_halting_state,
    scatter_residual_,
    token_select,
)


def cases(batch: int, tokens: int, dim: int) -> dict[str, Callable[[], Any]]:
    """A call of each op."""
    everyone = RaggedTokens.from_dense(torch.randn(batch, tokens, dim))
    scores = torch.rand(batch * tokens)
    offsets = everyone.cu_seqlens
    half = token_select(scores, None, offsets, keep=1 + tokens // 2, num_prefix_tokens=1)
    y = torch.randn(len(half.rows), dim)
    weight, bias = torch.rand(dim), torch.rand(dim)
    state = initial_halting_state(everyone.x, offsets[:-1])
    target = everyone.x.clone()
    select = {"keep": 1 + tokens // 2, "num_prefix_tokens": 1, "max_seqlen": tokens}
    gate = {"gate_scale": 10.0, "gate_center": 4.0}
    return {
        "token_select": lambda: token_select(scores, None, offsets, **select),
        "gather_layer_norm": lambda: gather_layer_norm(everyone.x, half.rows, weight, bias),
        "scatter_residual_": lambda: scatter_residual_(target, half.rows, y),
        "halting_step": lambda: halting_step(everyone.x, None, offsets, offsets[:-1], state, **gate),
    }


def with_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with use_backend("reference"):
            return call()

    return run


@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)
@pytest.mark.parametrize("op", ["token_select", "gather_layer_norm", "scatter_residual_", "halting_step"])
def bench_ops(op: str, batch: int, compare: Callable[..., Any], smoke: bool) -> None:
    call = cases(batch, 17 if smoke else 197, 32 if smoke else 384)[op]
    reference = with_reference(call)
    with torch.inference_mode():
        if op != "scatter_residual_":  # adds up, so two calls differ
            torch.testing.assert_close(call(), reference(), atol=1e-5, rtol=1e-5)
    compare(
        {"reference": reference, "native": call}, "native", short=True, table="ops", op=op, batch=batch, dtype="float32"
    )
