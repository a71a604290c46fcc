"""The one place where an op gets its schema, its kernels, its fake and its gradient."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import _backend, _extension

NAMESPACE = "mtvit_ops"
NATIVE_NAMESPACE = "mtvit_ops_cpp"
CUDA_NAMESPACE = "mtvit_ops_cuda"
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    triton: str | None = None,
    triton_refuses: Callable[..., str | None] | None = None,
    cuda: Kernel | bool = False,
    cuda_refuses: Callable[..., str | None] | None = None,
    setup_context: Kernel | None = None,
    backward: Kernel | None = None,
) -> torch._ops.OpOverload:
    """Define ``mtvit_ops::name`` and attach everything it owes.

    Args:
        name: the op's stem.
        schema: arguments and results, as PyTorch writes them, without the name.
        reference: its meaning in plain PyTorch; serves wherever no kernel does.
        fake: shapes and dtypes of the results.
        value_checks: raises ValueError for bad values; called for CPU tensors before the reference and Triton (native
            kernels check on their own).
        native: True where ``mtvit_ops_cpp::name`` exists with the same arguments, or a function that uses it.
        refuses: a reason why the native kernel cannot take these arguments, or None.
        triton: the file in ``kernels/`` whose function ``name`` takes the same arguments.
        triton_refuses: as ``refuses``; default: no float64.
        cuda, cuda_refuses: as ``native`` and ``refuses``, for ``mtvit_ops_cuda::name``.
        setup_context, backward: as ``torch.library.register_autograd`` takes them; None: not differentiable.
    """
    reference, fake = _without_autocast(_with_plain_strides(reference)), _with_plain_strides(fake)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    on_cpu: dict[str, Server] = {}
    on_cuda: dict[str, Server] = {}
    if native and _extension.has_extension():
        on_cpu["cpp"] = Server(_native(name, native) if callable(native) else native_operator(name), refuses)
    if triton is not None and _backend.available_backends()["triton"].available:
        server = Server(
            _without_autocast(_triton(triton, name)), triton_refuses or _takes_no_float64, checks_values=False
        )
        on_cuda["triton"] = server
        if _backend.triton_is_interpreted():
            on_cpu["triton"] = server
    if cuda and _backend.available_backends()["cuda"].available:
        on_cuda["cuda"] = Server(cuda if callable(cuda) else native_operator(name, CUDA_NAMESPACE), cuda_refuses)
    _LIBRARY.impl(name, _dispatch(name, "CPU", on_cpu, reference, value_checks), "CPU")
    if on_cuda:  # what values hold is not looked at: it would wait for the device
        _LIBRARY.impl(name, _dispatch(name, "CUDA", on_cuda, reference, None), "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(
            qualified, _as_the_forward(backward), setup_context=_noting_backend(setup_context), lib=_LIBRARY
        )
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class Server(NamedTuple):
    """One backend's kernel for one op."""

    kernel: Kernel
    refuses: Callable[..., str | None] | None = None
    checks_values: bool = True  # on its own


# the fastest first; Triton before CUDA C++ until a GPU has said otherwise
DEFAULTS = {"CPU": ("cpp",), "CUDA": ("triton", "cuda")}


def _dispatch(
    name: str, device: str, servers: dict[str, Server], reference: Kernel, value_checks: Kernel | None
) -> Kernel:
    """The kernel that PyTorch's dispatcher finds for a device: asks who serves, at each call."""

    def run(*args: Any) -> Any:
        preferred = _backend.preferred_backend()
        reasons = []
        for asked in DEFAULTS[device] if preferred is None else (preferred,):
            server = servers.get(asked)
            if server is None:
                known = asked in DEFAULTS[device]
                reasons.append(f"{asked} has no kernel for it" if known else f"{asked} does not serve {device} tensors")
                continue
            why = None if server.refuses is None else server.refuses(*args)
            if why is None:
                if value_checks is not None and not server.checks_values:
                    value_checks(*args)
                return server.kernel(*args)
            reasons.append(why)
        if preferred != "reference":
            level = logging.INFO if preferred is None else logging.WARNING
            _backend.say_once(level, f"{name}: the reference serves on {device} tensors, since {' and '.join(reasons)}")
        if value_checks is not None:
            value_checks(*args)
        return reference(*args)

    return run


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks into every operator."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def native_serves(x: torch.Tensor) -> bool:
    """Whether a native operator alone may take ``x``, without gradient or fake: inference on the CPU, where nobody
    watches operators or asks for another backend.
    """
    if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.dtype not in NATIVE_DTYPES or torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return False
    if is_transformed():
        return False
    return _extension.has_extension() and _backend.preferred_backend() in (None, "cpp")


def in_inference(op: torch._ops.OpOverload) -> Kernel:
    """The op, called as what serves on the CPU in inference: half of a small op's time is its way there."""
    name = op._schema.name.removeprefix(f"{NAMESPACE}::")

    def run(x: torch.Tensor, *rest: Any) -> Any:
        return native_kernel(name)(x, *rest) if native_serves(x) else op(x, *rest)

    return run


@cache
def native_kernel(name: str) -> Kernel:
    """``native_operator``, made once."""
    return native_operator(name)


def native_operator(name: str, namespace: str = NATIVE_NAMESPACE) -> Kernel:
    """``mtvit_ops_cpp::name``, whose bad values raise ValueError; the extension must be there."""
    try:
        kernel = getattr(getattr(torch.ops, namespace), name).default
    except AttributeError:
        raise ImportError(f"the built extension has no {name}: it is older than this code, build it anew") from None
    return _native(name, kernel)


def _native(name: str, kernel: Kernel) -> Kernel:
    """A C++ operator whose bad values raise ValueError."""

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except RuntimeError as error:
            raise _in_words(name, error) from None

    return run


def _triton(stem: str, name: str) -> Kernel:
    """The launcher ``mtvit_ops.kernels.<stem>.<name>``, imported (and Triton with it) at the first call."""

    def run(*args: Any) -> Any:
        return _launcher(stem, name)(*args)

    return run


@cache
def _launcher(stem: str, name: str) -> Kernel:
    return getattr(importlib.import_module(f".kernels.{stem}", __package__), name)


def _takes_no_float64(*args: Any) -> str | None:
    wide = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args)
    return "the Triton kernels take no float64" if wide else None


def _with_plain_strides(function: Kernel) -> Kernel:
    """The function with contiguous results, so that no result's strides depend on who computed it."""

    def plain(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return result.contiguous()
        return result if result is None else type(result)(plain(entry) for entry in result)

    def run(*args: Any) -> Any:
        return plain(function(*args))

    return run


def _without_autocast(function: Kernel) -> Kernel:
    """The function with the dtypes it asks for: autocast is the door's business, and would round what is kept wide."""

    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return run


def _noting_backend(setup_context: Kernel) -> Kernel:
    """The function, which also notes the backend asked for: see ``_as_the_forward``."""

    def run(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend_asked_for = _backend.override()
        setup_context(ctx, inputs, output)

    return run


def _as_the_forward(backward: Kernel) -> Kernel:
    """The gradient by the backend that its forward was under: on a GPU it runs in a thread that no block reaches."""

    def run(ctx: Any, *grads: Any) -> Any:
        with _backend.overridden(ctx.backend_asked_for):
            return backward(ctx, *grads)

    return run


def _in_words(name: str, error: RuntimeError) -> Exception:
    """The ValueError that the native side cannot raise itself, or the error as it is."""
    text = str(error)
    start = text.find(VALUE_ERROR)
    return error if start < 0 else ValueError(f"{name}: {text[start + len(VALUE_ERROR) :].splitlines()[0]}")
