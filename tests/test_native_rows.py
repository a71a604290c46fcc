"""Native layer norm and residual addition against float64, every native value error, every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtvit_ops import _extension

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORCED = "MTVIT_OPS_ISA" in os.environ  # this run is a child of test_every_instruction_set
FILES = (
    "test_native.py",
    "test_native_rows.py",
    "test_native_linear.py",
    "test_native_models.py",
    "test_native_backward.py",
    "test_tail_predictor.py",
)


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, ulps: int = 4) -> None:
    """No more than twice what plain PyTorch loses in the same dtype, and a few units in the last place."""
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    if got.numel() == 0:
        return
    last_place = torch.finfo(plain.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + ulps * last_place


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(1)
    return mean, ((x - mean[:, None]).square().mean(1) + 1e-5).rsqrt()


# --- gather_layer_norm ------------------------------------------------------------------------------------------------

ROW_CASES = {  # (rows of x, width, list or None)
    "all-rows": (13, 384, None),
    "list": (13, 384, [12, 0, 5, 3]),
    "fillers": (13, 192, [4, -1, 2, -1, -1]),
    "repeated": (4, 64, [1, 1, 1]),
    "odd-width": (9, 37, [8, 1, 0]),
    "narrow": (9, 3, [8, 1, 0]),
    "one-column": (5, 1, None),
    "one-row": (1, 100, [0]),
    "no-entries": (5, 32, []),
    "no-rows": (0, 32, None),
    "only-fillers": (0, 32, [-1, -1]),
    "many": (3000, 48, None),
}


@DTYPES
@pytest.mark.parametrize("float_parameters", [False, True])
@pytest.mark.parametrize("case", ROW_CASES)
def test_gather_layer_norm(case, float_parameters, dtype):
    num_rows, width, listed = ROW_CASES[case]
    torch.manual_seed(0)
    x = (torch.randn(num_rows, width) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, width).to(torch.float32 if float_parameters else dtype)
    rows = None if listed is None else torch.tensor(listed, dtype=torch.int32)
    out, mean, rstd = native.gather_layer_norm(x, rows, weight, bias, 1e-5)

    live = torch.ones(num_rows, dtype=torch.bool) if rows is None else rows >= 0
    read = x if rows is None else x[rows[live].long()]
    wide = read.double()
    exact = F.layer_norm(wide, (width,), weight.double(), bias.double(), 1e-5)
    plain = F.layer_norm(read.float(), (width,), weight.float(), bias.float(), 1e-5).to(dtype)
    assert_as_good(out[live], exact, plain)
    (exact_mean, exact_rstd), (plain_mean, plain_rstd) = statistics(wide), statistics(read.float())
    assert_as_good(mean[live], exact_mean, plain_mean)
    assert_as_good(rstd[live], exact_rstd, plain_rstd)
    for t in (out, mean, rstd):
        assert (t[~live] == 0).all()


def test_gather_layer_norm_far_from_zero():
    # one pass over squares would lose every digit here
    x = torch.randn(7, 96) + 1e4
    out, _, _ = native.gather_layer_norm(x, None, torch.ones(96), torch.zeros(96), 1e-6)
    exact = F.layer_norm(x.double(), (96,), eps=1e-6)
    assert_as_good(out, exact, F.layer_norm(x, (96,), eps=1e-6))


def test_gather_layer_norm_reads_wider_rows():
    x = torch.randn(6, 2, 40)[:, 1]
    expected = native.gather_layer_norm(x.contiguous(), None, torch.ones(40), torch.zeros(40), 1e-6)
    got = native.gather_layer_norm(x, None, torch.ones(40), torch.zeros(40), 1e-6)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


# --- scatter_residual_ ------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("scale", ["none", "column", "row", "column-float", "row-double"])
@pytest.mark.parametrize("case", [name for name in ROW_CASES if name != "repeated"])
def test_scatter_residual(case, scale, dtype):
    num_rows, width, listed = ROW_CASES[case]
    torch.manual_seed(1)
    x = torch.randn(num_rows, width).to(dtype)
    rows = None if listed is None else torch.tensor(listed, dtype=torch.int32)
    count = num_rows if rows is None else len(rows)
    y = torch.randn(count, width).to(dtype)
    factor = None
    if scale != "none":
        factor = torch.randn(width) if scale.startswith("column") else torch.randn(count, 1)
        factor = factor.to({"float": torch.float32, "double": torch.float64}.get(scale.rpartition("-")[2], dtype))
    step = y.double() if factor is None else y.double() * factor.double()
    exact, plain = x.double(), x.float()
    index = torch.arange(count) if rows is None else rows.long()
    live = index >= 0
    exact[index[live]] += step[live]
    single = y.float() if factor is None else y.float() * factor.float()
    plain[index[live]] += single[live]
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[index[live]] = False
    before = x.clone()
    assert native.scatter_residual_(x, rows, y, factor) is None
    assert_as_good(x, exact, plain.to(dtype))
    assert torch.equal(x[untouched], before[untouched])


def test_scatter_residual_strided():
    torch.manual_seed(2)
    wide = torch.randn(6, 2, 24)
    before = wide.clone()
    y = torch.randn(24, 6).T  # last stride is not 1
    native.scatter_residual_(wide[:, 1], None, y, None)
    assert torch.equal(wide[:, 0], before[:, 0])
    assert torch.equal(wide[:, 1], before[:, 1] + y)


@DTYPES
def test_rows_do_not_depend_on_threads(dtype):
    torch.manual_seed(3)
    x, y = torch.randn(2, 997, 130).to(dtype)
    rows = torch.randperm(997)[:800].int()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            moved = x.clone()
            native.scatter_residual_(moved, rows, y[:800], None)
            ones = torch.ones(130)
            results.append((moved, *native.gather_layer_norm(x, rows, ones, ones, 1e-6)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DTYPES
def test_slow_fast_does_not_depend_on_threads(dtype):
    torch.manual_seed(4)
    lengths = torch.tensor([150, 0, 90, 1, 160])
    cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    rows = torch.randperm(600)[: int(lengths.sum())].int()
    x, increment, weights = (
        torch.randn(600, 130).to(dtype),
        torch.randn(5, 130).to(dtype),
        torch.rand(len(rows)).to(dtype),
    )
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            merged = native.slow_fast_merge(x, weights, rows, cu, 160, True)
            results.append((merged, native.slow_fast_update(x, rows, cu, 160, increment)))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_conversion_is_exact(dtype):
    # every value of the format goes in; every sum comes out rounded as PyTorch rounds it
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()].reshape(-1, 2)
    x = torch.zeros_like(every)
    native.scatter_residual_(x, None, every, None)
    assert torch.equal(x, every + 0)
    for factor in (1.0009765625, 0.333, 3e-5, 700.0):
        x = every.flip(0).contiguous()
        expected = (x.float() + every.float() * factor).to(dtype)
        native.scatter_residual_(x, None, every, torch.full((2,), factor))
        exact = torch.equal(x.nan_to_num(7.0), expected.nan_to_num(7.0))
        # a fused multiply-add may round a tie the other way, by one place
        assert exact or (x.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1


# --- errors -----------------------------------------------------------------------------------------------------------


def attend(**changes):
    q, k, v = torch.randn(3, 6, 2, 4)
    args = {"q": q, "k": k, "v": v, "bias": None, "mode": 0}
    args |= {"cu_q": [0, 2, 6], "cu_k": [0, 3, 6], "max_q": 4, "max_k": 3} | changes
    cu_q, cu_k = (torch.tensor(args[name], dtype=torch.int32) for name in ("cu_q", "cu_k"))
    q, k, v, bias = (args[name] for name in ("q", "k", "v", "bias"))
    return native.varlen_attention(q, k, v, cu_q, cu_k, args["max_q"], args["max_k"], 0.5, bias, args["mode"])


def pick(**changes):
    args = {"scores": torch.randn(6), "rows": None, "cu": [0, 2, 6], "mask": None, "counts": None, "keep": -1}
    args |= {"threshold": None, "prefix": 0, "capacity": 6, "return_dropped": True, "dropped": 6} | changes
    cu = torch.tensor(args["cu"], dtype=torch.int32)
    counts = None if args["counts"] is None else torch.tensor(args["counts"], dtype=torch.int32)
    rule = args["mask"], counts, args["keep"], args["threshold"], args["prefix"], False
    return native.token_select(
        args["scores"], args["rows"], cu, *rule, args["capacity"], args["return_dropped"], args["dropped"]
    )


def norm(rows=None, x=None, **changes):
    args = {"weight": torch.ones(8), "bias": torch.ones(8)} | changes
    x = torch.randn(5, 8) if x is None else x
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    return native.gather_layer_norm(x, rows, args["weight"], args["bias"], 1e-6)


VALUE_ERRORS = {
    "cu_seqlens_q must start at 0, got 3": lambda: attend(cu_q=[3, 4, 6]),
    "cu_seqlens_q must not decrease, got 2 after 4": lambda: attend(cu_q=[0, 4, 2]),
    "cu_seqlens_k must end at 6 or before, got 7": lambda: attend(cu_k=[0, 3, 7], max_k=4),
    "max_seqlen_q must be at least 4, got 3": lambda: attend(max_q=3),
    "max_seqlen_k must be at least 3, got 1": lambda: attend(max_k=1),
    "cu_seqlens must start at 0, got -1": lambda: pick(cu=[-1, 2, 6], keep=1),
    "cu_seqlens must not decrease, got 1 after 2": lambda: pick(cu=[0, 2, 1], keep=1),
    "cu_seqlens must end at 6 or before, got 9": lambda: pick(cu=[0, 2, 9], keep=1),
    "keep must lie in [0, 2] for image 0 (its prefix, its length), got 3": lambda: pick(keep=3),
    "keep must lie in [2, 4] for image 1 (its prefix, its length), got 1": lambda: pick(cu=[0, 1, 5], prefix=2, keep=1),
    "keep must lie in [0, 0] for image 0 (its prefix, its length), got 1": lambda: pick(cu=[0, 0, 6], keep=1),
    "keep must lie in [1, 4] for image 1 (its prefix, its length), got 5": lambda: pick(counts=[1, 5], prefix=1),
    "keep must lie in [0, 2] for image 0 (its prefix, its length), got -1": lambda: pick(counts=[-1, 2]),
    "capacity must be at least 4, got 3": lambda: pick(keep=2, capacity=3),
    "dropped_capacity must be at least 2, got 1": lambda: pick(keep=2, dropped=1),
    "capacity must be at least 6, got 5": lambda: pick(threshold=-1e9, capacity=5),
    "rows must lie in [-1, 5), got 5": lambda: norm(rows=[0, 5]),
    "rows must lie in [-1, 5), got -2": lambda: norm(rows=[-2]),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_value_errors(message):
    with pytest.raises(RuntimeError) as caught:
        VALUE_ERRORS[message]()
    assert str(caught.value).splitlines()[0] == "mtvit_ops value error: " + message


def test_scatter_checks_before_it_writes():
    x = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"^mtvit_ops value error: rows must lie in \[-1, 4\), got 4"):
        native.scatter_residual_(x, torch.tensor([0, 4], dtype=torch.int32), torch.ones(2, 3), None)
    assert (x == 0).all()


SHAPE_ERRORS = {
    "q must have shape (Tq, H, d), got (6, 8)": lambda: attend(q=torch.randn(6, 8)),
    "k must have shape (Tk, 2, 4), got (6, 2, 5)": lambda: attend(k=torch.randn(6, 2, 5)),
    "v must have shape (6, 2, dv), got (5, 2, 4)": lambda: attend(v=torch.randn(5, 2, 4)),
    "q must be float32, bfloat16 or float16": lambda: attend(q=torch.randn(6, 2, 4).double()),
    "q, k and v must have one dtype": lambda: attend(k=torch.randn(6, 2, 4).half()),
    "cu_seqlens_k must have shape (3,), got (2,)": lambda: attend(cu_k=[0, 3]),
    "cu_seqlens_q must have shape (B + 1,), got (0,)": lambda: attend(cu_q=[]),
    "key_bias must have shape (6,) or (6, 2), got (6, 3)": lambda: attend(bias=torch.randn(6, 3)),
    "key_bias must have shape (6,) or (6, 2), got ()": lambda: attend(bias=torch.tensor(1.0)),
    "key_bias must be a floating-point CPU tensor": lambda: attend(bias=torch.ones(6, dtype=torch.int32)),
    "scores must be 0, 1 or 2, got 3": lambda: attend(mode=3),
    "exactly one of keep, keep_counts, threshold and mask must be given, got 2": lambda: pick(keep=1, threshold=0.0),
    "exactly one of keep, keep_counts, threshold and mask must be given, got 0": pick,
    "scores must be given unless mask is": lambda: pick(scores=None, keep=1),
    "scores must be a floating-point CPU tensor": lambda: pick(scores=torch.ones(6, dtype=torch.int32), keep=1),
    "mask must be bool": lambda: pick(mask=torch.ones(6)),
    "mask must have shape (6,), got (5,)": lambda: pick(mask=torch.ones(5, dtype=torch.bool)),
    "rows must have shape (6,), got (4,)": lambda: pick(rows=torch.zeros(4, dtype=torch.int32), keep=1),
    "rows must be int32": lambda: pick(rows=torch.zeros(6, dtype=torch.int64), keep=1),
    "keep_counts must have shape (2,), got (1,)": lambda: pick(counts=[1]),
    "capacity must be at least 0, got -1": lambda: pick(keep=1, capacity=-1),
    "num_prefix_tokens must be at least 0, got -1": lambda: pick(keep=1, prefix=-1),
    "x must have shape (R, D), got (8,)": lambda: norm(x=torch.randn(8)),
    "weight must have shape (8,), got (7,)": lambda: norm(weight=torch.ones(7)),
    "bias must be float32 or have x's dtype": lambda: norm(bias=torch.ones(8).half()),
    "y must have shape (4, 3), got (2, 3)": lambda: native.scatter_residual_(
        torch.ones(4, 3), None, torch.ones(2, 3), None
    ),
    "rows of x must not overlap": lambda: native.scatter_residual_(
        torch.ones(3).expand(4, 3), None, torch.ones(4, 3), None
    ),
    "y must have x's dtype": lambda: native.scatter_residual_(torch.ones(4, 3), None, torch.ones(4, 3).half(), None),
    "scale must have shape (3,) or (4, 1), got (4,)": lambda: native.scatter_residual_(
        torch.ones(4, 3), None, torch.ones(4, 3), torch.ones(4)
    ),
}


@pytest.mark.parametrize("message", SHAPE_ERRORS)
def test_shape_errors(message):
    with pytest.raises(RuntimeError) as caught:
        SHAPE_ERRORS[message]()
    assert str(caught.value).splitlines()[0] == message


# --- the extension itself ---------------------------------------------------------------------------------------------


def test_build_info():
    info = _extension.build_info()
    assert info["extension"] is True
    assert info["isa"] in info["isa_levels"]
    assert {"compiler", "cxx_flags", "build_type", "torch_version", "cuda", "cuda_archs"} <= info.keys()
    assert _extension.extension_error() is None


def test_pack_greedy():
    from mtvit_ops import _build

    assert _build.pack_greedy([5, 9, 3, 1, 2], 10) == [[1, 3], [0, 2, 4]]
    assert _build.pack_greedy([], 10) == []
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 10\], got 11"):
        _build.pack_greedy([3, 11], 10)


@pytest.mark.skipif(FORCED, reason="this run is one of its children")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(level):
    """All the native tests again, under the levels that this run does not use."""
    script = "from mtvit_ops import _extension; print(_extension.build_info()['isa'])"
    environment = os.environ | {"MTVIT_OPS_ISA": level}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "MTVIT_OPS_ISA must be one of" in run.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert run.stdout.split() == [level], run.stderr
    if level == _extension.build_info()["isa"]:
        return  # this run tests it
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *files]
    environment["OMP_NUM_THREADS"] = "1"  # a busy machine makes many short parallel regions slow
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set():
    script = "from mtvit_ops import _extension; _extension.build_info()"
    environment = os.environ | {"MTVIT_OPS_ISA": "z80"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "MTVIT_OPS_ISA must be one of portable" in run.stderr
    assert "got z80" in run.stderr


def test_level_is_finite_for_subnormals():
    # the softmax of far-apart logits meets the bottom of float32
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, -80.0, -90.0, -200.0]).reshape(4, 1, 1)
    cu_q, cu_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    _, lse, scores = native.varlen_attention(q, k, k, cu_q, cu_k, 1, 4, 1.0, None, 1)
    exact = k[:, :, 0].double().softmax(0)
    assert torch.allclose(scores.double(), exact, rtol=1e-5, atol=2**-126)
    assert math.isclose(lse.item(), 0.0, abs_tol=1e-6)
