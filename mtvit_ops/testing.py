"""Inputs, errors and earned tolerances, shared by the tests and the benchmarks; needs no test framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# "no worse than plain PyTorch": the factor leaves room for a max over few elements, as in FlashAttention's own tests
PLAIN_FACTOR = 2.0
# what no reordering can avoid, in units of the dtype's eps at the values' size: one rounding for the half dtypes, whose
# sums are kept in float32; sums of a few hundred terms for float32; and for float64 those of the truth as well
ULPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 8, torch.float64: 64}

Outputs = tuple[Tensor, ...]


# inputs


def random_lengths(batch: int, longest: int, shortest: int = 0, generator: torch.Generator | None = None) -> list[int]:
    """Lengths of ``batch`` images, each in [shortest, longest]; the first image is the longest."""
    if batch == 0:
        return []
    rest = torch.randint(shortest, longest + 1, (batch - 1,), generator=generator).tolist()
    return [longest, *rest]


def offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """``cu_seqlens`` (B + 1,) of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def spans(lengths: Sequence[int]) -> list[slice]:
    """Where each image lies among the packed tokens."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def random_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal, drawn on the CPU so that every device sees the same numbers."""
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def packed_qkv(
    tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (T, H, d) as what a ``qkv`` linear gives: strided views of one (T, 3, H, d)."""
    q, k, v = random_tensor(tokens, 3, heads, dim, dtype=dtype, device=device).unbind(1)
    return q, k, v


def random_rows(num_rows: int, live: int, dead: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """``live`` different rows of ``num_rows`` in ascending order, then ``dead`` fillers of -1; int32."""
    chosen = torch.randperm(num_rows)[:live].sort().values
    return torch.cat((chosen, torch.full((dead,), -1))).to(device=device, dtype=torch.int32)


def poison_behind(tensor: Tensor, live: int) -> Tensor:
    """NaN in every entry behind the live ones, in place: what a buffer of static capacity may hold."""
    tensor[live:] = math.nan
    return tensor


# errors


def max_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0."""
    return _difference(got, want).abs().max().item() if want.numel() else 0.0


def rms_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference."""
    return _difference(got, want).square().mean().sqrt().item() if want.numel() else 0.0


def _difference(got: Tensor, want: Tensor) -> Tensor:
    got, want = got.detach().double(), want.detach().double()
    return torch.where(got == want, 0.0, got - want)


def assert_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Same dtype, shape and bits."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"{name}: expected {want.dtype} {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}")
    if not torch.equal(_bits(got), _bits(want)):
        raise AssertionError(f"{name}: expected {want}, got {got}")


def assert_close_to_float64(name: str, got: Tensor, reference64: Tensor, plain: Tensor) -> None:
    """No further from the float64 result than plain PyTorch in the tested dtype, twice, and a few ulp.

    Args:
        got: the result under test.
        reference64: the float64 result for the same (already rounded) inputs.
        plain: what plain PyTorch gives in the tested dtype; its error is the allowance.
    """
    if got.shape != reference64.shape or plain.shape != reference64.shape:
        shapes = f"got {tuple(got.shape)}, plain {tuple(plain.shape)}"
        raise AssertionError(f"{name}: expected shape {tuple(reference64.shape)}, {shapes}")
    if reference64.numel() == 0:
        return
    finite = reference64[reference64.isfinite()].double()
    unit = ULPS[got.dtype] * torch.finfo(got.dtype).eps
    # below the smallest normal number of the dtype an ulp no longer shrinks with the value
    floor = torch.finfo(got.dtype).smallest_normal
    for kind, error, size in (
        ("max", max_error, finite.abs().max().item() if finite.numel() else 0.0),
        ("RMS", rms_error, finite.square().mean().sqrt().item() if finite.numel() else 0.0),
    ):
        found, lost = error(got, reference64), error(plain, reference64)
        allowed = PLAIN_FACTOR * lost + unit * max(size, floor)
        if not found <= allowed:  # also refuses NaN
            raise AssertionError(
                f"{name}: {kind} error {found:.3e} against float64, allowed {allowed:.3e}; plain PyTorch in"
                f" {got.dtype} has {lost:.3e}, the values' {kind} is {size:.3e}"
            )


def _bits(tensor: Tensor) -> Tensor:
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(widths[tensor.element_size()])


# an op against its formula


def value_and_gradients(
    function: Callable[..., Any], inputs: Mapping[str, Tensor | None], seed: int = 0
) -> tuple[Outputs, dict[str, Tensor]]:
    """``function(**inputs)`` as a tuple, and the gradient of each floating-point input (zeros where unused).

    The gradients coming in depend on ``seed`` and the results' shapes only. Strides and storage of the inputs are kept.
    """
    leaves = {name: None if value is None else value.detach() for name, value in inputs.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.is_floating_point()}
    for leaf in wanted.values():
        leaf.requires_grad_()
    result = function(**leaves)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    generator = torch.Generator().manual_seed(seed)
    # in so few bits that every dtype holds the same numbers
    cotangents = [torch.randn(out.shape, generator=generator).bfloat16() for out in outputs]
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, cotangents, strict=True) if out.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        roots, incoming = zip(*pairs, strict=True)
        grads = torch.autograd.grad(roots, list(wanted.values()), incoming, allow_unused=True)
    return tuple(out.detach() for out in outputs), {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), grads, strict=True)
    }


def assert_matches_formula(
    op: Callable[..., Any], formula: Callable[..., Any], inputs: Mapping[str, Tensor | None]
) -> None:
    """Values and gradients of ``op(**inputs)`` against a formula in float64, with the tolerance the formula earns.

    The formula runs twice: on the inputs in float64 (the truth) and as they are (plain PyTorch). Integer results must
    be equal. The op must give the same bits twice, and leave its inputs as they were.
    """
    before = {name: None if value is None else value.clone() for name, value in inputs.items()}
    doubled = {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    truth, truth_grads = value_and_gradients(formula, doubled)
    plain, plain_grads = value_and_gradients(formula, inputs)
    got, got_grads = value_and_gradients(op, inputs)
    again, again_grads = value_and_gradients(op, inputs)

    if len(got) != len(truth):
        raise AssertionError(f"expected {len(truth)} results, got {len(got)}")
    for place, (value, second, want, loose) in enumerate(zip(got, again, truth, plain, strict=True)):
        name = f"result {place}"
        assert_equal(f"{name}, run again", second, value)
        if want.is_floating_point():
            assert_close_to_float64(name, value, want, loose)
        else:
            assert_equal(name, value, want)
    for name, grad in got_grads.items():
        if grad.dtype != inputs[name].dtype:  # type: ignore[union-attr]
            raise AssertionError(f"gradient of {name}: expected its dtype, got {grad.dtype}")
        assert_equal(f"gradient of {name}, run again", again_grads[name], grad)
        assert_close_to_float64(f"gradient of {name}", grad, truth_grads[name], plain_grads[name])
    for name, given in inputs.items():
        if given is not None:
            assert_equal(f"{name} after the call", given, before[name])  # type: ignore[arg-type]


# token selection, once more, on lists


def select_model(
    lengths: Sequence[int],
    scores: Sequence[float] | None,
    rows: Sequence[int] | None,
    *,
    keep: int | Sequence[int] | None = None,
    threshold: float | None = None,
    mask: Sequence[bool] | None = None,
    num_prefix_tokens: int = 0,
    by_score: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """What ``token_select`` keeps and drops in each image, by sorting Python lists."""
    kept: list[list[int]] = []
    dropped: list[list[int]] = []
    for image, span in enumerate(spans(lengths)):
        head = list(range(span.start, span.stop))[:num_prefix_tokens]
        tail = list(range(span.start, span.stop))[num_prefix_tokens:]
        ranked = tail
        if scores is not None:  # sorted() is stable: equal scores stay in the order they stand in
            ranked = sorted(tail, key=lambda entry: (math.isnan(scores[entry]), -scores[entry]))
        if mask is not None:
            chosen = [entry for entry in ranked if mask[entry]]
        elif threshold is not None:
            chosen = [entry for entry in ranked if scores[entry] > threshold]  # type: ignore[index]
        else:
            count = keep if isinstance(keep, int) else keep[image]  # type: ignore[index]
            chosen = ranked[: max(0, count - len(head))]
        kept_ones = set(chosen)
        rest = [entry for entry in ranked if entry not in kept_ones]
        for lists, entries in ((kept, head + chosen), (dropped, rest)):
            entries = entries if by_score else sorted(entries)
            lists.append([entry if rows is None else rows[entry] for entry in entries])
    return kept, dropped
