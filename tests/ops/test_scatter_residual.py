"""scatter_residual, functional and in place, against index_add."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtvit_ops.ops import scatter_residual, scatter_residual_
from mtvit_ops.testing import assert_equal, assert_matches_formula, random_rows, random_tensor


class Case(NamedTuple):
    num_rows: int
    live: int | None = None  # None: all rows, without a list
    dim: int = 24
    dead: int = 0  # fillers of -1 behind the list, whose y and scale are NaN
    rows: tuple[int, ...] | None = None  # a list written out instead of drawn
    scale: str | None = None  # "layer": (D,), "token": (T, 1)
    float32_scale: bool = False
    strided: bool = False  # x is the left half of a wider array, y and rows every other entry of one


CASES = {
    "all-rows": Case(5),
    "keep-all": Case(5, live=5),
    "half": Case(8, live=4),
    "ViT-S": Case(80, live=50, dim=384, scale="layer"),
    # no vector width divides them
    "D=1": Case(6, live=3, dim=1, scale="token"),
    "D=7": Case(6, live=3, dim=7, scale="layer"),
    "D=100": Case(6, live=3, dim=100),
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
    "D=0": Case(4, live=2, dim=0),
    "layer-scale": Case(8, live=4, scale="layer"),
    "layer-scale-all-rows": Case(8, scale="layer"),
    "token-scale-all-rows": Case(8, scale="token"),
    "float32-scale": Case(8, live=4, scale="layer", float32_scale=True),
    "float32-token-scale": Case(8, live=4, scale="token", float32_scale=True),
    "strided": Case(8, live=4, strided=True, scale="layer"),
    "strided-all-rows": Case(8, strided=True),
}


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    rows = None
    if case.rows is not None:
        rows = torch.tensor(case.rows, dtype=torch.int32, device=device)
    elif case.live is not None:
        rows = random_rows(case.num_rows, case.live, case.dead, device)
    if rows is not None and case.strided:
        rows = rows.repeat_interleave(2)[::2]
    tokens = case.num_rows if rows is None else len(rows)
    step = 2 if case.strided else 1
    x = random_tensor(case.num_rows, step * case.dim, dtype=dtype, device=device)[:, : case.dim]
    y = random_tensor(step * tokens, case.dim, dtype=dtype, device=device)[::step]
    if rows is not None:
        y[rows < 0] = math.nan
    scale = None
    if case.scale is not None:
        kept = torch.float32 if case.float32_scale and dtype != torch.float64 else dtype
        scale = random_tensor(case.dim if case.scale == "layer" else tokens, dtype=kept, device=device)
        if case.scale == "token":
            scale = scale[:, None]
            if rows is not None:
                scale[rows < 0] = math.nan
    return rows, {"x": x, "y": y, "scale": scale}


def formula(rows: Tensor | None, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    if rows is None:
        return (x + y if scale is None else x + scale * y).to(x.dtype)
    live = rows >= 0
    step = y[live]
    if scale is not None:
        step = (scale if scale.dim() == 1 else scale[live]) * step
    return x.index_add(0, rows[live].long(), step.to(x.dtype))


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Within half an ulp of the exact sum, and a hundredth of one for float32's own rounding."""
    if got.dtype in (torch.bfloat16, torch.float16):
        unit = torch.finfo(got.dtype).eps / 2
        worst = ((got.double() - exact).abs() - 1.01 * unit * exact.abs()).max().item() if got.numel() else 0.0
        # float16's steps stop shrinking at 2**-24
        assert worst <= 2**-25, f"off by {worst} beyond one rounding"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_index_add(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    rows, inputs = make_inputs(case, dtype, device)
    assert_matches_formula(
        lambda x, y, scale: scatter_residual(x, rows, y, scale), lambda **tensors: formula(rows, **tensors), inputs
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rounds_once(case: Case, inplace: bool, backend: str, device: str, dtype: torch.dtype) -> None:
    """Also: the in-place form writes x, only x, and only the listed rows of it."""
    rows, inputs = make_inputs(case, dtype, device)
    x, y, scale = inputs["x"], inputs["y"], inputs["scale"]
    exact = formula(rows, x.double(), y.double(), None if scale is None else scale.double())
    before, y_before = x.clone(), y.clone()
    out = (scatter_residual_ if inplace else scatter_residual)(x, rows, y, scale)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert_rounded_once(out, exact)
    assert (out is x) == inplace
    assert_equal("y", y, y_before)
    if rows is not None:
        unlisted = torch.ones(case.num_rows, dtype=torch.bool, device=device)
        unlisted[rows[rows >= 0].long()] = False
        assert_equal("rows that are not listed", out[unlisted], before[unlisted])


@pytest.mark.parametrize("what", ["y", "layer", "token"])
def test_y_and_scale_may_lie_in_x(what: str, backend: str, device: str, dtype: torch.dtype) -> None:
    x, y = random_tensor(6, 5, dtype=dtype, device=device), random_tensor(6, 5, dtype=dtype, device=device)

    def inside(x: Tensor) -> tuple[Tensor, Tensor | None]:
        return {"y": (x, None), "layer": (y, x[1]), "token": (y, x[:, 2:3])}[what]

    expected = scatter_residual(x, None, *inside(x))
    scatter_residual_(x, None, *inside(x))
    assert_equal("x", x, expected)


@pytest.mark.parametrize("wanting", ["x", "y", "scale"])
def test_inplace_refuses_gradients(wanting: str, backend: str, device: str) -> None:
    inputs = {"x": torch.zeros(3, 4), "y": torch.zeros(3, 4), "scale": torch.zeros(4)}
    inputs = {name: value.to(device).requires_grad_(name == wanting) for name, value in inputs.items()}
    with pytest.raises(RuntimeError, match="use scatter_residual"):
        scatter_residual_(inputs["x"], None, inputs["y"], inputs["scale"])
    with torch.no_grad():
        scatter_residual_(inputs["x"], None, inputs["y"], inputs["scale"])


def good() -> dict:
    return {"x": torch.ones(4, 8), "rows": torch.tensor([0, 2], dtype=torch.int32), "y": torch.ones(2, 8)}


BAD = {
    "x-rank": ({"x": torch.zeros(1, 4, 8)}, ValueError, r"x must have shape \(R, D\)"),
    "x-integer": ({"x": torch.zeros(4, 8).int()}, TypeError, "x must have dtype"),
    "rows-dtype": ({"rows": torch.tensor([0, 2])}, TypeError, "rows must have dtype int32"),
    "rows-device": ({"rows": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "rows must"),
    "rows-below": ({"rows": torch.tensor([1, -2], dtype=torch.int32)}, ValueError, "rows must"),
    "y-tokens": ({"y": torch.ones(3, 8)}, ValueError, r"y must have shape \(2, 8\)"),
    "y-tokens-without-rows": ({"rows": None}, ValueError, r"y must have shape \(4, 8\)"),
    "y-dim": ({"y": torch.ones(2, 7)}, ValueError, "y must have shape"),
    "y-dtype": ({"y": torch.ones(2, 8).half()}, TypeError, "y must have dtype float32"),
    "y-device": ({"y": torch.ones(2, 8, device="meta")}, ValueError, "y must be on cpu"),
    "scale-shape": ({"scale": torch.ones(7)}, ValueError, r"scale must have shape \(8,\)"),
    "scale-tokens": ({"scale": torch.ones(3, 1)}, ValueError, r"scale must have shape \(2, 1\)"),
    "scale-full": ({"scale": torch.ones(2, 8)}, ValueError, r"scale must have shape \(2, 1\)"),
    "scale-dtype": ({"scale": torch.ones(8).double()}, TypeError, "scale must have dtype float32"),
}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(8, 4).T, r"x must have a last stride of 1, got strides \(1, 4\)"),
        (torch.ones(1, 8).expand(4, 8), "x must have rows that do not overlap"),
    ],
    ids=["turned", "expanded"],
)
def test_inplace_refuses_strides(x: torch.Tensor, message: str, backend: str) -> None:
    for rows in (good()["rows"], None):
        with pytest.raises(ValueError, match=message):
            scatter_residual_(x, rows, torch.ones(4 if rows is None else 2, 8))


@pytest.mark.parametrize("op", [scatter_residual, scatter_residual_])
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, error: type[Exception], message: str, op, backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("values are looked at on the CPU only")
    arguments = {**good(), **changes}
    x = arguments["x"].clone()
    with pytest.raises(error, match=message):
        op(**arguments)
    assert_equal("x after the refusal", arguments["x"], x)


def test_y_may_lie_in_x(backend: str, device: str) -> None:
    x = torch.arange(12.0, device=device).reshape(4, 3)
    rows = torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    expected = x.clone()
    expected[1:] += x[:3]
    scatter_residual_(x, rows, x[:3])
    assert torch.equal(x, expected)


def test_list_may_be_strided(backend: str, device: str) -> None:
    """Every other entry of a longer list; the others name rows too."""
    rows = torch.tensor([0, 3, 2, 1], dtype=torch.int32, device=device)[::2]
    x, y = torch.zeros(4, 3, device=device, requires_grad=True), torch.ones(2, 3, device=device)
    out = scatter_residual(x, rows, y.requires_grad_())
    assert out[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    weights = torch.arange(12.0, device=device).reshape(4, 3)
    assert_equal("gradient of y", torch.autograd.grad(out, y, weights)[0], weights[::2])
