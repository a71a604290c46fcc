"""Lists, offsets and counts of any stride: a kernel that takes them for contiguous reads each entry twice here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_registration import SAMPLED, samples
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mtvit_ops import _backend, use_backend
from mtvit_ops.testing import assert_equal

WITHOUT_A_KERNEL = {"gather_rows", "gather_rows_backward"}

pytestmark = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)


def strided(value: Tensor) -> Tensor:
    """An int32 vector as every other entry of another; anything else as it is."""
    return value.repeat_interleave(2)[::2] if value.dtype == torch.int32 and value.dim() == 1 else value


def tensors_after(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Results, and the arguments after the call: some ops write into them."""
    with torch.no_grad(), use_backend("triton"):
        results = getattr(torch.ops.mtvit_ops, name).default(*arguments)
    return [value for value in tree_leaves((results, arguments)) if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", [name for name in SAMPLED if name not in WITHOUT_A_KERNEL], ids="triton-cpu-{}".format)
def test_strides_of_vectors_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = samples()[name]

    def refuse(level: int, message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(_backend, "say_once", refuse)  # the reference must not serve in the kernel's place
    turned = [tree_map_only(Tensor, lambda tensor: strided(tensor.detach().clone()), call) for call in calls]
    assert any(isinstance(value, Tensor) and value.stride() == (2,) for value in tree_leaves(turned))
    for arguments, twins in zip(calls, turned, strict=True):
        for got, want in zip(tensors_after(name, twins), tensors_after(name, arguments), strict=True):
            assert_equal(name, got, want)
