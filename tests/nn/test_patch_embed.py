"""Patches, class token and positions as one native operator: as its single operators, and only where nobody looks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mtvit_ops
from mtvit_ops import _backend
from mtvit_ops._cpu_linear import panel_columns, panel_dtypes
from mtvit_ops._register import native_kernel
from mtvit_ops.nn import VisionTransformer, pack_weights
from mtvit_ops.testing import assert_close_to_float64, assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"img_size": 48, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(autouse=True)
def _needs_the_operator() -> Iterator[None]:
    if not mtvit_ops.available_backends()["cpp"].available or torch.float32 not in panel_dtypes():
        pytest.skip("our own linear layers do not serve models here")
    if _backend.preferred_backend() not in (None, "cpp"):
        pytest.skip(f"{_backend.preferred_backend()} is asked for")
    with torch.no_grad():
        yield


def make(name: str = "vit", dtype: torch.dtype = torch.float32, **overrides: object) -> VisionTransformer:
    model = mtvit_ops.create_model(f"{name}_tiny_patch16_224", **(SIZES | overrides)).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def panels_kept(model: VisionTransformer) -> int:
    """Packed weights that the embedding holds."""
    kept = model.native_embedding._prepared._kept.values()
    return sum(weight.dim() == 3 for entry in kept for weight in entry.arguments[1])


def natively(model: VisionTransformer, images: Tensor) -> Tensor | None:
    made = model._embed_natively(images)
    return None if made is None else made.x


def by_single_operators(model: VisionTransformer, images: Tensor) -> Tensor:
    with _backend.use_backend("reference"):
        assert natively(model, images) is None
        return model.embed(images).x


@pytest.mark.parametrize("dim", [32, 24], ids=["whole-panels", "part-of-a-panel"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_tokens(dtype: torch.dtype, batch: int, dim: int) -> None:
    model = make(dtype=dtype, embed_dim=dim)
    images = torch.randn(batch, 3, 48, 48).to(dtype)
    found = model._embed_natively(images)
    assert found is not None
    want = model.double().embed(images.double())
    assert_equal("cu_seqlens", found.cu_seqlens, want.cu_seqlens)
    assert found[3:] == want[3:]
    assert_close_to_float64("x", found.x, want.x, by_single_operators(model.to(dtype), images))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_images(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    images = torch.randn(2, 48, 48, 3).to(dtype).permute(0, 3, 1, 2)
    found, want = natively(model, images), natively(model, images.contiguous())
    assert found is not None
    assert want is not None
    assert_equal("x", found, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail_of_a_mixed_batch(dtype: torch.dtype) -> None:
    # 48 pixels in 2 x 2 patches of 24 and in 3 x 3 of 16; in 5 x 5 of 10 they reach into the padding
    model = make("mtvit", dtype, grids=(2, 3, 5, 6), patch_size=8)
    images, chosen = torch.randn(5, 3, 48, 48).to(dtype), torch.tensor([3, 0, 2, 2, 1], dtype=torch.int32)
    method = model.method
    assert isinstance(method, mtvit_ops.methods.MTViT)
    unpacked, _ = method.tokenise(model, images, chosen)
    assert panels_kept(model) == 0
    x, cu_seqlens = method.tokenise(pack_weights(model), images, chosen)
    assert panels_kept(model) == 4  # it was the native operator that served
    assert_equal("x without packed weights", unpacked, x)
    model.double()
    want, want_offsets = method.tokenise(model, images.double(), chosen)
    model.to(dtype)
    with _backend.use_backend("reference"):
        plain, _ = method.tokenise(model, images, chosen)
    assert_equal("cu_seqlens", cu_seqlens, want_offsets)
    assert_close_to_float64("x", x, want, plain)


def test_threads_change_no_bit() -> None:
    model, images = make(embed_dim=192, num_heads=3), torch.randn(5, 3, 48, 48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tokens = natively(model, images)
            assert tokens is not None
            found.append(tokens)
    finally:
        torch.set_num_threads(before)
    for tokens in found[1:]:
        assert_equal("x", tokens, found[0])


def test_packed_weights_give_the_same_bits() -> None:
    model, images = make(), torch.randn(2, 3, 48, 48)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    rest = [bias], [model.pos_embed[0]], [16], [0], True
    plain, _ = native_kernel("ragged_patch_embed")(
        images, torch.zeros(2, dtype=torch.int32), model.cls_token[0], [weight], *rest
    )
    for each in (model, pack_weights(model)):
        found = natively(each, images)
        assert found is not None
        assert_equal("x", found, plain)
    assert panels_kept(model) == 1


def test_nobody_asked_to_pack() -> None:
    # so that a change which leaves no trace is seen
    model, images = make(), torch.randn(1, 3, 48, 48)
    before = natively(model, images)
    model.patch_embed.proj.weight.data.zero_()
    changed = natively(model, images)
    assert before is not None
    assert changed is not None
    assert not torch.equal(before, changed)
    assert_equal("x", changed, natively(copy.deepcopy(model), images))


def test_under_another_default_device() -> None:
    model, images = make(), torch.randn(1, 3, 48, 48)
    want = natively(model, images)
    with torch.device("meta"):
        found = natively(model, images)
    assert found is not None
    assert_equal("x", found, want)


def test_changed_weights_are_packed_anew() -> None:
    model, images = pack_weights(make()), torch.randn(1, 3, 48, 48)
    before = natively(model, images)
    model.patch_embed.proj.weight.mul_(2)
    doubled = natively(model, images)
    assert before is not None
    assert doubled is not None
    assert not torch.equal(before, doubled)
    model.patch_embed.proj.weight = nn.Parameter(model.patch_embed.proj.weight / 2)
    again = natively(model, images)
    assert again is not None
    assert_equal("x", again, before)
    assert panels_kept(model) == 1  # the weight that is gone left no panels


def test_copies_and_pickles_pack_their_own() -> None:
    model, images = pack_weights(make()), torch.randn(1, 3, 48, 48)
    before = natively(model, images)
    assert before is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert panels_kept(twin) == 0
        twin.patch_embed.proj.weight.zero_()
        changed, own = natively(twin, images), natively(model, images)
        assert changed is not None
        assert own is not None
        assert not torch.equal(changed, before)
        assert_equal("x", own, before)


def test_steps_aside_where_somebody_looks() -> None:
    images = torch.randn(1, 3, 48, 48)
    seen = []
    for part in ("patch_embed", "patch_embed.proj"):
        model = make()
        with_hook = model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        assert natively(model, images) is None
        model(images)
        assert len(seen) == 1
        seen.clear()
        with_hook.remove()
        assert natively(model, images) is not None
    with torch.enable_grad():
        assert natively(model, images) is None
    assert natively(model, images[:0]) is None
    assert natively(model.double(), images.double()) is None
    model.float().patch_embed.proj = nn.Conv2d(3, 32, 16, 16, bias=False)
    assert natively(model, images) is None


def test_operator_refuses_packed_weights_that_do_not_fit() -> None:
    model, images = make(), torch.randn(1, 3, 48, 48)
    embed, conv = native_kernel("ragged_patch_embed"), model.patch_embed.proj
    panels = torch.ops.mtvit_ops_cpp.pack_panels(conv.weight.flatten(1))
    columns = panel_columns()

    def run(weight: Tensor, ours: bool = True) -> None:
        chosen = torch.zeros(1, dtype=torch.int32)
        embed(images, chosen, model.cls_token[0], [weight], [conv.bias], [model.pos_embed[0]], [16], [0], ours)

    run(panels)
    for wrong in (
        panels[:-1],  # too few rows
        panels[:, :-3].contiguous(),  # no square kernel
        panels[:, :-1].contiguous(),  # not a multiple of the channels
        panels[..., :-1].contiguous(),
        panels.new_empty(32 // columns, 0, columns),
        panels.double(),
    ):
        with pytest.raises((RuntimeError, ValueError), match="weights"):
            run(wrong)
    with pytest.raises((RuntimeError, ValueError), match="weights"):
        run(panels, False)


def test_operator_refuses_more_tokens_than_offsets_can_count() -> None:
    chosen, prefix = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 0)
    # tokens without channels take no memory: one pixel in a padding of 2^30
    weight, table = torch.zeros(0, 3, 1, 1), torch.zeros((2**31 + 1) ** 2, 0)
    with pytest.raises(RuntimeError, match="all images together must have at most 2147483647 tokens"):
        native_kernel("ragged_patch_embed")(
            torch.zeros(1, 3, 1, 1), chosen, prefix, [weight], [torch.zeros(0)], [table], [1], [2**30], False
        )
