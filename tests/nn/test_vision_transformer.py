"""The thin ViT: timm's model with timm's weights, and what its callers may rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ALL, NUM_TOKENS, TINY, OpCounter, assert_rounding, build, build_case, lively, make_images
from torch import Tensor

from mtvit_ops import RaggedTokens, ViTConfig, create_method, create_model
from mtvit_ops.nn import Attention, Block, masked_twin
from mtvit_ops.testing import assert_close_to_float64, assert_equal

timm = pytest.importorskip("timm", reason="timm is not installed: its models are what the dense ViT is held to")
BATCH = 3

# patches of 8, heads of 16, an odd grid, other channels and MLP, a single patch
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "patch8": {"patch_size": 8, "depth": 3},
    "grid5-heads3": {"img_size": 80, "embed_dim": 48, "num_heads": 3, "depth": 2},
    "gray-mlp3": {"in_chans": 1, "mlp_ratio": 3.0, "depth": 2},
    "one-patch": {"img_size": 16, "depth": 2},
}


def pair(case: str) -> tuple[Any, Any, Tensor]:
    """timm's model, ours with its weights, and images."""
    sizes = TINY | SIZES[case]
    torch.manual_seed(0)
    ours = lively(create_model("vit_tiny_patch16_224", **sizes).eval())
    theirs = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours, torch.randn(BATCH, sizes.get("in_chans", 3), sizes["img_size"], sizes["img_size"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SIZES)
def test_equals_timm(case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    theirs, ours, images = pair(case)
    theirs, ours, images = theirs.to(device, dtype), ours.to(device, dtype), images.to(device, dtype)
    with torch.inference_mode():
        plain, logits = theirs(images), ours(images)
        exact = theirs.double()(images.double())
    assert logits.dtype == dtype
    assert_close_to_float64("logits", logits, exact, plain)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224"])
def test_state_dict_is_timms(name: str) -> None:
    theirs = timm.create_model(name, num_classes=10).eval()
    ours = create_model(name.replace("deit", "vit"), num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if "tiny" in name:
        images = torch.randn(2, 3, 224, 224)
        with torch.inference_mode():
            logits, plain = ours(images), theirs(images)
            exact = theirs.double()(images.double())
        assert_close_to_float64("logits", logits, exact, plain)


def test_gradients_are_timms() -> None:
    theirs, ours, images = pair("tiny")
    exact, _, _ = pair("tiny")
    exact.load_state_dict(theirs.state_dict())
    for model in (theirs, ours, exact.double()):
        logits = model.train()(images.to(next(model.parameters()).dtype))
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 4, 2])).backward()
    want, plain = dict(exact.named_parameters()), dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        assert_close_to_float64(name, value.grad, want[name].grad, plain[name].grad)


IMAGES_LIKE = make_images(1)
BAD_IMAGES = {
    "rank-3": (IMAGES_LIKE[0], ValueError, r"images must have shape \(B, 3, 64, 64\), got \(3, 64, 64\)"),
    "channels": (IMAGES_LIKE[:, :1], ValueError, r"images must have shape .* got \(1, 1, 64, 64\)"),
    "size": (IMAGES_LIKE[..., :63], ValueError, r"images must have shape .* got \(1, 3, 64, 63\)"),
    "float64": (IMAGES_LIKE.double(), TypeError, "images must have dtype float32, got float64"),
    "uint8": (IMAGES_LIKE.byte(), TypeError, "images must have dtype float32, got uint8"),
    "device": (IMAGES_LIKE.to("meta"), ValueError, "images must be on cpu like the other tensors, got meta"),
    "list": ([1.0], TypeError, "images must be a tensor, got list"),
    "none": (None, TypeError, "images must be a tensor, got NoneType"),
}


