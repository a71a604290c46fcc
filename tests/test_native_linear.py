"""Native linear layers, lives and evolving scores: against float64, every layout, every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtvit_ops import _extension
from mtvit_ops.testing import assert_close_to_float64, offsets

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


# rows, in_features, out_features: each tile height, panels that are not full, sums of one part and of several
CASES = {
    "one-row": (1, 64, 48),
    "two-rows": (2, 64, 48),
    "tile-less-one": (5, 64, 32),
    "tile": (6, 64, 32),
    "tile-and-one": (7, 64, 32),
    "tall-tile-and-one": (13, 33, 17),
    "several-tiles": (50, 64, 96),
    "block-and-one": (205, 40, 35),
    "many-blocks": (700, 24, 16),
    "one-feature": (9, 1, 16),
    "one-output": (9, 70, 1),
    "odd": (11, 37, 53),
    "part-less-one": (8, 255, 16),
    "part": (8, 256, 16),
    "part-and-one": (8, 257, 16),
    "three-parts": (30, 700, 24),
    "one-pair": (5, 2, 40),
    "pairs-of-one-part": (8, 512, 16),
    "pairs-of-one-part-and-one": (13, 514, 48),
    "long-and-few": (3, 3000, 7),
    "no-rows": (0, 8, 16),
    "no-features": (4, 0, 16),
    "no-outputs": (4, 8, 0),
}


def drawn(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, outputs = CASES[case]
    torch.manual_seed(0)
    a = torch.randn(rows, features).to(dtype)
    weight = (torch.randn(outputs, features) / max(features, 1) ** 0.5).to(dtype)
    return a, weight, torch.randn(outputs).to(dtype)


def layer(a: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, wide: torch.dtype) -> Tensor:
    y = F.linear(a.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return F.gelu(y) if gelu else y


@DTYPES
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", CASES)
def test_linear(case: str, with_bias: bool, gelu: bool, dtype: torch.dtype) -> None:
    a, weight, bias = drawn(case, dtype)
    given = bias if with_bias else None
    got = native.linear(a, weight, given, gelu)
    assert got.dtype == dtype
    assert_close_to_float64(
        "linear",
        got,
        layer(a, weight, given, gelu, torch.float64),
        layer(a, weight, given, gelu, torch.float32).to(dtype),
    )
    if weight.shape[0] % native.panel_columns() == 0:
        assert torch.equal(native.linear(a, native.pack_panels(weight), given, gelu), got)


@DTYPES
def test_layouts_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, weight = torch.randn(230, 300).to(dtype), torch.randn(64, 300).to(dtype)
    bias = torch.randn(64).to(dtype)
    expected = native.linear(a, weight, bias, True)
    wide = torch.randn(230, 2, 310).to(dtype)
    wide[:, 1, :300] = a
    uneven = torch.randn(230, 301).to(dtype)[:, :300]  # rows that begin between two pairs
    uneven.copy_(a)
    turned = a.T.contiguous().T
    spread = bias.repeat_interleave(2)[::2]
    for left in (wide[:, 1, :300], uneven, turned):
        assert torch.equal(native.linear(left, weight.T.contiguous().T, spread, True), expected)
    once = a[:1].expand(6, 300)
    assert torch.equal(native.linear(once, weight, bias, False), native.linear(once.contiguous(), weight, bias, False))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(native.linear(a, weight, bias, True), expected)
            assert torch.equal(native.linear(a[:40], weight, bias, True), expected[:40])  # other blocks, the same sums
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_gelu_everywhere(dtype: torch.dtype) -> None:
    """Every bfloat16 and float16; float32 around zero, in the tails and beyond."""
    if dtype is torch.float32:
        magnitude = torch.cat((torch.logspace(-38, 3, 40001), torch.linspace(0, 14, 40001)))
        x = torch.cat((magnitude, -magnitude))
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite() & (x.abs() < 1e4)]
    got = native.linear(x[:, None], torch.ones(1, 1).to(dtype), None, True)[:, 0]
    exact, plain = F.gelu(x.double()), F.gelu(x.float()).to(dtype)
    size = x.double().abs()
    # float32's own erf is off by some units in the last place of 1: what the result is off by grows with x
    allowed = 2 * ((plain.double() - exact).abs() / size.clamp_min(1e-30)).nan_to_num(0.0).max() * size
    tiny = torch.finfo(dtype).smallest_normal
    assert ((got.double() - exact).abs() <= allowed + torch.finfo(dtype).eps * exact.abs() + tiny).all()
    special = torch.tensor([torch.inf, torch.nan, 0.0, -1000.0], dtype=dtype)[:, None]
    inf, nan, zero, low = native.linear(special, torch.ones(1, 1).to(dtype), None, True)[:, 0].tolist()
    assert inf == torch.inf
    assert nan != nan
    assert zero == low == 0.0


def test_a_nan_stays_in_its_row() -> None:
    a, weight, bias = drawn("several-tiles", torch.float32)
    expected = native.linear(a, weight, bias, False)
    a[7, 3] = torch.nan
    got = native.linear(a, weight, bias, False)
    assert got[7].isnan().all()
    rest = [row for row in range(len(a)) if row != 7]
    assert torch.equal(got[rest], expected[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_in_float32_of_half_factors(dtype: torch.dtype) -> None:
    a, weight, bias = drawn("odd", dtype)
    x = torch.randn(20, 53)
    rows = torch.randperm(20)[:11].int()
    exact = x.double()
    exact[rows.long()] += layer(a, weight, bias, False, torch.float64)
    native.ragged_linear_residual_(x, rows, a, weight, bias, offsets((5, 6)), None)
    assert (x.double() - exact).abs().max() < 1e-5  # nothing was rounded to the factors' dtype


def test_a_left_factor_in_the_memory_being_written() -> None:
    torch.manual_seed(2)
    x = torch.randn(24, 32)
    weight = torch.randn(32, 32)
    expected = x + F.linear(x, weight)
    native.ragged_linear_residual_(x, None, x, weight, None, offsets((24,)), None)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


MISFITS = {
    "rank": (lambda: native.linear(torch.ones(3), torch.ones(4, 3), None, False), r"a must have shape \(T, K\)"),
    "features": (
        lambda: native.linear(torch.ones(2, 3), torch.ones(4, 5), None, False),
        r"weight must have shape \(out_features, 3\), got \(4, 5\)",
    ),
    "dtype": (
        lambda: native.linear(torch.ones(2, 3), torch.ones(4, 3).half(), None, False),
        "weight must have x's dtype",
    ),
    "double": (
        lambda: native.linear(torch.ones(2, 3).double(), torch.ones(4, 3).double(), None, False),
        "must be float32, bfloat16 or float16",
    ),
    "bias": (
        lambda: native.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), False),
        r"bias must have shape \(4,\), got \(3,\)",
    ),
    "bias-dtype": (
        lambda: native.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).half(), False),
        "bias must have a's dtype",
    ),
    "panels": (
        lambda: native.linear(torch.ones(2, 3), torch.ones(1, 3, 5), None, False),
        r"a packed weight must have shape \(N / \d+, 3, \d+\), got \(1, 3, 5\)",
    ),
    "onednn": (
        lambda: native.linear(torch.ones(2, 8), torch.ones(8, 8).to_mkldnn(), None, False),
        "not one packed for oneDNN",
    ),
    "uneven": (lambda: native.pack_panels(torch.ones(3, 8)), r"weight must have a multiple of \d+ rows, got \(3, 8\)"),
    "lives-rank": (lambda: native.lives(torch.ones(3, 4), torch.ones(4, 4), 0.0, 1.0, 1, 2), r"\(B, 1 \+ N, D\)"),
    "lives-class": (lambda: native.lives(torch.ones(2, 0, 4), torch.ones(4, 4), 0.0, 1.0, 1, 2), "a class token"),
    "lives-weight": (
        lambda: native.lives(torch.ones(2, 3, 4), torch.ones(4, 5), 0.0, 1.0, 1, 2),
        r"weight must have shape \(4, 4\), got \(4, 5\)",
    ),
    "scores-rows": (
        lambda: native.evolve_scores(torch.ones(2, 3), torch.ones(4), torch.tensor([0, 4]).int(), 0.5),
        r"rows must lie in \[-1, 4\), got 4",
    ),
    "scores-count": (
        lambda: native.evolve_scores(torch.ones(2, 3), torch.ones(4), None, 0.5),
        r"\(4, H\), got \(2, 3\)",
    ),
    "scores-dtype": (
        lambda: native.evolve_scores(torch.ones(4, 3).half(), torch.ones(4), None, 0.5),
        "received and score must be float32",
    ),
}


@pytest.mark.parametrize(("call", "words"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_told(call, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call()


# --- what methods ask of their tokens ---------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(2, 197, 64), (1, 2, 5), (3, 50, 37), (0, 4, 8), (2, 1, 8)], ids=str)
def test_lives(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[2], shape[2]).to(dtype)

    def meaning(wide: torch.dtype) -> Tensor:
        normed = F.layer_norm(x.to(wide), shape[2:])
        scores = (normed[:, 1:] @ (normed[:, 0] @ weight.to(wide).T)[:, :, None])[:, :, 0]
        centred = scores - scores.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1, keepdim=True) / max(scores.shape[1] - 1, 1)
        spread = variance.clamp_min(torch.finfo(wide).tiny).sqrt()
        return 4 + 8 * (centred / (spread + 1e-8) * 0.3 + 0.6)

    got = native.lives(x, weight, 0.6, 0.3, 4, 12)
    exact = meaning(torch.float64)
    if shape[1] == 2:  # one patch: its centred score is rounding and nothing else
        exact = torch.full_like(exact, 8.8)
    assert got.dtype == torch.float32
    assert_close_to_float64("lives", got, exact, meaning(torch.float32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(native.lives(x, weight, 0.6, 0.3, 4, 12), got)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rows", [None, (5, 0, -1, 3)], ids=["everyone", "list"])
def test_evolving_scores(rows: tuple[int, ...] | None, weight: float) -> None:
    torch.manual_seed(4)
    score = torch.rand(6)
    received = torch.rand(6 if rows is None else 4, 3)
    listed = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    before = score.clone()
    got = native.evolve_scores(received, score, listed, weight)
    assert torch.equal(score, before)
    exact = score.double()
    for entry, row in enumerate(range(6) if rows is None else rows):
        if row >= 0:
            exact[row] += weight * (received[entry].double().sum() - exact[row])
    assert (got.double() - exact).abs().max() < 1e-6  # a few float32 roundings of numbers below 3
    if rows is not None:
        assert torch.equal(got[[1, 2, 4]], score[[1, 2, 4]])
