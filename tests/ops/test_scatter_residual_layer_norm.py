"""scatter_residual_layer_norm, functional and in place, against PyTorch's formula and against the two ops it joins."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import scatter_residual_layer_norm, scatter_residual_layer_norm_
from mtvit_ops.testing import assert_equal, assert_matches_formula, random_rows, random_tensor, value_and_gradients


class Case(NamedTuple):
    num_rows: int
    live: int | None = None  # None: all rows, without a list
    dim: int = 24
    dead: int = 0  # fillers of -1 behind the list, whose y and scale are NaN
    rows: tuple[int, ...] | None = None  # a list written out instead of drawn
    scale: str | None = None  # "layer": (D,), "token": (T, 1)
    float32_parameters: bool = False
    strided: bool = False  # x is the left half of a wider array, y every other row of one
    eps: float = 1e-6


CASES = {
    "all-rows": Case(5),
    "keep-all": Case(5, live=5),
    "half": Case(8, live=4),
    "ViT-S": Case(80, live=50, dim=384, scale="layer"),
    # no vector width divides them
    "D=1": Case(6, live=3, dim=1, scale="token"),
    "D=7": Case(6, live=3, dim=7, scale="layer"),
    "D=100": Case(6, live=3, dim=100),
    "D=0": Case(6, live=3, dim=0, scale="layer"),
    # rows as wide as a tile of registers, and one column more
    "D=1024": Case(6, live=3, dim=1024, scale="token"),
    "D=1025": Case(6, live=3, dim=1025, scale="layer"),
    # rows a tile holds, one fewer, one more
    "tile-1": Case(16, live=7, dim=384),
    "tile": Case(16, live=8, dim=384),
    "tile+1": Case(16, live=9, dim=384),
    "one-row": Case(1, live=1),
    "last-row-only": Case(6, rows=(5,)),
    "score-order": Case(6, rows=(4, 0, 5, 2), scale="token"),
    "dead": Case(8, live=3, dead=4),
    "dead-layer-scale": Case(8, live=3, dead=4, scale="layer"),
    "dead-token-scale": Case(8, live=3, dead=4, scale="token"),
    "dead-only": Case(8, live=0, dead=4, scale="layer"),
    "dead-between": Case(6, rows=(3, -1, 0, -1), scale="layer"),
    "no-entry": Case(6, live=0, scale="layer"),
    "R=0": Case(0),
    "R=0-dead": Case(0, live=0, dead=2),
    "layer-scale-all-rows": Case(8, scale="layer"),
    "token-scale-all-rows": Case(8, scale="token"),
    "float32-parameters": Case(8, live=4, scale="layer", float32_parameters=True),
    "float32-parameters-all-rows": Case(8, scale="token", float32_parameters=True),
    "strided": Case(8, live=4, strided=True, scale="layer"),
    "strided-all-rows": Case(8, strided=True),
    "large-eps": Case(8, live=4, eps=0.5),
}


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    rows = None
    if case.rows is not None:
        rows = torch.tensor(case.rows, dtype=torch.int32, device=device)
    elif case.live is not None:
        rows = random_rows(case.num_rows, case.live, case.dead, device)
    tokens = case.num_rows if rows is None else len(rows)
    step = 2 if case.strided else 1
    x = random_tensor(case.num_rows, step * case.dim, dtype=dtype, device=device)[:, : case.dim]
    y = random_tensor(step * tokens, case.dim, dtype=dtype, device=device)[::step]
    kept = torch.float32 if case.float32_parameters and dtype != torch.float64 else dtype
    scale = None
    if case.scale is not None:
        shape = (case.dim,) if case.scale == "layer" else (tokens, 1)
        scale = random_tensor(*shape, dtype=kept, device=device)
    if rows is not None:
        y[rows < 0] = math.nan
        if case.scale == "token":
            scale[rows < 0] = math.nan
    weight, bias = (random_tensor(case.dim, dtype=kept, device=device) for _ in range(2))
    return rows, {"x": x, "y": y, "weight": weight, "bias": bias, "scale": scale}


def formula(
    rows: Tensor | None, eps: float, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    live = slice(None) if rows is None else rows >= 0
    picked = torch.arange(len(x), device=x.device) if rows is None else rows[live].long()
    step = y[live]
    if scale is not None:
        step = (scale if scale.dim() == 1 else scale[live]) * step
    new = x.index_add(0, picked, step.to(x.dtype))
    normed = F.layer_norm(new[picked], x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    if rows is not None:
        normed = x.new_zeros(len(rows), x.shape[1]).index_put((live,), normed)
    return new, normed


def two_ops(
    rows: Tensor | None, eps: float, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    # the operators, since without a list the functions are PyTorch's own
    new = torch.ops.mtvit_ops.scatter_residual(x, rows, y, scale)
    return new, torch.ops.mtvit_ops.gather_layer_norm(new, rows, weight, bias, eps)[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_formula(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    rows, inputs = make_inputs(case, dtype, device)
    assert_matches_formula(
        lambda **tensors: scatter_residual_layer_norm(rows=rows, eps=case.eps, **tensors),
        lambda **tensors: formula(rows, case.eps, **tensors),
        inputs,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_two_ops(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    """Bit for bit, values and gradients, also in place; what is not listed is neither written nor normalised."""
    rows, inputs = make_inputs(case, dtype, device)
    if rows is not None:
        unlisted = torch.ones(case.num_rows, dtype=torch.bool, device=device)
        unlisted[rows[rows >= 0].long()] = False
        inputs["x"][unlisted] = math.inf
    wanted, wanted_grads = value_and_gradients(lambda **tensors: two_ops(rows, case.eps, **tensors), inputs)
    got, grads = value_and_gradients(
        lambda **tensors: scatter_residual_layer_norm(rows=rows, eps=case.eps, **tensors), inputs
    )
    y = inputs["y"].detach().clone()
    with torch.no_grad():
        normed = scatter_residual_layer_norm_(rows=rows, eps=case.eps, **inputs)
    assert_equal("new x", got[0], wanted[0])
    assert_equal("normed", got[1], wanted[1])
    for name, grad in grads.items():
        assert_equal(f"gradient of {name}", grad, wanted_grads[name])
    assert_equal("x, in place", inputs["x"], wanted[0])
    assert_equal("normed, in place", normed, wanted[1])
    assert_equal("y", inputs["y"], y)


def test_any_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    """A turned ``x`` and ``y``, every other parameter and entry: layouts that a kernel may not read in place."""
    rows = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    x, y = (random_tensor(9, size, dtype=dtype, device=device) for size in (5, 3))
    weight, bias, scale = (random_tensor(9, dtype=dtype, device=device) for _ in range(3))
    got = scatter_residual_layer_norm(
        x.T,
        rows.repeat_interleave(2)[::2],
        y.T,
        *(torch.stack((value, torch.full_like(value, math.nan)), dim=1)[:, 0] for value in (weight, bias)),
        scale=scale.repeat_interleave(2)[::2],
    )
    wanted = scatter_residual_layer_norm(x.T.contiguous(), rows, y.T.contiguous(), weight, bias, scale=scale)
    for name, value, want in zip(("new x", "normed"), got, wanted, strict=True):
        assert value.is_contiguous(), name
        assert_equal(name, value, want)


@pytest.mark.parametrize("wanting", ["x", "y", "weight", "bias", "scale"])
def test_inplace_refuses_gradients(wanting: str, backend: str, device: str) -> None:
    shapes = {"x": (3, 4), "y": (3, 4), "weight": (4,), "bias": (4,), "scale": (4,)}
    inputs = {name: torch.zeros(shape, device=device).requires_grad_(name == wanting) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match="use scatter_residual_layer_norm"):
        scatter_residual_layer_norm_(rows=None, **inputs)
    with torch.no_grad():
        assert not scatter_residual_layer_norm_(rows=None, **inputs).requires_grad


def good() -> dict:
    return {
        "x": torch.ones(4, 8),
        "rows": torch.tensor([0, 2], dtype=torch.int32),
        "y": torch.ones(2, 8),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }


BAD = {
    "x-rank": ({"x": torch.zeros(1, 4, 8)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.zeros(4, 8).int()}, TypeError, "x must have dtype"),
    "rows-dtype": ({"rows": torch.tensor([0, 2])}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "rows must"),
    "rows-below": ({"rows": torch.tensor([1, -2], dtype=torch.int32)}, ValueError, "rows must"),
    "y-tokens": ({"y": torch.ones(3, 8)}, ValueError, r"y must have shape \(2, 8\)"),
    "y-tokens-without-rows": ({"rows": None}, ValueError, r"y must have shape \(4, 8\)"),
    "y-dtype": ({"y": torch.ones(2, 8).half()}, TypeError, "y must have dtype float32"),
    "y-device": ({"y": torch.ones(2, 8, device="meta")}, ValueError, "y must be on cpu"),
    "weight-shape": ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\)"),
    "weight-dtype": ({"weight": torch.ones(8).half()}, TypeError, "weight must have dtype float32"),
    "bias-shape": ({"bias": torch.zeros(1, 8)}, ValueError, "bias must have shape"),
    "bias-dtype": ({"bias": torch.zeros(8).double()}, TypeError, "bias must have dtype float32"),
    "eps-zero": ({"eps": 0.0}, ValueError, "eps must be in"),
    "eps-tensor": ({"eps": torch.tensor(1e-6)}, TypeError, "eps must be a number"),
    "scale-shape": ({"scale": torch.ones(7)}, ValueError, r"scale must have shape \(8,\)"),
    "scale-tokens": ({"scale": torch.ones(3, 1)}, ValueError, r"scale must have shape \(2, 1\)"),
    "scale-dtype": ({"scale": torch.ones(8).double()}, TypeError, "scale must have dtype float32"),
}


@pytest.mark.parametrize("op", [scatter_residual_layer_norm, scatter_residual_layer_norm_])
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, op, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    arguments = {**good(), **changes}
    x = arguments["x"].clone()
    with pytest.raises(error, match=message):
        op(**arguments)
    assert_equal("x after the refusal", arguments["x"], x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(8, 4).T, r"x must have a last stride of 1, got strides \(1, 4\)"),
        (torch.ones(1, 8).expand(4, 8), "x must have rows that do not overlap"),
    ],
    ids=["turned", "expanded"],
)
def test_inplace_refuses_strides(x: Tensor, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter_residual_layer_norm_(**{**good(), "x": x})


def test_y_may_lie_in_x(backend: str, device: str) -> None:
    x = torch.arange(12.0, device=device).reshape(4, 3)
    rows = torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    wanted = scatter_residual_layer_norm(x, rows, x[:3].clone(), torch.ones_like(x[0]), torch.zeros_like(x[0]))
    normed = scatter_residual_layer_norm_(x, rows, x[:3], torch.ones_like(x[0]), torch.zeros_like(x[0]))
    assert_equal("x", x, wanted[0])
    assert_equal("normed", normed, wanted[1])
