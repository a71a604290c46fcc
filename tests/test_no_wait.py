"""Forward passes and references never look at the device's values and send it nothing from the host.

On the meta device there are no values to look at: ``item``, ``tolist``, ``nonzero`` and boolean masks raise there, and
every branch is the one that a GPU takes. What comes from the host is caught by name. Runs anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import ALL, assert_rounding, build_case, make_images
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mtvit_ops.reference
from mtvit_ops import RaggedTokens
from mtvit_ops.nn import masked_twin
from mtvit_ops.testing import assert_equal

FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


class _NothingFromTheHost(TorchFunctionMode):
    """Refuses tensors made of Python values: their copy to a GPU waits for it, and no graph can hold it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in FROM_HOST, f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


class _NothingOnTheCpu(TorchDispatchMode):
    """Refuses operators that read or make CPU tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        assert all(tensor.is_meta for tensor in tensors), f"{func} meets a CPU tensor"
        return result


def on_meta(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), _NothingFromTheHost(), _NothingOnTheCpu():
        return function(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args))


@pytest.mark.parametrize("return_trace", [False, True], ids=["plain", "trace"])
@pytest.mark.parametrize("name", ALL)
def test_a_forward_pass_stays_on_the_device(name: str, return_trace: bool) -> None:
    model = build_case(name)
    state = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    images = make_images(3).to("meta")

    def forward() -> Any:
        return functional_call(model, state, (images,), {"return_trace": return_trace})

    result = on_meta(forward)
    logits = result[0] if return_trace else result
    assert logits.is_meta
    assert logits.shape == (3, 10)


@pytest.mark.parametrize("masked", [False, True], ids=["removed", "masked"])
@pytest.mark.parametrize("name", ALL)
def test_dead_entries_behind_the_live_ones_change_nothing(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the CPU cuts them off where a GPU cannot know how many there are
    model, images = build_case(name), make_images(6)
    model = masked_twin(model) if masked else model
    with torch.inference_mode():
        wanted, wanted_trace = model(images, return_trace=True)
        monkeypatch.setattr(RaggedTokens, "trimmed", lambda self: self)
        logits, trace = model(images, return_trace=True)
    assert_rounding(logits, wanted)
    assert_equal("tokens per block", trace.tokens_per_block, wanted_trace.tokens_per_block)
    for key, value in trace.extras.items():
        if value.is_floating_point():
            assert_rounding(value, wanted_trace.extras[key])
        else:
            assert_equal(key, value, wanted_trace.extras[key])
    for block in range(model.config.depth):
        for image in range(len(images)):
            assert_equal("kept", trace.kept(block, image), wanted_trace.kept(block, image))


def reference_cases() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every sample that the Triton kernels are compiled for, for the reference of the same name."""
    file = Path(__file__).resolve().parent.parent / "tools" / "launches.py"
    spec = importlib.util.spec_from_file_location("launches", file)
    launches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launches)
    functions: dict[str, Callable[..., Any]] = {}
    for module in pkgutil.iter_modules(mtvit_ops.reference.__path__):
        functions |= vars(importlib.import_module(f"mtvit_ops.reference.{module.name}"))
    with torch.device("meta"):  # no sample needs memory here
        return {
            f"{name} {case}": (functions[name], args)
            for samples in launches.TABLE
            for name, case, args in samples()
            if name in functions
        }


@pytest.mark.parametrize(("reference", "args"), reference_cases().values(), ids=reference_cases())
def test_a_reference_stays_on_the_device(reference: Callable[..., Any], args: tuple[Any, ...]) -> None:
    results = [value for value in tree_leaves(on_meta(reference, *args)) if isinstance(value, Tensor)]
    assert all(value.is_meta for value in results)


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "boolean-mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "from-a-list": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    "from-the-cpu": lambda x: x + torch.ones(2, device="cpu").to(x.device),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_the_rule_bites(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        on_meta(call, torch.ones(2))
