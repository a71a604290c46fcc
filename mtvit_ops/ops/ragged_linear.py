"""Linear layers whose row count is read on the device, with a GELU or a residual addition taken along."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_cu_seqlens,
    check_float,
    check_last_stride,
    check_offset_values,
    check_row_values,
    check_rows,
    check_tensor,
)
from .._register import NATIVE_NAMESPACE, register_op
from ..reference import ragged_linear as reference
from .scatter_residual import SCATTER_RESIDUAL_BACKWARD


def ragged_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """Apply a linear layer to the live tokens, whose count only the device knows, and an exact GELU on request.

    Args:
        a: packed tokens in a buffer of any capacity, (T, K), float32, bfloat16, float16 or float64, of any strides;
            rows past the live count may hold anything, NaN too.
        weight: (N, K), dtype of ``a``: an ``nn.Linear``'s own.
        bias: (N,), dtype of ``a``; None: none.
        cu_seqlens: offsets of the images in ``a``, (B + 1,), int32; the last entry is the live count, at most T.
        activation: ``"gelu"`` (by erf, not by tanh), or None.

    Returns:
        (T, N), dtype of ``a``; rows past the live count are 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, an unknown activation; on the CPU also bad
            offsets.

    Summed in float32 (float64 for float64) with bias and activation, rounded once; on a GPU float32 factors are
    multiplied as ``torch.backends.cuda.matmul.fp32_precision`` says. Under autocast a, weight and bias are cast as
    by ``F.linear``. Gradients flow to a, weight and bias; the one of the GELU multiplies anew rather than keep (T, N).
    Deterministic. No device synchronisation. T, K or N may be 0.

    Equivalent PyTorch, for the live rows: ``F.gelu(F.linear(a, weight, bias))``.
    """
    a, weight, bias = _cast(a, weight, bias)
    check_choice("activation", activation, (None, "gelu"))
    _check(a, weight, bias, cu_seqlens)
    return RAGGED_LINEAR(a, weight, bias, cu_seqlens, activation == "gelu")


def ragged_linear_residual(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer to the live tokens and add what comes out to their rows of the residual stream.

    Args:
        x: residual stream, (R, N), dtype of ``a`` or float32; a last stride of 1 is fastest.
        rows: rows to add to, (T,), int32, each in [0, R), every row at most once; -1 marks a dead entry, which adds
            nothing, as do all entries past the live count. None: the first T rows, T at most R.
        a, weight, bias, cu_seqlens: as in ``ragged_linear``.
        scale: LayerScale (N,), or a factor per token (T, 1), such as an image's DropPath factor; dtype of ``x`` or
            float32.

    Returns:
        (R, N), dtype of ``x``: a new ``x`` with ``x[rows] += scale * (a @ weight.T + bias)`` over the live entries.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also bad offsets or rows.

    Summed, scaled and added in float32 (float64 for float64), rounded once. Autocast as in ``ragged_linear``; x and
    scale stay as they are. Gradients flow to x, a, weight, bias and scale. Deterministic. No device synchronisation. R,
    T, K or N may be 0.

    Equivalent PyTorch, with n live entries: ``x.index_add(0, rows[:n], scale * F.linear(a[:n], weight, bias))``.
    """
    a, weight, bias = _cast(a, weight, bias)
    _check_residual(x, rows, a, weight, bias, cu_seqlens, scale)
    return RAGGED_LINEAR_RESIDUAL(x, rows, a, weight, bias, cu_seqlens, scale)


def ragged_linear_residual_(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """``ragged_linear_residual`` written into ``x``, for inference; returns ``x``.

    Arguments and errors as there, but ``x`` has a last stride of 1 and rows that do not overlap, and RuntimeError where
    a gradient would be needed: the functional form has it.

    Equivalent PyTorch, with n live entries: ``x.index_add_(0, rows[:n], scale * F.linear(a[:n], weight, bias))``.
    """
    a, weight, bias = _cast(a, weight, bias)
    _check_residual(x, rows, a, weight, bias, cu_seqlens, scale)
    check_last_stride("x", x)
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"x must have rows that do not overlap, got strides {tuple(x.stride())}")
    given = (x, a, weight, bias, scale)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in given):
        raise RuntimeError(
            "ragged_linear_residual_ has no gradient, got tensors that require one: use ragged_linear_residual"
        )
    RAGGED_LINEAR_RESIDUAL_INPLACE(x, rows, a, weight, bias, cu_seqlens, scale)
    return x


