"""Residual addition through a row list and the layer norm that follows it, functional and in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._register import NATIVE_NAMESPACE, register_op
from ..reference import scatter_residual_layer_norm as reference
from .gather_layer_norm import GATHER_LAYER_NORM_BACKWARD, _check_affine
from .gather_layer_norm import _fake as _fake_normed
from .scatter_residual import SCATTER_RESIDUAL_BACKWARD, _check_residual, _check_target, _refuses, _value_checks


def scatter_residual_layer_norm(
    x: Tensor,
    rows: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add packed tokens to their rows of the residual stream, and normalise and pack those rows.

    What ends one half of a block and begins the next while the list stays: a row is read and written once, not twice.

    Args:
        x: residual stream, (R, D), float32, bfloat16, float16 or float64; a last stride of 1 is fastest.
        rows: rows to add to and to normalise, (T,), int32, each in [0, R), every row at most once; -1 marks a dead
            entry, which adds nothing and whose output is 0. None: all R rows.
        y: packed tokens, (T, D), dtype of ``x``.
        weight, bias: affine parameters of the layer norm, (D,), dtype of ``x`` or float32.
        eps: added to the variance, in (0, 1].
        scale: LayerScale (D,), or a factor per token (T, 1), of ``y``; dtype of ``x`` or float32.

    Returns:
        The new ``x`` (R, D), and its normalised rows (T, D); dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also rows outside [-1, R).

    The sum is rounded before it is normalised: with a list, values and gradients are those of ``scatter_residual``
    followed by ``gather_layer_norm``, bit for bit. Statistics are kept in float32 (float64 for float64). Gradients flow
    to x, y, weight, bias and scale. Deterministic. No device synchronisation. R, T or D may be 0.

    Equivalent PyTorch: ``x = x.index_add(0, rows, scale * y); x, F.layer_norm(x[rows], (D,), weight, bias, eps)``.
    """
    _check(x, rows, y, weight, bias, eps, scale)
    new, normed, _, _ = SCATTER_RESIDUAL_LAYER_NORM(x, rows, y, weight, bias, eps, scale)
    return new, normed


def scatter_residual_layer_norm_(
    x: Tensor,
    rows: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> Tensor:
    """``scatter_residual_layer_norm`` that writes the sum into ``x``, for inference; returns the normalised rows.

    Arguments and errors as there, but ``x`` has a last stride of 1 and rows that do not overlap, and RuntimeError where
    a gradient would be needed: the functional form has it.

    Equivalent PyTorch: ``x.index_add_(0, rows, scale * y); F.layer_norm(x[rows], (D,), weight, bias, eps)``.
    """
    _check(x, rows, y, weight, bias, eps, scale)
    _check_target(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, weight, bias, scale)):
        raise RuntimeError(
            "scatter_residual_layer_norm_ has no gradient, got tensors that require one:"
            " use scatter_residual_layer_norm"
        )
    return SCATTER_RESIDUAL_LAYER_NORM_INPLACE(x, rows, y, weight, bias, eps, scale)


def _check(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> None:
    _check_residual(x, rows, y, scale)
    _check_affine(x, weight, bias, eps)


def _fake(x: Tensor, rows: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_fake_normed(x, rows)


# on the CPU two kernels: what one left in the cache the other reads from there


def _native(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native, new = getattr(torch.ops, NATIVE_NAMESPACE), x.clone(memory_format=torch.contiguous_format)
    native.scatter_residual_.default(new, rows, y, scale)
    return new, *native.gather_layer_norm.default(new, rows, weight, bias, eps)


def _native_inplace(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> Tensor:
    native = getattr(torch.ops, NATIVE_NAMESPACE)
    native.scatter_residual_.default(x, rows, y, scale)
    return native.gather_layer_norm.default(x, rows, weight, bias, eps)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, rows, y, weight, _, _, scale = inputs
    new, _, mean, rstd = output
    # y is only needed for the gradient of a scale
    y = y if scale is not None else y.new_empty(0, y.shape[1])
    ctx.save_for_backward(new, rows, y, weight, mean, rstd, scale)


def _backward(ctx: Any, grad_new: Tensor, grad_normed: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    new, rows, y, weight, mean, rstd, scale = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = GATHER_LAYER_NORM_BACKWARD(grad_normed, new, rows, weight, mean, rstd)
    grad_x = grad_new + grad_x
    grad_y, grad_scale = SCATTER_RESIDUAL_BACKWARD(grad_x, rows, y, scale)
    # none for rows and eps
    return grad_x, None, grad_y, grad_weight, grad_bias, None, None if scale is None else grad_scale


SCATTER_RESIDUAL_LAYER_NORM = register_op(
    "scatter_residual_layer_norm",
    "(Tensor x, Tensor? rows, Tensor y, Tensor weight, Tensor bias, float eps, Tensor? scale)"
    " -> (Tensor new, Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.scatter_residual_layer_norm,
    fake=_fake,
    value_checks=_value_checks,
    native=_native,
    refuses=lambda x, *_: "the native kernels take no float64" if x.dtype == torch.float64 else None,
    triton="scatter_residual_layer_norm",
    setup_context=_setup_context,
    backward=_backward,
)
SCATTER_RESIDUAL_LAYER_NORM_INPLACE = register_op(
    "scatter_residual_layer_norm_",
    "(Tensor(a!) x, Tensor? rows, Tensor y, Tensor weight, Tensor bias, float eps, Tensor? scale) -> Tensor",
    reference=reference.scatter_residual_layer_norm_,
    fake=lambda x, rows, *_: _fake_normed(x, rows)[0],
    value_checks=_value_checks,
    native=_native_inplace,
    refuses=_refuses,
    triton="scatter_residual_layer_norm",
    triton_refuses=_refuses,
)
