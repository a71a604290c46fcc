"""What Triton would compile for a GPU that this machine does not have: launches are recorded, not made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """One specialisation of a kernel, as Triton's own launch path derives it from the arguments."""

    kernel: JITFunction
    signature: dict[str, Any]  # argument: type, "constexpr" for constants and for ints that are 1
    constexprs: dict[tuple[int, ...], Any]  # by the argument's place
    attrs: dict[tuple[int, ...], Any]  # by the argument's place: pointers and ints divisible by 16
    options: dict[str, Any]  # warps, stages, and what the target adds
    target: str

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def constants(self) -> dict[str, Any]:
        """Constexprs by the argument's name; tuples of constants under the name of the tuple."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items()}

    def key(self) -> str:
        """The same for launches that need one binary."""
        return repr((self.kernel.__module__, self.name, self.signature, self.constexprs, self.attrs, self.options))


class _Driver:
    """The part of a Triton driver that a launch asks before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target  # Triton keeps one cache a device

    def get_current_stream(self, device: object) -> int:
        return 0


# what launchers ask of a device: processors, KiB of shared memory of a processor and of a block
_PROCESSORS = {"sm_80": (108, 164, 163), "sm_90": (132, 228, 227), "sm_100": (148, 228, 227), "gfx942": (304, 64, 64)}


def _properties(target: str) -> Any:
    count, shared, of_block = _PROCESSORS[target]
    major, minor = (9, 4) if target.startswith("gfx") else divmod(TARGETS[target].arch, 10)
    return SimpleNamespace(
        multi_processor_count=count,
        shared_memory_per_multiprocessor=1024 * shared,
        shared_memory_per_block_optin=1024 * of_block,
        major=major,
        minor=minor,
    )


class _Elsewhere(TorchFunctionMode):
    """Tensors lie on the CPU and say that they lie on a GPU, one index a target, since launchers cache by device."""

    def __init__(self, target: str) -> None:
        self.device = device = torch.device("cuda", list(TARGETS).index(target))

        class OnGpu(torch.Tensor):
            device = property(lambda self: device)
            is_cuda = property(lambda self: True)
            is_cpu = property(lambda self: False)

        self.kind = OnGpu

    def move(self, value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.as_subclass(self.kind), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == self.device:
            kwargs["device"] = "cpu"
        return self.move(func(*args, **kwargs))


@contextmanager
def recorder(target: str) -> Iterator[tuple[list[Launch], Callable[[Any], Any]]]:
    """While open, launches land in the list instead of on a device, and PyTorch describes the target's GPU.

    The second of the pair makes tensors on the CPU say that they lie on that GPU.
    """
    launches: list[Launch] = []

    def note(
        kernel: JITFunction,
        key: object,
        signature: dict[str, Any],
        device: object,
        constexprs: dict[tuple[int, ...], Any],
        options: Any,
        attrs: dict[tuple[int, ...], Any],
        warmup: bool,
    ) -> None:
        launches.append(Launch(kernel, dict(signature), dict(constexprs), dict(attrs), dict(options.__dict__), target))

    found, elsewhere = _properties(target), _Elsewhere(target)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(torch.version, "hip", "6" if target.startswith("gfx") else None))
        enter(patch.object(torch.cuda, "device", lambda device: nullcontext()))
        enter(patch.object(torch.cuda, "get_device_capability", lambda device=None: (found.major, found.minor)))
        enter(patch.object(torch.cuda, "get_device_properties", lambda device=None: found))
        enter(patch.object(driver, "_active", _Driver(target)))
        # the one place between Triton's specialisation of the arguments and its compiler
        enter(patch.object(JITFunction, "_do_compile", note))
        enter(elsewhere)
        yield launches, elsewhere.move


def record(target: str, samples: Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> list[tuple[str, Launch]]:
    """Every binary that the samples need on a target, once, with the kernel and the first sample that needed it."""
    found: dict[str, tuple[str, Launch]] = {}
    for case, launcher, args in samples:
        with recorder(target) as (launches, move):
            try:
                launcher(*move(args))
            except TypeError as error:
                raise TypeError(f"{case}: the sample does not fit the launcher: {error}") from error
        for launch in launches:
            found.setdefault(launch.key(), (f"{launch.name}: {case}", launch))
    return list(found.values())
