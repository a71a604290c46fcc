"""RaggedTokens: conversions, selections, validation, and the places PyTorch carries it through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtvit_ops import RaggedTokens
from mtvit_ops.ops import TokenSelection, token_select
from mtvit_ops.testing import assert_equal

DIM = 3


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def numbered(rows: int, device: str = "cpu") -> Tensor:
    """Rows that show their number: 0 0 0, 1 1 1, ..."""
    return torch.arange(rows, dtype=torch.float32, device=device)[:, None].expand(rows, DIM).contiguous()


def hand_made(device: str = "cpu") -> RaggedTokens:
    """Two images of a prefix token and 2 x 2 patches; the first lost patches 0 and 2, the second patch 3."""
    rows = ints(0, 2, 4, 5, 6, 7, 8, -1, -1, device=device)
    return RaggedTokens(numbered(10, device), rows, ints(0, 3, 7, device=device), 4)


@st.composite
def ragged(draw: Any) -> tuple[RaggedTokens, list[list[int]]]:
    """Images of the same number of rows, any of them alive, any dead entries behind; and the live rows by image."""
    batch, length = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    kept = [sorted(draw(st.sets(st.integers(image * length, image * length + length - 1)))) for image in range(batch)]
    dead = draw(st.integers(0, 3))
    flat = [row for rows in kept for row in rows]
    offsets = [0]
    for rows in kept:
        offsets.append(offsets[-1] + len(rows))
    bound = max(map(len, kept), default=0) + draw(st.integers(0, 2))
    x = torch.randn(batch * length, 2, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return RaggedTokens(x, ints(*flat, *[-1] * dead), ints(*offsets), bound), kept


def test_from_dense(device: str, backend: str) -> None:
    x = torch.randn(2, 5, DIM, device=device)
    tokens = RaggedTokens.from_dense(x)
    assert_equal("x", tokens.x, x.reshape(10, DIM))
    assert tokens.x.data_ptr() == x.data_ptr()
    assert tokens.rows is None
    assert_equal("cu_seqlens", tokens.cu_seqlens, ints(0, 5, 10, device=device))
    assert (tokens.max_seqlen, tokens.num_prefix_tokens, tokens.num_images) == (5, 1, 2)
    assert_equal("lengths", tokens.lengths(), ints(5, 5, device=device))
    assert_equal("there and back", tokens.validate().to_dense(), x)


@pytest.mark.parametrize("shape", [(0, 5, DIM), (2, 0, DIM), (2, 5, 0), (1, 1, 1)])
def test_from_dense_of_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    tokens = RaggedTokens.from_dense(x, num_prefix_tokens=0).validate()
    assert_equal("there and back", tokens.to_dense(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_dense(dtype: torch.dtype) -> None:
    tokens = hand_made()._replace(x=numbered(10).to(dtype))
    want = torch.tensor([[0, 2, 4, -7], [5, 6, 7, 8]], dtype=dtype)[..., None].expand(2, 4, DIM)
    assert_equal("dense", tokens.to_dense(fill=-7), want.contiguous())
    assert_equal("packed", tokens.packed()[:, 0], torch.tensor([0, 2, 4, 5, 6, 7, 8, 0, 0], dtype=dtype))


def test_a_list_in_score_order_stays_in_it() -> None:
    tokens = hand_made()._replace(rows=ints(0, 4, 2, 5, 8, 6, 7))
    assert tokens.to_dense(fill=-1)[..., 0].tolist() == [[0, 4, 2, -1], [5, 8, 6, 7]]


def test_to_grid() -> None:
    grid = hand_made().to_grid((2, 2), fill=-7)
    assert grid.shape == (2, DIM, 2, 2)
    assert grid[0, 0].tolist() == [[-7, 2], [-7, 4]]
    assert grid[1, 2].tolist() == [[6, 7], [8, -7]]
    all_alive = hand_made()._replace(rows=None, cu_seqlens=ints(0, 5, 10), max_seqlen=5).to_grid((1, 4))
    assert all_alive[:, 0].tolist() == [[[1, 2, 3, 4]], [[6, 7, 8, 9]]]


def test_to_grid_of_nothing() -> None:
    assert RaggedTokens.from_dense(torch.randn(0, 5, DIM)).to_grid((2, 2)).shape == (0, DIM, 2, 2)
    dead = RaggedTokens(numbered(5), ints(-1, -1), ints(0, 0), 0)
    assert bool((dead.to_grid((2, 2), fill=3.0) == 3.0).all())


def test_a_grid_of_negative_size() -> None:
    with pytest.raises(ValueError, match=r"grid_size\[0\] must be >= 0, got -2"):
        RaggedTokens.from_dense(torch.randn(2, 5, DIM)).to_grid((-2, -2))


@pytest.mark.parametrize("size", [(2, 3), (3, 3), (4, 4), (1, 2)])
def test_a_grid_that_does_not_fit(size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"grid_size must fit 2 images of 1 prefix tokens .* got {size[0]} x {size[1]}"
    ):
        hand_made().to_grid(size)


def test_to_nested() -> None:
    nested = hand_made().trimmed().to_nested()
    assert nested.layout == torch.jagged
    assert [each[:, 0].tolist() for each in nested.unbind()] == [[0, 2, 4], [5, 6, 7, 8]]


def test_from_nested() -> None:
    parts = [torch.randn(3, DIM), torch.randn(0, DIM), torch.randn(4, DIM)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    tokens = RaggedTokens.from_nested(nested, num_prefix_tokens=0).validate()
    assert tokens.x.data_ptr() == nested.values().data_ptr()
    assert_equal("cu_seqlens", tokens.cu_seqlens, ints(0, 3, 3, 7))
    assert tokens.max_seqlen >= 4
    for have, want in zip(tokens.to_nested().unbind(), parts, strict=True):
        assert_equal("part", have, want)


@pytest.mark.parametrize(
    ("nested", "error", "match"),
    [
        (torch.randn(2, 3, 4), TypeError, "nested must be a nested tensor of layout torch.jagged, got a tensor of"),
        ([1], TypeError, "got list"),
        (torch.nested.nested_tensor([torch.randn(3)], layout=torch.jagged), ValueError, "nested must have shape"),
        (torch.nested.nested_tensor([torch.ones(2, 3).int()], layout=torch.jagged), TypeError, "got torch.int32"),
    ],
    ids=["dense", "list", "rank", "integer"],
)
def test_from_nested_refuses(nested: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RaggedTokens.from_nested(nested)


@pytest.mark.parametrize(
    ("x", "prefix", "error", "match"),
    [
        (torch.randn(5, 3), 1, ValueError, r"x must have shape \(B, N, D\), got \(5, 3\)"),
        (torch.ones(2, 5, 3, dtype=torch.int64), 1, TypeError, "x must have dtype float32 or .*, got int64"),
        ([[1.0]], 1, TypeError, "x must be a tensor, got list"),
        (torch.randn(2, 5, 3), 6, ValueError, r"num_prefix_tokens must be in \[0, 5\], got 6"),
        (torch.randn(2, 5, 3), -1, ValueError, "num_prefix_tokens"),
        (torch.randn(2, 5, 3), 1.0, TypeError, "num_prefix_tokens must be an int, got float"),
    ],
)
def test_from_dense_refuses(x: Any, prefix: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RaggedTokens.from_dense(x, prefix)


# what is wrong with the hand-made batch, by field
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-rank": ({"x": torch.randn(10)}, ValueError, r"x must have shape \(R, D\), got \(10,\)"),
    "x-dtype": ({"x": torch.ones(10, 3, dtype=torch.int32)}, TypeError, "x must have dtype"),
    "rows-dtype": ({"rows": torch.arange(7)}, TypeError, "rows must have dtype int32, got int64"),
    "rows-rank": ({"rows": ints(0, 1)[:, None]}, ValueError, r"rows must have shape \(T,\), got \(2, 1\)"),
    "rows-device": ({"rows": ints(0, 1).to("meta")}, ValueError, "rows must be on cpu"),
    "rows-beyond": ({"rows": ints(0, 2, 4, 5, 6, 7, 10)}, ValueError, r"rows must be in \[-1, 10\), got 10"),
    "rows-below": ({"rows": ints(0, 2, 4, 5, 6, 7, -2)}, ValueError, r"rows must be in \[-1, 10\), got -2"),
    "rows-dead": (
        {"rows": ints(0, 2, -1, 5, 6, 7, 8)},
        ValueError,
        "rows must name a row in each of its 7 live",
    ),
    "rows-repeat": ({"rows": ints(0, 2, 2, 5, 6, 7, 8)}, ValueError, "rows must name every row at most once"),
    "offsets-dtype": (
        {"cu_seqlens": torch.tensor([0, 3, 7])},
        TypeError,
        "cu_seqlens must have dtype int32",
    ),
    "offsets-none": ({"cu_seqlens": ints()}, ValueError, r"cu_seqlens must have B \+ 1 >= 1 entries, got 0"),
    "offsets-start": ({"cu_seqlens": ints(1, 3, 7)}, ValueError, "cu_seqlens must start at 0, got 1"),
    "offsets-fall": ({"cu_seqlens": ints(0, 4, 3)}, ValueError, "cu_seqlens must not decrease, got 4 followed by 3"),
    "offsets-beyond": (
        {"cu_seqlens": ints(0, 3, 10), "max_seqlen": 9},
        ValueError,
        "cu_seqlens must end within the 9 tokens, got 10",
    ),
    "bound": (
        {"max_seqlen": 3},
        ValueError,
        "max_seqlen of cu_seqlens must be at least .* 4, got 3",
    ),
    "bound-type": ({"max_seqlen": 4.0}, TypeError, "max_seqlen must be an int, got float"),
    "prefix": ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be >= 0, got -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_validate(case: str) -> None:
    changes, error, match = WRONG[case]
    tokens = hand_made()
    assert tokens.validate() is tokens
    with pytest.raises(error, match=match):
        tokens._replace(**changes).validate()


def test_select_shortens_the_list_only(backend: str, device: str) -> None:
    tokens = hand_made(device).trimmed()
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool, device=device)
    selected = tokens.select(token_select(None, tokens.rows, tokens.cu_seqlens, mask=mask))
    assert selected.x is tokens.x
    assert selected.rows.tolist() == [0, 4, 5, 8, -1, -1, -1]
    assert_equal("cu_seqlens", selected.cu_seqlens, ints(0, 2, 4, device=device))
    assert selected.max_seqlen == tokens.max_seqlen
    assert selected.select(TokenSelection(selected.rows, selected.cu_seqlens), max_seqlen=2).max_seqlen == 2


def test_trimmed() -> None:
    tokens = hand_made()._replace(max_seqlen=99).trimmed()
    assert tokens.rows.tolist() == [0, 2, 4, 5, 6, 7, 8]
    assert tokens.max_seqlen == 4
    # without a list, what lies behind the last image is dead too
    rest = RaggedTokens(numbered(10), None, ints(0, 3, 7), 5).trimmed()
    assert (rest.x.shape[0], rest.max_seqlen) == (7, 4)
    nothing = RaggedTokens(numbered(3), ints(-1), ints(0), 3).trimmed()
    assert (nothing.rows.shape[0], nothing.max_seqlen) == (0, 0)
    away = hand_made()._replace(x=torch.empty(10, 3, device="meta"))
    assert away.trimmed() is away


def test_is_a_pytree() -> None:
    tokens = hand_made()
    leaves, spec = torch.utils._pytree.tree_flatten(tokens)
    assert len(leaves) == 5
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, RaggedTokens)
    doubled = torch.utils._pytree.tree_map_only(Tensor, lambda value: value * 2, tokens)
    assert_equal("x", doubled.x, tokens.x * 2)


def test_gradients_reach_the_live_rows() -> None:
    weight = torch.randn(2, 4, DIM, dtype=torch.float64)
    for convert in (
        lambda tokens: (tokens.to_dense() * weight).sum(),
        lambda tokens: tokens.to_nested().values().sum(),
        lambda tokens: tokens.packed().square().sum(),
    ):
        x = torch.randn(10, DIM, dtype=torch.float64, requires_grad=True)
        convert(hand_made()._replace(x=x)).backward()
        alive = [0, 2, 4, 5, 6, 7, 8]
        assert bool((x.grad[alive] != 0).all())
        assert bool((x.grad[[1, 3, 9]] == 0).all())

    def grid(x: Tensor) -> Tensor:
        return hand_made()._replace(x=x).to_grid((2, 2))

    def dense(x: Tensor) -> Tensor:
        return hand_made()._replace(x=x).to_dense()

    x = torch.randn(10, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grid, x)
    assert torch.autograd.gradcheck(dense, x)


def test_compiles() -> None:
    def through(tokens: RaggedTokens, scores: Tensor) -> tuple[RaggedTokens, Tensor, Tensor]:
        selection = token_select(scores, tokens.rows, tokens.cu_seqlens, keep=2, num_prefix_tokens=1)
        shorter = tokens.select(selection, 2)
        return shorter, shorter.to_dense(fill=-1.0), shorter.to_grid((2, 2))

    tokens, scores = RaggedTokens.from_dense(torch.randn(2, 5, DIM)), torch.randn(10)
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    for have, want in zip(
        torch.utils._pytree.tree_leaves(compiled(tokens, scores)),
        torch.utils._pytree.tree_leaves(through(tokens, scores)),
        strict=True,
    ):
        assert torch.equal(have, want) if isinstance(want, Tensor) else have == want


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_dense_round_trip(case: tuple[RaggedTokens, list[list[int]]]) -> None:
    tokens, kept = case
    dense = tokens.validate().to_dense(fill=torch.inf)
    assert dense.shape == (len(kept), tokens.max_seqlen, 2)
    for image, rows in enumerate(kept):
        assert_equal("live", dense[image, : len(rows)], tokens.x[rows])
        assert bool(dense[image, len(rows) :].isinf().all())


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_nested_round_trip(case: tuple[RaggedTokens, list[list[int]]]) -> None:
    tokens, kept = case
    again = RaggedTokens.from_nested(tokens.trimmed().to_nested(), num_prefix_tokens=0).validate()
    assert_equal("cu_seqlens", again.cu_seqlens, tokens.cu_seqlens)
    assert_equal("x", again.x, tokens.x[[row for rows in kept for row in rows]])
    assert_equal("dense", again._replace(max_seqlen=tokens.max_seqlen).to_dense(), tokens.to_dense())


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_grid_shows_every_live_row_at_its_place(case: tuple[RaggedTokens, list[list[int]]]) -> None:
    tokens, kept = case
    length = tokens.x.shape[0] // max(len(kept), 1)
    grid = tokens._replace(num_prefix_tokens=0).to_grid((1, length), fill=torch.inf)[:, :, 0]
    for image, rows in enumerate(kept):
        for place in range(length):
            row = image * length + place
            want = tokens.x[row] if row in rows else torch.full((2,), torch.inf)
            assert_equal("place", grid[image, :, place], want)
