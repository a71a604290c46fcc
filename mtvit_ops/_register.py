"""The one place where an op gets its schema, its kernels, its fake and its gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from . import _backend, _extension

NAMESPACE = "mtvit_ops"
NATIVE_NAMESPACE = "mtvit_ops_cpp"
VALUE_ERROR = "mtvit_ops value error: "  # how csrc/checks.h marks a bad value

# holds the registrations for as long as the process lives
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Kernel = Callable[..., Any]


def register_op(
    name: str,
    schema: str,
    *,
    reference: Kernel,
    fake: Kernel,
    value_checks: Kernel | None = None,
    native: Kernel | bool = False,
    refuses: Callable[..., str | None] | None = None,
    setup_context: Kernel | None = None,
    backward: Kernel | None = None,
) -> torch._ops.OpOverload:
    """Define ``mtvit_ops::name`` and attach everything it owes.

    Args:
        name: the op's stem.
        schema: arguments and results, as PyTorch writes them, without the name.
        reference: its meaning in plain PyTorch; serves wherever no kernel does.
        fake: shapes and dtypes of the results.
        value_checks: raises ValueError for bad values; called for CPU tensors before the reference (kernels check on
            their own).
        native: True where ``mtvit_ops_cpp::name`` exists with the same arguments, or a function that uses it.
        refuses: a reason why the native kernel cannot take these arguments, or None.
        setup_context, backward: as ``torch.library.register_autograd`` takes them; None: not differentiable.
    """
    reference, fake = _with_plain_strides(reference), _with_plain_strides(fake)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    cpp = None
    if native and _extension.has_extension():
        cpp = native if callable(native) else getattr(getattr(torch.ops, NATIVE_NAMESPACE), name).default
    _LIBRARY.impl(name, _cpu_kernel(name, reference, value_checks, cpp, refuses), "CPU")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _cpu_kernel(
    name: str,
    reference: Kernel,
    value_checks: Kernel | None,
    cpp: Kernel | None,
    refuses: Callable[..., str | None] | None,
) -> Kernel:
    def run(*args: Any) -> Any:
        preferred = _backend.preferred_backend()
        if cpp is not None and (preferred is None or preferred == "cpp"):
            why = None if refuses is None else refuses(*args)
            if why is None:
                try:
                    return cpp(*args)
                except RuntimeError as error:
                    raise _in_words(name, error) from None
        elif cpp is None:
            why = f"{preferred or 'cpp'} has no kernel for it"
        else:
            why = f"{preferred} does not serve CPU tensors"
        if preferred != "reference":
            level = logging.INFO if preferred is None else logging.WARNING
            _backend.say_once(level, f"{name}: the reference serves on the CPU, since {why}")
        if value_checks is not None:
            value_checks(*args)
        return reference(*args)

    return run


def _with_plain_strides(function: Kernel) -> Kernel:
    """The function with contiguous results, so that no result's strides depend on who computed it."""

    def plain(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return result.contiguous()
        return result if result is None else type(result)(plain(entry) for entry in result)

    def run(*args: Any) -> Any:
        return plain(function(*args))

    return run


def _in_words(name: str, error: RuntimeError) -> Exception:
    """The ValueError that the native side cannot raise itself, or the error as it is."""
    text = str(error)
    start = text.find(VALUE_ERROR)
    return error if start < 0 else ValueError(f"{name}: {text[start + len(VALUE_ERROR) :].splitlines()[0]}")
