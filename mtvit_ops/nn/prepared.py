"""What a run of blocks hands to its native operator, kept as long as nothing it was made from has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Kept(NamedTuple):
    dtype: torch.dtype
    blocks: tuple[nn.Module, ...]
    entries: list[tuple[dict[str, Any], str, object]]  # that a dict still holds what it held
    hooks: list[Any]  # dicts that are to be empty
    weights: list[tuple[Tensor, int, int]]  # with address and version
    arguments: Any


class Prepared:
    """Arguments by the blocks they are for.

    To look at every layer anew takes longer than to see that nothing has changed.
    Seen are other modules, parameters, sizes and hooks, a ``forward`` put on a module, and weights changed in place or
    moved; not those changed through ``.data``, as in ``PackedLinear``.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Kept] = {}  # by the first block and their number

    def arguments(self, blocks: Sequence[nn.Module], x: Tensor, make: Callable[[Sequence[Any], Tensor], Any]) -> Any:
        """``make(blocks, x)``, or what it gave before; None is not kept."""
        key = id(blocks[0]), len(blocks)
        kept = self._kept.get(key)
        if kept is not None and kept.dtype is x.dtype and _unchanged(kept, blocks):
            return kept.arguments
        self._kept.pop(key, None)  # before new ones are packed: twice the weights would be much
        made = make(blocks, x)
        # inference tensors have no version that would tell of a change
        if made is not None and not any(weight.is_inference() for block in blocks for weight in block.parameters()):
            self._kept[key] = _keep(blocks, x.dtype, made)
        return made

    def __deepcopy__(self, memo: Any) -> Prepared:
        return Prepared()  # a copy has modules of its own, and packed weights cannot be copied

    def __reduce__(self) -> Any:
        return Prepared, ()


def _unchanged(kept: _Kept, blocks: Sequence[nn.Module]) -> bool:
    for block, before in zip(blocks, kept.blocks):
        if block is not before:
            return False
    for entries, name, value in kept.entries:
        if entries.get(name) is not value:
            return False
    if any(kept.hooks):
        return False
    for weight, address, version in kept.weights:
        if weight._version != version or weight.data_ptr() != address:
            return False
    return True


def _keep(blocks: Sequence[nn.Module], dtype: torch.dtype, arguments: Any) -> _Kept:
    entries: list[tuple[dict[str, Any], str, object]] = []
    hooks: list[Any] = []
    weights: list[tuple[Tensor, int, int]] = []
    for block in blocks:
        for module in block.modules():
            state = vars(module)
            hooks += (module._forward_hooks, module._forward_pre_hooks)
            for held in (module._modules, module._parameters):
                entries += ((held, name, value) for name, value in held.items())  # type: ignore[misc]
            entries.append((state, "forward", state.get("forward")))
            # of these, nobody reads what a module has none of
            entries += ((state, name, state[name]) for name in ("eps", "num_heads", "scale") if name in state)
            for weight in module._parameters.values():
                if weight is not None:
                    weights.append((weight, weight.data_ptr(), weight._version))
    return _Kept(dtype, tuple(blocks), entries, hooks, weights, arguments)