@pytest.mark.parametrize("name", ["vit", "mtvit"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case: str, name: str) -> None:
    images, error, match = BAD_IMAGES[case]
    model = build_case(name)
    with pytest.raises(error, match=match):
        model(images)


@pytest.mark.parametrize("name", ALL)
def test_images_may_have_any_strides_and_stay_as_they_were(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    before = strided.clone()
    with torch.inference_mode():
        assert_rounding(model(strided), model(images))
        assert_rounding(model(images.to(memory_format=torch.channels_last)), model(images))
    assert_equal("images", strided, before)


@pytest.mark.parametrize("rows", [None, (0, 2, 5, 6, 7)], ids=["all-rows", "some-rows"])
def test_a_block_leaves_its_callers_tokens(rows: Any, backend: str, device: str) -> None:
    block = Block(32, 2).to(device)
    x = torch.randn(8, 32, device=device)
    offsets = torch.tensor([0, 4, 8] if rows is None else [0, 2, 5], dtype=torch.int32, device=device)
    listed = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    tokens, before = RaggedTokens(x, listed, offsets, 4), x.clone()
    with torch.no_grad():
        after = block(tokens)
    assert_equal("x", x, before)
    assert not torch.equal(after.x, x)
    live = torch.arange(8) if rows is None else torch.tensor(rows)
    dead = sorted(set(range(8)) - set(live.tolist()))
    assert_equal("dead rows", after.x[dead], before[dead])
    with torch.no_grad():  # by whoever owns it
        owned = block.feed_forward(block.attend(tokens, inplace=True)[0], inplace=True)
    assert owned.x.data_ptr() == x.data_ptr()
    assert_rounding(owned.x, after.x, depth=1)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads must divide the width 32, got 3"):
        Attention(32, 3)


@pytest.mark.parametrize("name", ALL)
def test_trace(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
    counts = trace.tokens_per_block
    assert (counts.dtype, counts.shape) == (torch.int64, (TINY["depth"], BATCH))
    for block in range(TINY["depth"]):
        for image in range(BATCH):
            kept = trace.kept(block, image)
            assert kept.dtype == torch.int64
            assert len(kept) == counts[block, image]
            assert bool((kept.diff() > 0).all())
            if len(kept):
                assert int(kept[-1]) < NUM_TOKENS
                assert int(kept[0]) >= 0
                if name != "avit":  # there the class token may halt before its patches
                    assert int(kept[0]) == 0


# shape letters: L blocks, B images, N patches, K tokens, T tails
EXTRAS = {
    "vit": {},
    "avit": {"halting_scores": "LBK", "counters": "BK", "ponder": "BK"},
    "evovit-stage": {"class_attention": "LBN", "score": "LBN"},
    "lifevit-budget": {"lives": "BN"},
    "mtvit": {"tail": "B", "predictor_logits": "BT"},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name: str) -> None:
    with torch.inference_mode():
        _, trace = build_case(name)(make_images(BATCH), return_trace=True)
    sizes = {"L": TINY["depth"], "B": BATCH, "N": NUM_TOKENS - 1, "K": NUM_TOKENS, "T": 3}
    shapes = {key: tuple(value.shape) for key, value in trace.extras.items()}
    assert shapes == {key: tuple(sizes[letter] for letter in letters) for key, letters in EXTRAS[name].items()}


@pytest.mark.parametrize(
    ("block", "image", "error", "match"),
    [
        (6, 0, ValueError, r"block must be in \[0, 5\], got 6"),
        (-1, 0, ValueError, r"block must be in \[0, 5\], got -1"),
        (0, 3, ValueError, r"image must be in \[0, 2\], got 3"),
        (0.0, 0, TypeError, "block must be an int, got float"),
        (0, "a", TypeError, "image must be an int, got str"),
    ],
)
def test_bad_places_in_a_trace(block: Any, image: Any, error: type[Exception], match: str) -> None:
    with torch.inference_mode():
        _, trace = build("vit")(make_images(BATCH), return_trace=True)
    with pytest.raises(error, match=match):
        trace.kept(block, image)


@pytest.mark.parametrize("name", ["avit", "evovit", "lifevit", "mtvit"])
def test_with_method_shares_weights(name: str) -> None:
    dense, images = build("vit"), make_images(BATCH)
    before = dense(images)
    options = {"lifevit": {"base_block": 3}, "mtvit": {"grids": (2, 3, 4), "predictor_size": 32}}.get(name, {})
    twin = dense.with_method(create_method(name, **options))
    assert not twin.method.training
    shared = dict(dense.named_parameters())
    own = dict(twin.named_parameters())
    assert all(own[key] is value for key, value in shared.items())
    assert all(key.startswith("method.") for key in own.keys() - shared.keys())
    assert_equal("dense logits", dense(images), before)
    with torch.no_grad():
        dense.head.bias += 1
    fresh = create_model(f"{name}_tiny_patch16_224", **(TINY | options)).eval()
    fresh.load_state_dict(twin.state_dict())
    assert_equal("logits of a copy", fresh(images), twin(images))


def test_with_method_follows_mode_and_dtype() -> None:
    dense = build("vit").bfloat16().train()
    twin = dense.with_method(create_method("lifevit", base_block=3))
    assert twin.method.training
    assert twin.method.weight.dtype == torch.bfloat16
    assert twin(make_images(1).bfloat16()).dtype == torch.bfloat16


def test_the_masked_twin_shares_weights_and_computes_every_row() -> None:
    model, images = build("evovit"), make_images(BATCH)
    twin = masked_twin(model)
    assert {value.data_ptr() for value in twin.parameters()} == {value.data_ptr() for value in model.parameters()}
    for each, rows in ((model, {BATCH * NUM_TOKENS, BATCH * 9}), (twin, {BATCH * NUM_TOKENS})):
        with torch.inference_mode(), OpCounter() as counter:
            each(images)
        assert {shape[0] for shape in counter.shapes["mtvit_ops::varlen_attention"]} == rows


@pytest.mark.parametrize(
    ("field", "value", "error", "match"),
    [
        ("img_size", 65, ValueError, "img_size must be a multiple of patch_size 16, got 65"),
        ("embed_dim", 33, ValueError, "embed_dim must be a multiple of num_heads 2, got 33"),
        ("depth", 0, ValueError, "depth must be >= 1, got 0"),
        ("num_classes", 1.5, TypeError, "num_classes must be an int, got float"),
        ("patch_size", True, TypeError, "patch_size must be an int, got bool"),
        ("in_chans", -3, ValueError, "in_chans must be >= 1, got -3"),
        ("mlp_ratio", -1.0, ValueError, r"mlp_ratio must be in \(0.0, 1000.0\], got -1.0"),
        ("mlp_ratio", "4", TypeError, "mlp_ratio must be a number, got str"),
        ("norm_eps", -1.0, ValueError, "norm_eps must be in"),
        ("norm_eps", "x", TypeError, "norm_eps must be a number, got str"),
    ],
)
def test_bad_sizes(field: str, value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ViTConfig(**(TINY | {field: value}))


def test_a_method_serves_models_of_one_size() -> None:
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 6, "num_classes": 10}
    small, large = (create_model("vit_tiny_patch16_224", **sizes, img_size=side) for side in (64, 96))
    method = create_method("lifevit")
    small.with_method(method)
    small.with_method(method)
    with pytest.raises(ValueError, match="method must be new, got a Life"):
        large.with_method(method)
