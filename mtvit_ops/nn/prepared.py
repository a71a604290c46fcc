"""What modules hand to a native operator, kept as long as nothing it was made from has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _extension

_SIZES = ("eps", "num_heads", "scale", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class _Kept(NamedTuple):
    dtype: torch.dtype
    modules: tuple[nn.Module, ...]
    watched: _Watched
    arguments: Any


class _Watched(NamedTuple):
    """Lists, for ``unchanged`` in csrc/bindings.cpp: in Python, looking takes three times as long."""

    dicts: list[dict[str, Any]]  # that each still holds
    names: list[str]  # under its name
    values: list[object]  # what it held; None: or has no such name
    hooks: list[Any]  # dicts that are to be empty
    weights: list[Tensor]  # with their
    addresses: list[int]  # of those that are no vectors: these come last
    versions: list[int]


class Prepared:
    """Arguments of operators, by a key of the caller's.

    To look at every layer anew takes longer than to see that nothing has changed.
    Seen are other modules, parameters, sizes and hooks, a ``forward`` put on a module, and weights changed in place or
    moved; not those changed through ``.data``, as in ``PackedLinear``.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def arguments(
        self,
        key: Hashable,
        modules: Sequence[nn.Module],
        x: Tensor,
        make: Callable[[Sequence[Any], Tensor], Any],
        entries: Iterable[tuple[dict[str, Any], str]] = (),
    ) -> Any:
        """``make(modules, x)``, or what it gave before under this key; None is not kept.

        Args:
            key: whose arguments these are.
            modules: what they are made from, with all modules in them.
            x: what they are for; only its dtype counts.
            make: its result may hold copies of what it was made from.
            entries: what else they are made from, as dicts with names.
        """
        kept = self._kept.get(key)
        known = kept is not None and kept.dtype is x.dtype and kept.modules == tuple(modules)
        if kept is not None and known and _extension.build_module().unchanged(*kept.watched):
            return kept.arguments
        self._kept.pop(key, None)  # before new ones are packed: twice the weights would be much
        made = make(modules, x)
        if made is not None:
            watched = _watch(modules, entries)
            if not any(weight.is_inference() for weight in watched.weights):  # those have no version
                self._kept[key] = _Kept(x.dtype, tuple(modules), watched, made)
        return made

    def __deepcopy__(self, memo: Any) -> Prepared:
        return Prepared()  # a copy has modules of its own, and packed weights cannot be copied

    def __reduce__(self) -> Any:
        return Prepared, ()


def _watch(modules: Sequence[nn.Module], entries: Iterable[tuple[dict[str, Any], str]]) -> _Watched:
    watched = [(held, name, held.get(name)) for held, name in entries]
    hooks: list[Any] = []
    for whole in modules:
        for module in whole.modules():
            state = vars(module)
            hooks += (module._forward_hooks, module._forward_pre_hooks)
            for held in (module._modules, module._parameters, module._buffers):
                watched += ((held, name, value) for name, value in held.items())
            watched.append((state, "forward", state.get("forward")))
            # of these, nobody reads what a module has none of
            watched += ((state, name, state[name]) for name in _SIZES if name in state)
            if module._buffers:  # a batch norm
                watched.append((state, "training", module.training))
    weights = [value for _, _, value in watched if isinstance(value, Tensor)]
    weights.sort(key=lambda weight: weight.dim() < 2)  # vectors last: one look less at each
    return _Watched(
        [held for held, _, _ in watched],
        [name for _, name, _ in watched],
        [value for _, _, value in watched],
        hooks,
        weights,
        [weight.data_ptr() for weight in weights if weight.dim() > 1],
        [0 if weight.is_inference() else weight._version for weight in weights],
    )
