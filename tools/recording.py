"""What Triton would compile for a GPU that this machine does not have: launches are recorded, not made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

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


@contextmanager
def recorder(target: str) -> Iterator[list[Launch]]:
    """While open, launches on CPU tensors land in the list instead of on a device; kernels run nothing."""
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

    # the one place between Triton's specialisation of the arguments and its compiler
    with patch.object(driver, "_active", _Driver(target)), patch.object(JITFunction, "_do_compile", note):
        yield launches


def record(target: str, samples: Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> list[tuple[str, Launch]]:
    """Every binary that the samples need on a target, once, with the kernel and the first sample that needed it."""
    found: dict[str, tuple[str, Launch]] = {}
    for case, launcher, args in samples:
        with recorder(target) as launches:
            try:
                launcher(*args)
            except TypeError as error:
                raise TypeError(f"{case}: the sample does not fit the launcher: {error}") from error
        for launch in launches:
            found.setdefault(launch.key(), (f"{launch.name}: {case}", launch))
    return list(found.values())
