"""Kernels stand in for modules and weights only as long as these are what they look like."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from model_cases import assert_rounding, build, make_images
from torch import Tensor, nn
from torch.autograd import forward_ad

import mtvit_ops
from mtvit_ops import _backend
from mtvit_ops.nn import VisionTransformer, pack_weights
from mtvit_ops.nn.linear import linear
from mtvit_ops.testing import assert_equal

METHODS = ["vit", "avit", "evovit", "lifevit", "mtvit"]
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])


def make(name: str, packed: bool = False, **options: object) -> VisionTransformer:
    model = build(name, **({"predictor_size": 32} if name == "mtvit" else {}), **options)
    return pack_weights(model) if packed else model


def plainly(model: VisionTransformer, images: Tensor) -> Tensor:
    """Logits of a copy that has never run, without kernels."""
    with _backend.use_backend("reference"), torch.no_grad():
        return mtvit_ops.unpack_weights(copy.deepcopy(model))(images)


@PACKED
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_fused_steps_are_seen(kind: str, name: str, packed: bool) -> None:
    model, images = make(name, packed), make_images(3)
    optimiser = getattr(torch.optim, kind)(model.parameters(), lr=0.05, fused=True)
    with torch.no_grad():
        before = model(images)
    for _ in range(2):
        optimiser.zero_grad()
        model(images).square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        after = model(images)
    assert not torch.allclose(before, after)
    assert_rounding(after, plainly(model, images), depth=len(model.blocks))


@PACKED
@pytest.mark.parametrize(
    "path", ["head", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.1.norm1", "patch_embed.proj"]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_forward_of_ones_own_runs(name: str, path: str, packed: bool) -> None:
    if name == "mtvit" and path == "patch_embed.proj":
        pytest.skip("MT-ViT's tails are read, not called")
    model, images = make(name), make_images(3)
    layer, calls = model.get_submodule(path), []
    own = layer.forward
    layer.forward = lambda x: calls.append(1) or own(x) / 2  # type: ignore[method-assign]
    if packed:
        pack_weights(model)
    with torch.no_grad():
        found = model(images)
    assert calls
    other = make(name)
    with torch.no_grad():
        for parameter in other.get_submodule(path).parameters():
            parameter.mul_(0.5)
        wanted = other(images)
    assert_rounding(found, wanted, depth=len(model.blocks))


@pytest.mark.parametrize("name", METHODS)
def test_hooks_on_all_modules_see_all_layers(name: str) -> None:
    model, seen = make(name), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            model(make_images(2))
    finally:
        handle.remove()
    for kind in (nn.Linear, nn.Conv2d):
        expected = sum(type(module) is kind for module in model.modules())
        if name == "mtvit" and kind is nn.Conv2d:
            expected -= len(model.method.projections) + 1  # read, not called
        assert seen.count(kind) == expected, kind


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["vit", "avit", "evovit", "lifevit"])
def test_norms_of_other_kinds(name: str, grad: bool) -> None:
    model, other, images = make(name), make(name), make_images(3)
    for block, twin in zip(model.blocks, other.blocks, strict=True):
        norm = Doubled(block.norm1.normalized_shape, eps=block.norm1.eps)
        norm.load_state_dict(block.norm1.state_dict())
        block.norm1 = norm
        twin.norm1.weight.data.mul_(2)
        twin.norm1.bias.data.mul_(2)
    with torch.set_grad_enabled(grad):
        assert_rounding(model(images).detach(), other(images).detach(), depth=len(model.blocks))


@pytest.mark.parametrize("name", ["vit", "evovit", "lifevit"])
def test_norms_without_a_bias(name: str) -> None:
    model, images = make(name), make_images(3)
    for block in model.blocks:
        block.norm2 = nn.RMSNorm(block.norm2.normalized_shape, eps=1e-6)
    with torch.no_grad():
        assert_rounding(model(images), plainly(model, images), depth=len(model.blocks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_default_dtype_is_nobodys_business(name: str, dtype: torch.dtype) -> None:
    model, images = make(name), make_images(3)
    with torch.no_grad():
        want = model(images)
        torch.set_default_dtype(dtype)
        try:
            found = model(images)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_equal("logits", found, want)


TRANSFORMED: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "vmap": lambda layer, x: torch.vmap(lambda row: linear(row[None], layer)[0])(x),
    "jvp": lambda layer, x: torch.func.jvp(lambda value: linear(value, layer), (x,), (torch.ones_like(x),))[1],
}


@PACKED
@pytest.mark.parametrize("case", TRANSFORMED)
def test_a_linear_layer_under_transforms(case: str, packed: bool) -> None:
    plain, x = nn.Linear(16, 32), torch.randn(4, 16)
    layer = pack_weights(plain) if packed else plain
    with torch.no_grad():
        found = TRANSFORMED[case](layer, x)
        want = plain(x) if case == "vmap" else (torch.ones_like(x) @ plain.weight.T)
    assert_rounding(found, want)


@PACKED
def test_tangents_are_not_lost(packed: bool) -> None:
    plain, x = nn.Linear(16, 32), torch.randn(4, 16)
    layer = pack_weights(plain) if packed else plain
    with torch.no_grad(), forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, torch.ones_like(x)), layer)
        tangent = forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        assert_rounding(tangent, torch.ones_like(x) @ plain.weight.T)


def test_modules_may_be_swapped_on_conversion() -> None:
    model, images = make("vit", packed=True), make_images(2)
    with torch.no_grad():
        model(images)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.bfloat16()
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert model(images.bfloat16()).dtype is torch.bfloat16
