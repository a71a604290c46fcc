"""What models ask of native operators between and behind their blocks: against plain PyTorch, at every instruction
set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import _extension
from mtvit_ops.reference.token_select import token_select
from mtvit_ops.testing import assert_close_to_float64, assert_equal, offsets

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-6


# --- final norm and classifier ----------------------------------------------------------------------------------------

# name: rows of x, its width, classes, lengths of the images (None: each row is one)
CLASSIFIERS = {
    "class-tokens": (30, 64, 40, (7, 1, 22)),
    "slack": (30, 37, 10, (7, 5)),
    "rows": (5, 192, 1000, None),
    "one-class": (3, 16, 1, (3,)),
    "no-images": (4, 16, 7, ()),
    "no-rows": (0, 16, 7, None),
    "empty-image": (4, 16, 7, (2, 0, 2)),
}


@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classify(case: str, packed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_rows, width, classes, lengths = CLASSIFIERS[case]
    if packed:
        classes = native.panel_columns() * 3
    x, weight, bias = torch.randn(num_rows, width), torch.randn(classes, width) * 0.1, torch.randn(classes)
    x, weight, bias, scale, shift = (
        t.to(dtype) for t in (x, weight, bias, torch.rand(width) + 0.5, torch.randn(width))
    )
    cu = None if lengths is None else offsets(lengths)
    given = native.pack_panels(weight) if packed else weight

    def meaning(wide: torch.dtype) -> Tensor:
        rows = x if cu is None else x[cu[:-1].long()]
        normed = F.layer_norm(rows.to(wide), (width,), scale.to(wide), shift.to(wide), EPS)
        return F.linear(normed, weight.to(wide), bias.to(wide))

    got = native.classify(x, cu, scale, shift, EPS, given, bias)
    assert_close_to_float64("logits", got, meaning(torch.float64), meaning(dtype))
    # a norm kept in float32, rows apart from each other, another number of threads: the same bits
    wider = torch.randn(num_rows, width + 3).to(dtype)
    wider[:, :width] = x
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = native.classify(wider[:, :width], cu, scale.float(), shift.float(), EPS, given, bias)
    finally:
        torch.set_num_threads(before)
    assert_equal("logits", again, got)
    if num_rows > 0:  # one row for all
        one = x[:1].expand(4, width)
        assert_equal(
            "logits",
            native.classify(one, None, scale, shift, EPS, given, bias)[3:],
            native.classify(x[:1], None, scale, shift, EPS, given, bias),
        )
    without = native.classify(x, cu, scale, shift, EPS, given, None)
    assert_equal(
        "logits without a bias", without, native.classify(x, cu, scale, shift, EPS, given, torch.zeros_like(bias))
    )


CLASSIFY_BAD = {
    "rank": (lambda a: (a[0][0], *a[1:]), r"x must have shape \(R, D\), got \(16,\)"),
    "offsets": (lambda a: (a[0], offsets((4, 0)), *a[2:]), r"cu_seqlens must lie in \[0, 4\), got 4"),
    "offsets' dtype": (lambda a: (a[0], a[1].long(), *a[2:]), "cu_seqlens must be int32"),
    "norm": (lambda a: (*a[:2], a[2][:5], *a[3:]), r"weight must have shape \(16,\), got \(5,\)"),
    "weight": (lambda a: (*a[:5], a[5][:, :9], a[6]), r"weight must have shape \(out_features, 16\), got \(7, 9\)"),
    "dtype": (lambda a: (*a[:5], a[5].half(), a[6]), "weight must have x's dtype"),
    "bias": (lambda a: (*a[:6], a[6][:2]), r"bias must have shape \(7,\), got \(2,\)"),
}


@pytest.mark.parametrize("case", CLASSIFY_BAD)
def test_classify_refuses(case: str) -> None:
    spoil, message = CLASSIFY_BAD[case]
    args = torch.randn(4, 16), offsets((2, 2)), torch.ones(16), torch.zeros(16), EPS, torch.randn(7, 16), torch.zeros(7)
    native.classify(*args)
    with pytest.raises(RuntimeError, match=message):
        native.classify(*spoil(args))


# --- means of patches -------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("images", "length", "prefix", "width"),
    [(1, 197, 1, 192), (3, 50, 2, 37), (2, 5, 0, 1), (2, 1, 1, 8), (0, 0, 1, 8), (2, 4, 1, 0)],
)
def test_mean_patches(images: int, length: int, prefix: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(images * length, width).to(dtype)

    def meaning(wide: torch.dtype) -> Tensor:
        patches = x.to(wide).reshape(images, length, width)[:, prefix:]
        return patches.sum(dim=1) / max(patches.shape[1], 1)

    got = native.mean_patches(x, images, prefix)
    assert_close_to_float64("means", got, meaning(torch.float64), meaning(dtype))
    apart = torch.zeros(images * length, width + 5).to(dtype)
    apart[:, :width] = x
    assert_equal("means of a view", native.mean_patches(apart[:, :width], images, prefix), got)


@pytest.mark.parametrize(
    ("images", "prefix", "message"),
    [(5, 1, "as many rows, and at least one, for each of 5"), (-1, 1, "of -1"), (0, 1, "of 0"), (2, 7, r"\[0, 6\]")],
)
def test_mean_patches_refuses(images: int, prefix: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.mean_patches(torch.randn(12, 8), images, prefix)


def test_mean_patches_of_images_that_are_not_there() -> None:
    with pytest.raises(RuntimeError, match="at least one, for each of 4611686018427387904 images"):
        native.mean_patches(torch.randn(0, 0), 2**62, 0)


# --- lives and the lists of all stages --------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("shape", "budgets"),
    [
        ((2, 197, 64), (139, 99, 70)),
        ((3, 50, 37), (50, 50, 1)),
        ((9, 6, 8), (3,)),
        ((0, 4, 8), (2, 1)),
        ((2, 1, 8), (1,)),
    ],
    ids=str,
)
def test_longest_lived(shape: tuple[int, int, int], budgets: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[2], shape[2]).to(dtype)
    x[:, shape[1] // 2 :] = x[:, shape[1] // 2 : shape[1] // 2 + 1]  # equals: the first of them comes first
    schedule = weight, 0.6, 0.3, 4, 12
    lives, rows, ends = native.longest_lived(x, *schedule, budgets)
    assert_equal("lives", lives, native.lives(x, *schedule))
    cu = torch.arange(shape[0] + 1, dtype=torch.int32) * shape[1]
    scores, begin = F.pad(lives, (1, 0)).reshape(-1), 0
    for budget, found in zip(budgets, ends):
        count = shape[0] * budget
        want = token_select(scores, None, cu, None, None, budget, None, 1, True, count, False, 0, shape[1])
        assert_equal("rows", rows[begin : begin + count], want[0])
        assert_equal("cu_seqlens", found, want[1])
        begin += count
    assert begin == len(rows)


@pytest.mark.parametrize("budgets", [(0,), (5,), (2, 3), (-1,)], ids=str)
def test_longest_lived_refuses(budgets: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"budgets must be in \[1, 4\] and not rise"):
        native.longest_lived(torch.randn(2, 4, 8), torch.rand(8, 8), 0.6, 0.3, 4, 12, budgets)


# --- blocks with Evo-ViT's scores, and weights in one piece -----------------------------------------------------------


def make_blocks(count: int, width: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Twelve tensors a block."""
    weights = []
    for _ in range(count):
        for rows, columns in ((3 * width, width), (width, width), (hidden, width), (width, hidden)):
            if columns == width and rows != width:  # behind a norm
                weights += [torch.rand(width) + 0.5, torch.randn(width) * 0.1]
            weights += [torch.randn(rows, columns) * 0.1, torch.randn(rows) * 0.1]
    return [weight.to(dtype) for weight in weights]


