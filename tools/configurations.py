"""Launch configurations to be tried beside the present ones: names of kernels/_launch.py, replaced for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from mtvit_ops.kernels import _launch

Names = dict[str, Any]  # of _launch.py, and what stands there instead


def changed(name: str, change: Callable[[Any], Any]) -> Names:
    """A function of _launch.py whose result is changed."""
    present = getattr(_launch, name)
    return {name: lambda *args, **kwargs: change(present(*args, **kwargs))}


def row_plan(**fields: Any) -> Names:
    """Plans of attention that hold whole rows, with other fields."""
    return changed("attention_plan", lambda plan: plan._replace(**fields) if plan.whole_row else plan)


def gradient_tiles(**fields: Any) -> Names:
    return changed("attention_backward_tiles", lambda tiles: tuple(tile._replace(**fields) for tile in tiles))


def each(name: str, *values: Any) -> dict[str, Names]:
    """A number of _launch.py at other values."""
    return {f"{name}={value}": {name: value} for value in values}


# file in kernels: configuration: names
CONFIGURATIONS: dict[str, dict[str, Names]] = {
    "scatter_residual": each("ROW_ELEMENTS", 2048, 8192),
    "gather_layer_norm": {**each("FORWARD_VALUES", 16), **each("BACKWARD_PROGRAMS", 264, 1056)},
    "scatter_residual_layer_norm": each("FORWARD_VALUES", 16),
    "varlen_attention": {
        "keys in tiles": {"WHOLE_ROW_KEYS": 0},
        "registers free": changed("attention_plan", lambda plan: plan._replace(registers=None)),
        "one stage": row_plan(stages=1),
        **{f"span of {span}": row_plan(span=span) for span in (128, 256)},
        **each("SCORES_TILE", 32, 128),
    },
    "varlen_attention_backward": {
        "four warps": gradient_tiles(warps=4),
        "eight warps": gradient_tiles(warps=8),
        "one stage": gradient_tiles(stages=1),
    },
    "class_attention": each("ROW_VALUES", 4096, 16384),
    "token_select": {**each("RANKED", 64, 1024), **each("LONGEST_TILE", 256)},
    "halting_step": each("LIST_TILE", 256, 1024),
    "halting_step_backward": {**each("LIST_TILE", 256, 1024), **each("ROW_ELEMENTS", 2048, 8192)},
    "slow_fast": {
        **each("IMAGE_WARPS", 4),
        **each("IMAGE_COLUMNS", 64, 256),
        **each("WHOLE_ROW_ELEMENTS", 4096),
    },
    "ragged_linear": {
        ", ".join(f"{name} {value}" for name, value in tile._asdict().items()): {"HALF_TILES": (tile,)}
        for present in _launch.HALF_TILES
        for tile in (present, present._replace(stages=present.stages + 1), present._replace(registers=None))
    },
    "ragged_patch_embed": {**each("PATCH_WARPS", 4), **each("PATCH_STAGES", 2, 3)},
    "ragged_patch_embed_backward": {**each("PATCH_STAGES", 2, 3), **each("WEIGHT_PROGRAMS", 132, 528)},
}


@contextmanager
def in_force(names: Names) -> Iterator[None]:
    """Names replaced in _launch.py and wherever a launcher has imported them."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{_launch.__package__}.")]
    with ExitStack() as stack:
        for name, value in names.items():
            present = getattr(_launch, name)
            for module in modules:
                if vars(module).get(name) is present:
                    stack.enter_context(patch.object(module, name, value))
        yield
