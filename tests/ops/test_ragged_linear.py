"""ragged_linear and its residual forms, against F.linear on the live rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops.ops import ragged_linear, ragged_linear_residual, ragged_linear_residual_
from mtvit_ops.testing import (
    assert_equal,
    assert_matches_formula,
    offsets,
    poison_behind,
    random_rows,
    random_tensor,
    value_and_gradients,
)


class Case(NamedTuple):
    lengths: tuple[int, ...]  # their sum is the live count
    dead: int = 0  # rows of the buffer behind it, NaN
    depth: int = 24  # K
    width: int = 20  # N
    bias: bool = True
    strided: str | None = None  # of a: "every other" row of a wider array, "turned"; the weight turns with it


CASES = {
    "full": Case((5, 4)),
    "dead": Case((5, 4), dead=3),
    "zero-length-seq": Case((3, 0, 2), dead=2),
    "one-token": Case((1,)),
    "no-bias": Case((5, 4), dead=3, bias=False),
    "every-other": Case((5, 4), dead=3, strided="every other"),
    "turned": Case((5, 4), dead=3, strided="turned"),
    # nothing alive, nothing there
    "no-live": Case((0, 0), dead=5),
    "no-image": Case((), dead=5),
    "T=0": Case((0,)),
    "K=0": Case((5, 4), dead=3, depth=0),
    "N=0": Case((5, 4), dead=3, width=0),
    # no vector width divides them
    "K=1": Case((5, 4), dead=3, depth=1),
    "N=1": Case((5, 4), dead=3, width=1),
    "K=7,N=3": Case((5, 4), dead=3, depth=7, width=3),
    # around the tiles: 64 rows, 32 or 64 columns, steps of 32 or 64
    "T=63,N=31,K=31": Case((63,), depth=31, width=31),
    "T=64,N=32,K=32": Case((64,), depth=32, width=32),
    "T=65,N=33,K=33": Case((65,), depth=33, width=33),
    "T=127,N=63,K=63": Case((127,), depth=63, width=63),
    "T=128,N=64,K=64": Case((128,), depth=64, width=64),
    "T=129,N=65,K=65": Case((129,), depth=65, width=65),
    # the count at a tile's edge, and one beside it; whole tiles behind it
    "live-63": Case((63,), dead=70),
    "live-64": Case((64,), dead=70),
    "live-65": Case((64, 1), dead=70),
    # more tiles than programs, more rows of tiles than a group, more dead tiles than live ones
    "many-rows": Case((400, 300), dead=5, depth=16, width=8),
    "many-columns": Case((40,), dead=5, width=300),
    "many-dead": Case((40,), dead=400, width=100),
    "long-K": Case((17, 5), dead=2, depth=800, width=40),
}


def make_layer(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    live = sum(case.lengths)
    tokens, step = live + case.dead, 2 if case.strided == "every other" else 1
    if case.strided == "turned":
        a = random_tensor(case.depth, tokens, dtype=dtype, device=device).T
        weight = random_tensor(case.depth, case.width, dtype=dtype, device=device).T
    else:
        a = random_tensor(step * tokens, step * case.depth, dtype=dtype, device=device)[::step, ::step]
        weight = random_tensor(case.width, case.depth, dtype=dtype, device=device)
    bias = random_tensor(case.width, dtype=dtype, device=device) if case.bias else None
    return offsets(case.lengths, device), {"a": poison_behind(a, live), "weight": weight, "bias": bias}


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_linear(case: Case, activation: str | None, backend: str, device: str, dtype: torch.dtype) -> None:
    cu_seqlens, layer = make_layer(case, dtype, device)
    live = sum(case.lengths)

    def formula(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(a[:live], weight, bias)
        y = F.gelu(y) if activation else y
        return torch.cat((y, y.new_zeros(case.dead, case.width)))

    assert_matches_formula(
        lambda a, weight, bias: ragged_linear(a, weight, bias, cu_seqlens, activation=activation), formula, layer
    )


class ResidualCase(NamedTuple):
    layer: Case = CASES["dead"]
    rows: str | None = "listed"  # "loose": real rows stand behind the count; "holes": dead entries before it; None: all
    scale: str | None = None  # "layer": (N,), "token": (T, 1), whose dead entries are NaN
    wide_scale: bool = False  # float32
    wide_x: bool = False
    strided: bool = False  # x is the left half of a wider array


RESIDUAL_CASES = {
    **{
        name: ResidualCase(CASES[name], scale="layer")
        for name in (
            *("full", "dead", "every-other", "turned", "no-live", "no-image", "T=0", "K=0", "N=0", "K=7,N=3"),
            *("T=65,N=33,K=33", "live-64", "live-65", "many-columns", "many-dead", "long-K"),
        )
    },
    "all-rows": ResidualCase(rows=None),
    "all-rows-layer": ResidualCase(rows=None, scale="layer"),
    "all-rows-token": ResidualCase(rows=None, scale="token"),
    "listed": ResidualCase(),
    "token": ResidualCase(scale="token"),
    "loose": ResidualCase(rows="loose"),
    "loose-token": ResidualCase(rows="loose", scale="token"),
    "holes": ResidualCase(rows="holes", scale="layer"),
    "holes-token": ResidualCase(rows="holes", scale="token"),
    "wide-scale": ResidualCase(scale="layer", wide_scale=True),
    "wide-token-scale": ResidualCase(scale="token", wide_scale=True),
    "wide-x": ResidualCase(wide_x=True),
    "wide-x-scale": ResidualCase(scale="layer", wide_x=True, wide_scale=True),
    "strided-x": ResidualCase(strided=True, scale="layer"),
    "no-bias-no-scale": ResidualCase(CASES["no-bias"]),
    "many-rows-token": ResidualCase(CASES["many-rows"], scale="token"),
}


def make_residual(
    case: ResidualCase, dtype: torch.dtype, device: str
) -> tuple[Tensor | None, Tensor, dict[str, Tensor | None]]:
    cu_seqlens, layer = make_layer(case.layer, dtype, device)
    tokens, live, width = len(layer["a"]), sum(case.layer.lengths), case.layer.width
    rows = random_rows(tokens + 3, tokens, device=device)
    if case.rows != "loose":
        rows[live:] = -1
    if case.rows == "holes":
        rows[:live:3] = -1
    if case.rows is None:
        rows = None
    wide = dtype if dtype == torch.float64 else torch.float32
    x = random_tensor(tokens + 3, (1 + case.strided) * width, dtype=wide if case.wide_x else dtype, device=device)
    scale = None
    if case.scale is not None:
        scale = random_tensor(
            *((width,) if case.scale == "layer" else (tokens, 1)),
            dtype=wide if case.wide_scale else dtype,
            device=device,
        )
        if case.scale == "token":
            poison_behind(scale, live)
            if rows is not None:
                scale[rows < 0] = math.nan
    return rows, cu_seqlens, {"x": x[:, :width], **layer, "scale": scale}


def residual_formula(
    rows: Tensor | None, live: int, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    rows = torch.arange(live, device=x.device) if rows is None else rows[:live]
    listed = rows >= 0
    step = F.linear(a[:live][listed], weight, bias)
    if scale is not None:
        step = (scale if scale.dim() == 1 else scale[:live][listed]) * step
    return x.index_add(0, rows[listed].long(), step.to(x.dtype))


@pytest.mark.parametrize("case", RESIDUAL_CASES.values(), ids=RESIDUAL_CASES)
def test_residual_matches_index_add(case: ResidualCase, backend: str, device: str, dtype: torch.dtype) -> None:
    rows, cu_seqlens, inputs = make_residual(case, dtype, device)
    live = sum(case.layer.lengths)
    assert_matches_formula(
        lambda x, a, weight, bias, scale: ragged_linear_residual(x, rows, a, weight, bias, cu_seqlens, scale),
        lambda **tensors: residual_formula(rows, live, **tensors),
        inputs,
    )


@pytest.mark.parametrize("case", RESIDUAL_CASES.values(), ids=RESIDUAL_CASES)
def test_inplace_is_the_same(case: ResidualCase, backend: str, device: str, dtype: torch.dtype) -> None:
    rows, cu_seqlens, inputs = make_residual(case, dtype, device)
    x, a, weight, bias, scale = inputs.values()
    wanted = ragged_linear_residual(x, rows, a, weight, bias, cu_seqlens, scale)
    before, a_before, live = x.clone(), a.clone(), sum(case.layer.lengths)
    out = ragged_linear_residual_(x, rows, a, weight, bias, cu_seqlens, scale)
    assert out is x
    assert_equal("x", x, wanted)
    assert_equal("a", a, a_before)
    listed = torch.arange(live) if rows is None else rows[:live][rows[:live] >= 0].long()
    untouched = torch.ones(len(x), dtype=torch.bool, device=device)
    untouched[listed] = False
    assert_equal("rows that are not listed", x[untouched], before[untouched])


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape).double()


@pytest.mark.parametrize("scale", [None, "layer", "token"])
def test_rounds_once(scale: str | None, backend: str, device: str, dtype: torch.dtype) -> None:
    """Whole numbers, whose sums are exact in float32: the only rounding is the last."""
    cu_seqlens, rows = offsets((40, 30), device), random_rows(90, 70, device=device)
    x, a, weight, bias = whole(-999, 999, 90, 40) / 8, whole(-9, 9, 70, 48), whole(-9, 9, 40, 48), whole(-9, 9, 40)
    factor = None if scale is None else 2.0 ** whole(-3, 3, *((40,) if scale == "layer" else (70, 1)))
    x, a, weight, bias = (value.to(device, dtype) for value in (x, a, weight, bias))
    factor = None if factor is None else factor.to(device, dtype)
    exact = F.linear(a.double(), weight.double(), bias.double())
    if scale is None:
        assert_equal("out", ragged_linear(a, weight, bias, cu_seqlens), exact.to(dtype))
    else:
        exact = exact * factor.double()
    wanted = x.double().index_add(0, rows.long(), exact).to(dtype)
    assert_equal("x", ragged_linear_residual(x, rows, a, weight, bias, cu_seqlens, factor), wanted)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_behind_the_count_are_ignored(activation: str | None, backend: str, device: str) -> None:
    cu_seqlens, layer = make_layer(CASES["dead"], torch.float32, device)
    leaves = {name: value.requires_grad_() for name, value in layer.items()}
    out = ragged_linear(**leaves, cu_seqlens=cu_seqlens, activation=activation)
    grad = poison_behind(torch.ones_like(out), 9)
    for found, (name, leaf) in zip(torch.autograd.grad(out, list(leaves.values()), grad), leaves.items()):
        assert found.shape == leaf.shape
        assert found.isfinite().all(), name
        if name == "a":
            assert not found[9:].any()


@pytest.mark.parametrize("scale", [None, "layer", "token"])
def test_residual_gradients_of_other_rows_are_ignored(scale: str | None, backend: str, device: str) -> None:
    rows, cu_seqlens, inputs = make_residual(ResidualCase(rows=None, scale=scale), torch.float32, device)
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}
    out = ragged_linear_residual(**{"scale": None, **leaves}, rows=rows, cu_seqlens=cu_seqlens)
    others = {name: leaf for name, leaf in leaves.items() if name != "x"}
    grads = torch.autograd.grad(out, list(others.values()), poison_behind(torch.ones_like(out), 9))
    for name, found in zip(others, grads):
        assert found.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str, device: str) -> None:
    cu_seqlens, layer = make_layer(CASES["dead"], torch.float32, device)
    half = {name: value.to(dtype) for name, value in layer.items()}
    x, rows = random_tensor(12, 20, device=device), random_rows(12, 9, 3, device)
    with torch.autocast(device, dtype):
        out, grads = value_and_gradients(
            lambda **tensors: ragged_linear(**tensors, cu_seqlens=cu_seqlens, activation="gelu"), layer
        )
        added = ragged_linear_residual(x, rows, **layer, cu_seqlens=cu_seqlens)
        ragged_linear_residual_(x, rows, **layer, cu_seqlens=cu_seqlens)
    assert_equal("out", out[0], ragged_linear(**half, cu_seqlens=cu_seqlens, activation="gelu"))
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert added.dtype == torch.float32
    assert_equal("x", x, added)


def test_shapes_without_memory() -> None:
    """The meta device knows no autocast, and is asked for shapes all the same."""
    layer = {name: value.to("meta") for name, value in good_layer().items()}
    assert ragged_linear(**layer).shape == (3, 4)
    assert ragged_linear_residual(torch.empty(5, 4, device="meta"), None, **layer).shape == (5, 4)


def test_a_may_lie_in_x(backend: str, device: str) -> None:
    x = torch.arange(12.0, device=device).reshape(4, 3)
    rows, weight = torch.tensor([1, 2, 3], dtype=torch.int32, device=device), torch.eye(3, device=device)
    expected = x.clone()
    expected[1:] += x[:3]
    ragged_linear_residual_(x, rows, x[:3], weight, None, offsets((3,), device))
    assert_equal("x", x, expected)


@pytest.mark.parametrize("what", ["bias", "layer", "token"])
def test_bias_and_scale_may_lie_in_x(what: str, backend: str, device: str) -> None:
    x, a = random_tensor(6, 5, device=device), random_tensor(6, 3, device=device)
    weight, bias = random_tensor(5, 3, device=device), random_tensor(5, device=device)

    def inside(x: Tensor) -> dict[str, Tensor | None]:
        other = {"bias": x[0], "layer": x[1], "token": x[:, 2:3]}[what]
        return {"bias": bias, "scale": None} | {"bias" if what == "bias" else "scale": other}

    cu_seqlens = offsets((6,), device)
    expected = ragged_linear_residual(x, None, a, weight, cu_seqlens=cu_seqlens, **inside(x))
    ragged_linear_residual_(x, None, a, weight, cu_seqlens=cu_seqlens, **inside(x))
    assert_equal("x", x, expected)


@pytest.mark.parametrize("wanting", ["x", "a", "weight", "bias", "scale"])
def test_inplace_refuses_gradients(wanting: str, backend: str, device: str) -> None:
    tensors = {"x": (3, 4), "a": (3, 2), "weight": (4, 2), "bias": (4,), "scale": (4,)}
    tensors = {name: torch.zeros(shape, device=device) for name, shape in tensors.items()}
    tensors[wanting].requires_grad_()
    with pytest.raises(RuntimeError, match="use ragged_linear_residual"):
        ragged_linear_residual_(**tensors, rows=None, cu_seqlens=offsets((3,), device))
    with torch.no_grad():
        ragged_linear_residual_(**tensors, rows=None, cu_seqlens=offsets((3,), device))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4, 8).T, r"x must have a last stride of 1, got strides \(1, 8\)"),
        (torch.ones(1, 4).expand(8, 4), "x must have rows that do not overlap"),
    ],
    ids=["turned", "expanded"],
)
def test_inplace_refuses_strides(x: Tensor, message: str, backend: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_linear_residual_(x.to(device), **at(device, good_layer()), rows=None)


def good_layer() -> dict:
    return {
        "a": torch.ones(3, 2),
        "weight": torch.ones(4, 2),
        "bias": torch.ones(4),
        "cu_seqlens": offsets((2, 1)),
    }


def good_residual() -> dict:
    return {"x": torch.ones(5, 4), "rows": torch.tensor([0, 2, 4], dtype=torch.int32), **good_layer()}


def at(device: str, arguments: dict) -> dict:
    return {name: value.to(device) for name, value in arguments.items()}


BAD = {
    "a-rank": ({"a": torch.ones(1, 3, 2)}, ValueError, r"a must have shape \(T, K\)"),
    "a-kind": ({"a": [[1.0]]}, TypeError, "a must be a tensor, got list"),
    "a-integer": ({"a": torch.ones(3, 2).int()}, TypeError, "a must have dtype"),
    "weight-shape": ({"weight": torch.ones(2, 4)}, ValueError, r"weight must have shape \(N, 2\), got \(2, 4\)"),
    "weight-dtype": ({"weight": torch.ones(4, 2).half()}, TypeError, "weight must have dtype float32"),
    "weight-device": ({"weight": torch.ones(4, 2, device="meta")}, ValueError, "weight must be on cpu"),
    "bias-shape": ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(4,\)"),
    "bias-dtype": ({"bias": torch.ones(4).double()}, TypeError, "bias must have dtype float32"),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0, 3])}, TypeError, "cu_seqlens must have dtype int32"),
    "offsets-none": ({"cu_seqlens": torch.zeros(0).int()}, ValueError, "cu_seqlens must have B"),
    "offsets-beyond": (
        {"cu_seqlens": offsets((2, 2))},
        ValueError,
        "cu_seqlens must end .*3.*, got 4",
    ),
    "offsets-start": ({"cu_seqlens": offsets((2, 1)) + 1}, ValueError, "cu_seqlens must start at 0"),
    "offsets-fall": ({"cu_seqlens": offsets((2, -1))}, ValueError, "cu_seqlens must not decrease"),
}
BAD_RESIDUAL = {
    "x-rank": ({"x": torch.ones(4)}, ValueError, r"x must have shape \(R, 4\)"),
    "x-width": ({"x": torch.ones(5, 3)}, ValueError, r"x must have shape \(R, 4\)"),
    "x-dtype": ({"x": torch.ones(5, 4).double()}, TypeError, "x must have dtype float32"),
    "rows-device": ({"rows": torch.zeros(3, device="meta").int()}, ValueError, "rows must be on cpu"),
    "rows-count": ({"rows": torch.zeros(2).int()}, ValueError, r"rows must have shape \(3,\)"),
    "rows-dtype": ({"rows": torch.arange(3)}, TypeError, "rows must have dtype int32"),
    "rows-beyond": ({"rows": torch.tensor([0, 1, 5]).int()}, ValueError, r"rows must (be|lie) in \[-1, 5\), got 5"),
    "rows-below": ({"rows": torch.tensor([0, 1, -2]).int()}, ValueError, r"rows must (be|lie) in \[-1, 5\), got -2"),
    "no-rows": ({"rows": None, "x": torch.ones(2, 4)}, ValueError, "a must have at most x's 2 rows .* got 3"),
    "scale-shape": ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \(4,\)"),
    "scale-tokens": ({"scale": torch.ones(2, 1)}, ValueError, r"scale must have shape \(3, 1\)"),
    "scale-dtype": ({"scale": torch.ones(4).half()}, TypeError, "scale must have dtype float32"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    with pytest.raises(error, match=message):
        ragged_linear(**{**good_layer(), **changes})


@pytest.mark.parametrize("op", [ragged_linear_residual, ragged_linear_residual_])
@pytest.mark.parametrize(("changes", "error", "message"), {**BAD, **BAD_RESIDUAL}.values(), ids={**BAD, **BAD_RESIDUAL})
def test_bad_residual_input(changes: dict, error: type[Exception], message: str, op, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    arguments = {**good_residual(), **changes}
    before = arguments["x"].clone()
    with pytest.raises(error, match=message):
        op(**arguments)
    assert_equal("x after the refusal", arguments["x"], before)


def test_unknown_activation(backend: str, device: str) -> None:
    with pytest.raises(ValueError, match="activation must be one of None, 'gelu', got 'relu'"):
        ragged_linear(**at(device, good_layer()), activation="relu")