def in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    matrices = [weight for weight in weights if weight.dim() == 2]
    vectors = [weight.float() for weight in weights if weight.dim() == 1]
    return [native.pack_run(matrices), torch.cat(vectors)]


STREAMS = {
    "everyone": (None, (5, 7)),
    "list": ((0, 11, 3, 4), (3, 1)),
    "dead": ((0, 3, 4, -1, -1), (2, 1)),
    "nobody": ((), (0, 0)),
}


@DTYPES
@pytest.mark.parametrize("stream", STREAMS)
def test_scored_blocks(stream: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    live, lengths = STREAMS[stream]
    rows = None if live is None else torch.tensor(live, dtype=torch.int32)
    x, score, cu = torch.randn(12, 64).to(dtype), torch.rand(12), offsets(lengths)
    weights, tradeoffs = make_blocks(3, 64, 96, dtype), [1.0, -1.0, 0.3]
    by_run, by_block, as_given = x.clone(), x.clone(), score.clone()
    got = native.scored_blocks_(by_run, rows, cu, 7, weights, EPS, 2, 0.2, True, (), score, tradeoffs)
    want = score
    for index, tradeoff in enumerate(tradeoffs):
        w1, b1, qkv, qkv_bias, proj, proj_bias, w2, b2, *mlp = weights[12 * index : 12 * index + 12]
        first = w1, b1, EPS, qkv, qkv_bias, 2, 0.2, int(tradeoff >= 0), proj, proj_bias
        received = native.block_(by_block, rows, cu, 7, *first, w2, b2, EPS, *mlp, True)
        if tradeoff >= 0:
            want = native.evolve_scores(received, want, rows, tradeoff)
    assert_equal("x", by_run, by_block)
    assert_equal("score", got, want)
    assert_equal("the score that was given", score, as_given)
    # a part of them, with weights in one piece, and no scores: the same bits as blocks_
    parts, alone = x.clone(), x.clone()
    whole = in_one_piece(weights)
    for begin, end in ((0, 1), (1, 1), (1, 3)):
        native.blocks_(parts, rows, cu, 7, whole, EPS, 2, 0.2, True, (begin, end, 96))
    native.blocks_(alone, rows, cu, 7, weights, EPS, 2, 0.2, True, ())
    assert_equal("x of parts", parts, alone)
    assert_equal("x without scores", alone, by_run)


LAYOUT_BAD = {
    "short": (lambda w, n: (w, n[:2]), r"layout must be \(first, last, hidden\), got 2 numbers"),
    "range": (lambda w, n: (w, (2, 1, n[2])), "layout must begin with a range of blocks, got 2 and 1"),
    "negative": (lambda w, n: (w, (-1, 1, n[2])), "layout must begin with a range of blocks, got -1 and 1"),
    "more blocks": (lambda w, n: (w, (0, 2, n[2])), r"weights must hold \d+ and \d+ numbers for each of 2 blocks"),
    "hidden": (lambda w, n: (w, (0, 1, n[2] + 1)), "x's width and hidden must be multiples of"),
    "three": (lambda w, n: ([*w, w[0]], n), "weights must be two with a layout, got 3"),
    "dtype": (lambda w, n: ([w[0].half(), w[1]], n), "weights must be of x's dtype and of float32"),
    "vectors": (lambda w, n: ([w[0], w[1][:-1]], n), r"weights must hold \d+ and \d+ numbers for each of 1 blocks"),
    "strided": (lambda w, n: ([w[0][::2], w[1]], n), "weights must be contiguous"),
}


@pytest.mark.parametrize("case", LAYOUT_BAD)
def test_a_layout_is_checked_before_anything_is_written(case: str) -> None:
    spoil, message = LAYOUT_BAD[case]
    x, cu = torch.randn(4, 64), offsets((4,))
    weights, layout = spoil(in_one_piece(make_blocks(1, 64, 64, torch.float32)), (0, 1, 64))
    before = x.clone()
    with pytest.raises(RuntimeError, match=message):
        native.blocks_(x, None, cu, 4, weights, EPS, 2, 0.2, True, layout)
    assert_equal("x", x, before)


@DTYPES
def test_pack_run(dtype: torch.dtype) -> None:
    columns = native.panel_columns()
    # large enough for large pages, and views
    weights = [torch.randn(columns * n, k).to(dtype) for n, k in ((1, 3), (40, 1024), (0, 7), (2, 64))]
    weights.append(weights[1][:columns, ::2])
    packed = native.pack_run(weights)
    assert_equal("panels", packed, torch.cat([native.pack_panels(weight).flatten() for weight in weights]))
    for bad, message in (
        ([weights[0][:-1]], f"a multiple of {columns} rows"),
        ([weights[0], weights[1].double()], "float32, bfloat16 or float16"),
        ([weights[0][0]], r"\(N, K\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.pack_run(bad)
