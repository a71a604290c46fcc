"""Evo-ViT's numeric invariants, E1 to E7 of its specification; E2 and E17 are also in test_every_method.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import NUM_TOKENS, TINY, assert_rounding, build, make_images, permute_patches, run_blocks
from torch import Tensor

from mtvit_ops import VisionTransformer, create_method, create_model
from mtvit_ops.methods import EvoViTConfig
from mtvit_ops.testing import assert_equal

BATCH, DEPTH, PATCHES, HEADS = 4, 12, NUM_TOKENS - 1, TINY["num_heads"]
MODES = pytest.mark.parametrize("mode", ["stage", "layer"])


def evo(device: str = "cpu", **options: Any) -> VisionTransformer:
    # weights, trade-offs and ratios with which a placeholder does come back
    return build("evovit", seed=1, device=device, **({"depth": DEPTH, "keep_ratios": 0.7, "tradeoffs": 0.9} | options))


def streams(model: VisionTransformer, images: Tensor) -> tuple[Any, Tensor]:
    """A run, and its residual stream after each block, (L, B, 1 + N, D)."""
    result = run_blocks(model, images)
    return result, torch.stack([tokens.x.reshape(len(images), -1, tokens.x.shape[1]) for tokens in result.outputs])


def alive_masks(result: Any, block: int) -> Tensor:
    """Which tokens enter a block, (B, 1 + N)."""
    mask = torch.zeros(BATCH, NUM_TOKENS, dtype=torch.bool)
    for image in range(BATCH):
        mask[image, result.trace.kept(block, image).cpu()] = True
    return mask.to(result.logits.device)


@MODES
@pytest.mark.parametrize(("side", "tokens", "kept"), [(224, 197, 99), (384, 577, 289)])
def test_token_counts(mode: str, side: int, tokens: int, kept: int, backend: str, device: str) -> None:
    # E1
    model = build("evovit", img_size=side, depth=12, mode=mode, device=device)
    with torch.inference_mode():
        _, trace = model(make_images(1, side, device=device), return_trace=True)
    assert trace.tokens_per_block[:, 0].tolist() == [tokens] * 4 + [kept] * 8


@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        # rounded down: 16 * 0.55 = 8.8
        (0.55, [17] * 4 + [9] * 8),
        # a stage takes the ratio of its first block
        ((1,) * 4 + (0.75, 0.1, 0.1, 0.1) + (0.25, 1, 1, 1), [17] * 4 + [13] * 4 + [5] * 4),
        # only the second stage prunes
        ((1,) * 8 + (0.5,) * 4, [17] * 8 + [9] * 4),
        # only the first does: at the second everyone comes back
        ((1,) * 4 + (0.5,) * 4 + (1,) * 4, [17] * 4 + [9] * 4 + [17] * 4),
    ],
)
def test_keep_ratios_of_stages(ratios: Any, counts: list[int], backend: str, device: str) -> None:
    with torch.inference_mode():
        _, trace = evo(device, keep_ratios=ratios)(make_images(1, device=device), return_trace=True)
    assert trace.tokens_per_block[:, 0].tolist() == counts


def test_keep_ratios_of_layers(backend: str, device: str) -> None:
    ratios = (0.5, 1, 0.75, 0.25, 1, 1, 0.5, 0.125, 0.5, 1, 0.0625, 1)
    model = evo(device, keep_ratios=ratios, mode="layer")
    with torch.inference_mode():
        _, trace = model(make_images(2, device=device), return_trace=True)
    assert trace.tokens_per_block[:, 1].tolist() == [1 + int(PATCHES * ratio) for ratio in ratios]


def test_placeholders_are_frozen_and_return(backend: str, device: str) -> None:
    # E3: who is not processed keeps the very bits of the block before, through both stages
    result, outputs = streams(evo(device), make_images(BATCH, device=device))
    first, second = alive_masks(result, 4), alive_masks(result, 8)
    assert_equal("after block 7", outputs[7][~first], outputs[3][~first])
    assert_equal("after block 11", outputs[11][~second], outputs[7][~second])
    assert_equal("never processed again", outputs[11][~first & ~second], outputs[3][~first & ~second])
    assert bool((outputs[7] != outputs[3])[first].any(dim=-1).all())
    assert bool((second & ~first).any()), "no placeholder comes back: this would show nothing"


def test_the_first_score_is_what_the_class_token_gives_the_patches(backend: str, device: str) -> None:
    # E4: heads times (1 - what the class token keeps for itself)
    model, images = evo(device), make_images(BATCH, device=device)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
        block = model.blocks[0]
        x = block.norm1(model.embed(images).x.reshape(BATCH, NUM_TOKENS, -1))
        q, k, _ = block.attn.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, d) each
        attention = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)[:, :, 0]  # (B, H, n)
    total = trace.extras["score"][0].sum(dim=1)
    assert_rounding(trace.extras["score"][0], attention[:, :, 1:].sum(dim=1))
    assert_rounding(total, HEADS * (1 - attention[:, :, 0].mean(dim=1)))
    assert bool((total < HEADS).all())


@MODES
def test_scores_evolve_where_tokens_are_processed(mode: str, backend: str, device: str) -> None:
    # E4 and the rule of 2.2: (1 - a) G + a c on the processed patches, G elsewhere; no attention there
    result = run_blocks(evo(device, tradeoffs=0.3, mode=mode), make_images(BATCH, device=device))
    score, attention = result.trace.extras["score"], result.trace.extras["class_attention"]
    for block in range(DEPTH):
        mask = alive_masks(result, block)[:, 1:]
        weight = 0.3 if block >= 4 else 1.0
        before = score[block - 1] if block else torch.zeros_like(score[0])
        assert_rounding(score[block][mask], ((1 - weight) * before + weight * attention[block])[mask])
        assert_equal("placeholders", score[block][~mask], before[~mask])
        assert bool((attention[block][~mask] == 0).all())
        assert bool((attention[block][mask] > 0).all())


@MODES
def test_selections_follow_the_score(mode: str, backend: str, device: str) -> None:
    result = run_blocks(evo(device, mode=mode), make_images(BATCH, device=device))
    score = result.trace.extras["score"]
    for block in (4, 8) if mode == "stage" else range(4, 12):
        best = score[block - 1].topk(int(PATCHES * 0.7), dim=1).indices
        want = torch.zeros_like(score[0], dtype=torch.bool).scatter(1, best, True)
        assert_equal("selected", alive_masks(result, block)[:, 1:], want)


def test_the_first_selection_sees_one_block_only(backend: str, device: str) -> None:
    # E5: with the default trade-offs the score after block 3 is that block's own class attention
    result = run_blocks(evo(device, tradeoffs=0.5), make_images(BATCH, device=device))
    assert_equal("score", result.trace.extras["score"][3], result.trace.extras["class_attention"][3])


def test_modes_part_after_the_first_selection(backend: str, device: str) -> None:
    # E6
    images = make_images(BATCH, device=device)
    stage, stage_outputs = streams(evo(device), images)
    layer, layer_outputs = streams(evo(device, mode="layer"), images)
    for block in range(5):
        assert_equal(f"block {block}", layer_outputs[block], stage_outputs[block])
    assert not torch.equal(alive_masks(layer, 5), alive_masks(stage, 5))
    assert not torch.equal(layer.logits, stage.logits)


@MODES
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_permuted_patches_change_no_logit(mode: str, pool: str, backend: str, device: str) -> None:
    # E7
    model, images = evo(device, mode=mode, pool=pool), make_images(BATCH, device=device)
    with torch.inference_mode():
        logits = model(images)
        twin, moved = permute_patches(model, images, torch.randperm(PATCHES).to(device))
        assert_rounding(twin(moved), logits, DEPTH)


@pytest.mark.parametrize(
    ("options", "who"), [({}, "everyone"), ({"prune_cls": True}, "alive"), ({"pool": "class"}, "class")]
)
def test_what_the_classifier_reads(options: dict[str, Any], who: str, backend: str, device: str) -> None:
    model = evo(device, **options)
    result, outputs = streams(model, make_images(BATCH, device=device))
    last = outputs[-1]
    patches = alive_masks(result, DEPTH - 1)[:, 1:, None] if who == "alive" else torch.ones_like(last[:, 1:, :1])
    pooled = last[:, 0] if who == "class" else (last[:, 1:] * patches).sum(dim=1) / patches.sum(dim=1)
    with torch.inference_mode():
        assert_rounding(result.logits, model.head(model.norm(pooled)))


def test_equal_scores_keep_the_first_patches(backend: str, device: str) -> None:
    model = evo(device)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
    with torch.inference_mode():
        _, trace = model(torch.ones(2, 3, 64, 64, device=device), return_trace=True)
    assert trace.kept(4, 1).tolist() == list(range(1 + int(PATCHES * 0.7)))


def test_tracing_scores_more_blocks_but_changes_nothing(backend: str, device: str) -> None:
    model, images = evo(device), make_images(BATCH, device=device)
    with torch.inference_mode():
        assert_equal("logits", model(images, return_trace=True)[0], model(images))
    # only selections need scores: the last before each, and what evolved since
    assert [model.method.scores_at(block, False) is not None for block in range(12)] == [False] * 3 + [True] * 5 + [
        False
    ] * 4


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keep_ratios": 0.0}, ValueError, "keep_ratios"),
        ({"keep_ratios": 1.1}, ValueError, "keep_ratios"),
        ({"keep_ratios": "half"}, TypeError, "keep_ratios"),
        ({"keep_ratios": (1.0, -0.5)}, ValueError, "keep_ratios"),
        ({"tradeoffs": -0.1}, ValueError, "tradeoffs"),
        ({"mode": "stages"}, ValueError, "mode must be one of 'stage', 'layer', got 'stages'"),
        ({"pool": "max"}, ValueError, "pool"),
    ],
)
def test_bad_configuration(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EvoViTConfig(**options)


@pytest.mark.parametrize("name", ["keep_ratios", "tradeoffs"])
def test_one_entry_for_each_block(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must have one entry for each of the 12 blocks, got 3"):
        evo().with_method(create_method("evovit", **{name: (1.0, 0.5, 0.5)}))


def test_the_first_score_is_the_first_attention() -> None:
    """There is nothing to trade off with before block 0, whatever its trade-off says."""
    sizes = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 6, "num_classes": 10}
    model = create_model("evovit_tiny_patch16_224", **sizes, tradeoffs=(0.1,) * 6).eval()
    with torch.inference_mode():
        _, trace = model(torch.randn(2, 3, 64, 64), return_trace=True)
    assert torch.equal(trace.extras["score"][0], trace.extras["class_attention"][0])