def _cast(a: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """The factors as autocast wants them; anything that is no tensor is left to the checks."""
    if not isinstance(a, Tensor):
        return a, weight, bias
    kind = a.device.type
    # not torch.amp.is_autocast_available, which PyTorch 2.11 cannot compile
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return a, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    a, weight, bias = (
        value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        else value
        for value in (a, weight, bias)
    )
    return a, weight, bias


def _check(a: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> None:
    check_float("a", a, ("T", "K"))
    check_float("weight", weight, ("N", a.shape[1]), a)
    if bias is not None:
        check_float("bias", bias, (weight.shape[0],), a)
    check_cu_seqlens("cu_seqlens", cu_seqlens, a)


def _check_residual(
    x: Tensor,
    rows: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: Tensor | None,
) -> None:
    _check(a, weight, bias, cu_seqlens)
    tokens, width = a.shape[0], weight.shape[0]
    check_tensor("x", x, ("R", width), a.dtype if a.dtype == torch.float64 else (a.dtype, torch.float32), a)
    if rows is not None:
        check_rows("rows", rows, a, tokens)
    elif tokens > x.shape[0]:
        raise ValueError(f"a must have at most x's {x.shape[0]} rows where rows is None, got {tokens}")
    if scale is not None:
        shape = (width,) if isinstance(scale, Tensor) and scale.dim() == 1 else (tokens, 1)
        check_tensor("scale", scale, shape, (x.dtype, torch.float32), a)


def _residual_value_checks(x: Tensor, rows: Tensor | None, a: Tensor, *rest: Any) -> None:
    check_offset_values("cu_seqlens", rest[2], a.shape[0])
    if rows is not None:
        check_row_values("rows", rows, x.shape[0])


def _refuses(a: Tensor, *_: Any) -> str | None:
    if a.dtype == torch.float64:
        return "the Triton kernels take no float64"
    return "the Triton kernels take no K of 0" if a.shape[1] == 0 else None


def _refuses_residual(x: Tensor, rows: Tensor | None, a: Tensor, *_: Any) -> str | None:
    return _refuses(a)


def _native_refuses(a: Tensor, *_: Any) -> str | None:
    return "the native kernels take no float64" if a.dtype == torch.float64 else None


def _native_refuses_residual(x: Tensor, rows: Tensor | None, a: Tensor, *_: Any) -> str | None:
    return _native_refuses(a)


def _native_residual(x: Tensor, *rest: Any) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    getattr(torch.ops, NATIVE_NAMESPACE).ragged_linear_residual_.default(out, *rest)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, weight, bias, cu_seqlens = ctx.saved_tensors
    grad_a, grad_weight, grad_bias = RAGGED_LINEAR_BACKWARD(grad, a, weight, bias, cu_seqlens, ctx.gelu)
    # none for the offsets and the switch
    return grad_a, grad_weight, None if bias is None else grad_bias, None, None


def _residual_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, a, weight, bias, cu_seqlens, scale = ctx.saved_tensors
    y = grad.new_empty(0, grad.shape[1])  # what was added is only needed for the gradient of a scale
    if scale is not None:
        y = RAGGED_LINEAR(a, weight, bias, cu_seqlens, False).to(grad.dtype)
    rows = reference.live_rows(rows, cu_seqlens, a.shape[0])
    grad_y, grad_scale = SCATTER_RESIDUAL_BACKWARD(grad, rows, y, scale)
    grad_a, grad_weight, grad_bias = RAGGED_LINEAR_BACKWARD(grad_y.to(a.dtype), a, weight, bias, cu_seqlens, False)
    # none for rows and offsets
    return (
        grad,
        None,
        grad_a,
        grad_weight,
        None if bias is None else grad_bias,
        None,
        None if scale is None else grad_scale,
    )


_LAYER = "Tensor a, Tensor weight, Tensor? bias, Tensor cu_seqlens"
RAGGED_LINEAR_BACKWARD = register_op(
    "ragged_linear_backward",
    f"(Tensor grad, {_LAYER}, bool gelu) -> (Tensor, Tensor, Tensor)",
    reference=reference.ragged_linear_backward,
    fake=lambda grad, a, weight, bias, *_: (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        a.new_empty(0 if bias is None else bias.shape[0]),
    ),
    triton="ragged_linear",
    triton_refuses=lambda grad, a, *_: _refuses(a),
)
RAGGED_LINEAR = register_op(
    "ragged_linear",
    f"({_LAYER}, bool gelu) -> Tensor",
    reference=reference.ragged_linear,
    fake=lambda a, weight, *_: a.new_empty(a.shape[0], weight.shape[0]),
    value_checks=lambda a, weight, bias, cu_seqlens, _: check_offset_values("cu_seqlens", cu_seqlens, a.shape[0]),
    native=True,
    refuses=_native_refuses,
    triton="ragged_linear",
    triton_refuses=_refuses,
    setup_context=_setup_context,
    backward=_backward,
)
RAGGED_LINEAR_RESIDUAL = register_op(
    "ragged_linear_residual",
    f"(Tensor x, Tensor? rows, {_LAYER}, Tensor? scale) -> Tensor",
    reference=reference.ragged_linear_residual,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    value_checks=_residual_value_checks,
    native=_native_residual,
    refuses=_native_refuses_residual,
    triton="ragged_linear",
    triton_refuses=_refuses_residual,
    setup_context=_residual_context,
    backward=_residual_backward,
)
RAGGED_LINEAR_RESIDUAL_INPLACE = register_op(
    "ragged_linear_residual_",
    f"(Tensor(a!) x, Tensor? rows, {_LAYER}, Tensor? scale) -> ()",
    reference=reference.ragged_linear_residual_,
    fake=lambda *_: None,
    value_checks=_residual_value_checks,
    native=True,
    refuses=_native_refuses_residual,
    triton="ragged_linear",
    triton_refuses=_refuses_residual,
)
