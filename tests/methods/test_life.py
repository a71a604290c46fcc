"""Life Regression's numeric invariants, 2.9 of its specification with the corrections at its end."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from model_cases import (
    NUM_TOKENS,
    OpCounter,
    assert_rounding,
    build,
    make_images,
    permute_patches,
    run_blocks,
)
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import create_method
from mtvit_ops.methods import Life, LifeConfig
from mtvit_ops.methods.life import stage_budgets
from mtvit_ops.ops import varlen_attention
from mtvit_ops.testing import assert_close_to_float64, assert_equal

BATCH, DEPTH, BASE, PATCHES = 5, 12, 4, NUM_TOKENS - 1

# budgets and statistics of 197 tokens, depth 12, stages from blocks 4, 7 and 10
SCHEDULES = {
    0.7: ((140, 100, 72), 0.548223, 0.417517),
    0.8: ((159, 129, 105), 0.681472, 0.399177),
    0.9: ((179, 163, 148), 0.838832, 0.320000),
}
MODES = pytest.mark.parametrize("mode", ["budget", "threshold"])


def scored(x: Tensor, scores: Tensor, keep_ratio: float = 0.7, **sizes: Any) -> Life:
    """A 197-token method whose matrix gives the patches of one image (1, 1 + N, D) these scores (N,)."""
    method = build("lifevit", img_size=224, embed_dim=x.shape[2], depth=DEPTH, keep_ratio=keep_ratio, **sizes).method
    normed = F.layer_norm(x[0].double(), x.shape[2:])
    direction = torch.linalg.lstsq(normed[1:], scores.double()).solution
    with torch.no_grad():  # W c is the direction
        method.weight.copy_(torch.outer(direction, normed[0]) / normed[0].square().sum())
    return method


@pytest.mark.parametrize("keep_ratio", SCHEDULES)
def test_budgets(keep_ratio: float, device: str, backend: str) -> None:
    # 1
    budgets = SCHEDULES[keep_ratio][0]
    assert stage_budgets(197, keep_ratio) == budgets
    model = build("lifevit", img_size=224, depth=DEPTH, keep_ratio=keep_ratio, device=device)
    with torch.inference_mode():
        _, trace = model(make_images(1, 224, device=device), return_trace=True)
    first, second, third = budgets
    assert trace.tokens_per_block[:, 0].tolist() == [197] * 4 + [first] * 3 + [second] * 3 + [third] * 2


@pytest.mark.parametrize(
    ("tokens", "keep_ratio", "budgets"),
    [
        (197, 0.6, (120, 74, 46)),
        (197, 0.5, (100, 52, 28)),
        (197, 1.0, (197, 197, 197)),
        (5, 0.9, (5, 5, 5)),
        (1, 0.5, (1, 1, 1)),
    ],
)
def test_budgets_never_exceed_the_tokens(tokens: int, keep_ratio: float, budgets: tuple[int, ...]) -> None:
    assert stage_budgets(tokens, keep_ratio) == budgets


@pytest.mark.parametrize("keep_ratio", SCHEDULES)
def test_schedule_statistics(keep_ratio: float) -> None:
    # 2; the table has six decimals
    method = build("lifevit", img_size=224, depth=DEPTH, keep_ratio=keep_ratio).method
    assert (method.mean, method.std) == pytest.approx(SCHEDULES[keep_ratio][1:], abs=1e-6)


def test_worked_lives() -> None:
    # 3
    x = torch.randn(1, 5, 32)
    lives = scored(x, torch.tensor([3.0, 1.0, 2.0, 6.0])).lives(x)[0]
    want = torch.tensor([8.385784, 5.293419, 6.839601, 13.024332])
    # six decimals in the table; scores that come out of a solved matrix in float32
    torch.testing.assert_close(lives.detach(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((lives.detach() - 4) / 8, (want - 4) / 8, rtol=1e-5, atol=1e-6)


def test_lives_have_the_schedules_mean_and_deviation(backend: str, device: str) -> None:
    # 3
    model = build("lifevit", depth=DEPTH, device=device)
    with torch.inference_mode():
        _, trace = model(make_images(BATCH, device=device), return_trace=True)
    normalised = (trace.extras["lives"] - 4) / 8
    want = torch.tensor([model.method.std, model.method.mean], device=device)[:, None].expand(2, BATCH)
    torch.testing.assert_close(torch.stack(torch.std_mean(normalised, dim=1)), want, rtol=0, atol=1e-5)


# logits (0, 1, 2): weights of the specification, any constant weight, and a key removed
WEIGHTED = {
    "worked": ((1.0, 0.5, 0.25), (0.237733, 0.323112, 0.439155)),
    "constant": ((0.3, 0.3, 0.3), (0.090031, 0.244728, 0.665241)),
    "removed": ((1.0, 0.0, 1.0), (0.119203, 0.0, 0.880797)),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_softmax(case: str, backend: str, device: str) -> None:
    # 5: weights are a bias of log w on the keys
    weights, want = WEIGHTED[case]
    q = torch.ones(3, 1, 1, device=device)
    k = torch.tensor([0.0, 1.0, 2.0], device=device)[:, None, None]
    v = torch.eye(3, device=device)[:, None]
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=device)
    bias = torch.tensor(weights, device=device).log()
    out = varlen_attention(q, k, v, offsets, 3, scale=1.0, key_bias=bias)
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([want] * 3), rtol=0, atol=1e-6)


def test_what_of_the_matrix_matters() -> None:
    # 6
    method = build("lifevit", depth=DEPTH).method
    x = torch.randn(BATCH, NUM_TOKENS, 32)

    def lives(change: Any) -> Tensor:
        other = copy.deepcopy(method)
        other.weight.data = change(method.weight.data)
        return other.lives(x).detach()

    want = method.lives(x).detach()
    for change in (lambda w: 7 * w, lambda w: 0.01 * w, lambda w: w + 3, lambda w: w - 0.5):
        torch.testing.assert_close(lives(change), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(lives(lambda w: -w), 2 * (4 + 8 * method.mean) - want, rtol=0, atol=1e-4)


@MODES
def test_sets_are_nested_and_hold_the_class_token(mode: str, backend: str, device: str) -> None:
    # 7 and the second half of 13
    model = build("lifevit", depth=DEPTH, mode=mode, device=device)
    with torch.inference_mode():
        _, trace = model(make_images(BATCH, device=device), return_trace=True)
    for image in range(BATCH):
        sets = [set(trace.kept(block, image).tolist()) for block in range(DEPTH)]
        assert all(later <= earlier for earlier, later in pairwise(sets))
        assert all(0 in each for each in sets)
        assert len(sets[-1]) < len(sets[0])
    assert bool((trace.tokens_per_block.diff(dim=0) <= 0).all())


def test_one_selection_serves_all_stages(backend: str, device: str) -> None:
    # 7: the list stands in the order of lives, class token first; a later stage is its head, which no one copies
    model, images = build("lifevit", depth=DEPTH, device=device), make_images(BATCH, device=device)
    with torch.inference_mode(), OpCounter() as counter:
        model(images)
    assert counter.calls["mtvit_ops::token_select"] == 1
    assert not {name for name in counter.calls if "sort" in name or "topk" in name}
    result = run_blocks(model, images)
    first_rows = torch.arange(BATCH, device=device)[:, None] * NUM_TOKENS
    order = result.trace.extras["lives"].argsort(dim=1, descending=True, stable=True) + 1
    order = torch.cat((torch.zeros_like(order[:, :1]), order), dim=1)
    for block in range(BASE, DEPTH):
        slots = result.outputs[block].rows.reshape(BATCH, -1) - first_rows
        assert_equal("slots", slots.long(), order[:, : slots.shape[1]])


def test_selection_is_a_run_with_zero_weights(backend: str, device: str) -> None:
    # 8, from its own parts: the whole sequence through every block, dropped keys behind a bias
    model, images = build("lifevit", depth=DEPTH, device=device), make_images(BATCH, device=device)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        tokens = model.embed(images)
        for index, block in enumerate(model.blocks):
            bias = torch.full((BATCH, NUM_TOKENS), -math.inf, device=device)
            for image in range(BATCH):
                bias[image, trace.kept(index, image)] = 0
            tokens = block.feed_forward(block.attend(tokens, key_bias=bias.reshape(-1))[0])
        masked = model.head(model.norm(tokens.x.reshape(BATCH, NUM_TOKENS, -1)[:, 0]))
    assert_rounding(logits, masked, DEPTH)


@MODES
def test_full_budgets_give_every_patch_the_whole_depth(mode: str, backend: str, device: str) -> None:
    # 9 and correction 2: a deviation of 0; the logits are held to the dense model's in test_every_method.py
    model = build("lifevit", depth=DEPTH, keep_ratio=1.0, mode=mode, device=device)
    assert (model.method.mean, model.method.std) == (1.0, 0.0)
    images = make_images(BATCH, device=device)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        dense = model.with_method(create_method("vit"))(images)
    assert bool((trace.extras["lives"] == 12).all())
    assert bool((trace.tokens_per_block == NUM_TOKENS).all())
    assert_rounding(logits, dense, DEPTH)


def test_a_patch_lives_while_its_life_exceeds_the_block(backend: str, device: str) -> None:
    # 13
    model = build("lifevit", depth=DEPTH, mode="threshold", device=device)
    with torch.inference_mode():
        _, trace = model(make_images(BATCH, device=device), return_trace=True)
    lives = trace.extras["lives"]
    for block in range(DEPTH):
        for image in range(BATCH):
            alive = lives[image] > block if block >= BASE else torch.ones_like(lives[image], dtype=torch.bool)
            want = torch.cat((alive.new_ones(1), alive)).nonzero()[:, 0]
            assert_equal("kept", trace.kept(block, image), want)
    assert len(set(trace.tokens_per_block[-1].tolist())) > 1


def test_gaussian_scores_in_threshold_mode() -> None:
    # 13: patches with a life beyond block 4 ... 11, expected from Gaussian scores
    table = (177.5, 165.5, 149.4, 129.5, 107.0, 83.7, 61.6, 42.5)
    method = build("lifevit", img_size=224, depth=DEPTH, embed_dim=256).method
    lives = method.lives(torch.randn(200, 197, 256))
    for block, expected in zip(range(4, 12), table, strict=True):
        formula = 196 * NormalDist().cdf((method.mean - (block - 4) / 8) / method.std)
        assert formula == pytest.approx(expected, abs=0.1)
        counts = (lives > block).sum(dim=1).double()
        # four standard errors of the mean, and 0.5 for scores that are sums of 256 terms and no true Gaussian
        assert counts.mean().item() == pytest.approx(expected, abs=4 * counts.std().item() / len(counts) ** 0.5 + 0.5)


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "small"])
def test_tokens_are_normed_with_an_eps_of_1e_5(size: float) -> None:
    # correction 3: visible with small activations only
    method, x = build("lifevit", depth=DEPTH).method, size * torch.randn(BATCH, NUM_TOKENS, 32)
    x[:, 1::2] *= 0.1  # with one size for all, eps would scale all scores alike

    def by_hand(tokens: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        centred = tokens - tokens.mean(dim=2, keepdim=True)
        normed = centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()
        scores = torch.einsum("bnd,de,be->bn", normed[:, 1:], weight, normed[:, 0])
        std, mean = torch.std_mean(scores, dim=1, keepdim=True)
        return 4 + 8 * ((scores - mean) / (std + 1e-8) * method.std + method.mean)

    weight = method.weight.detach()
    truth = by_hand(x.double(), weight.double())
    assert_close_to_float64("lives", method.lives(x).detach(), truth, by_hand(x, weight))
    other = (by_hand(x.double(), weight.double(), 1e-6) - truth).abs().max()
    assert (other > 1e-2) == (size < 1)


def test_equal_lives_keep_the_first_patches(backend: str, device: str) -> None:
    model = build("lifevit", depth=DEPTH, device=device)
    with torch.no_grad():
        model.method.weight.zero_()
    with torch.inference_mode():
        _, trace = model(make_images(2, device=device), return_trace=True)
    budget = model.method.budgets[-1]
    assert trace.kept(DEPTH - 1, 1).tolist() == list(range(budget))


@MODES
def test_permuted_patches_permute_the_lives(mode: str, backend: str, device: str) -> None:
    model, images = build("lifevit", depth=DEPTH, mode=mode, device=device), make_images(BATCH, device=device)
    order = torch.randperm(PATCHES).to(device)
    twin, moved = permute_patches(model, images, order)
    with torch.inference_mode():
        logits, trace = model(images, return_trace=True)
        moved_logits, moved_trace = twin(moved, return_trace=True)
    assert_rounding(moved_logits, logits, DEPTH)
    # a standardised score adds a few roundings of sums over the width and over the patches
    torch.testing.assert_close(moved_trace.extras["lives"], trace.extras["lives"][:, order], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "base_block", "budgets", "counts"),
    [
        (12, 4, (17, 9, 3), [17] * 7 + [9] * 3 + [3] * 2),  # the first stage drops nothing: no order stands yet
        (12, 4, (9, 9, 9), [17] * 4 + [9] * 8),
        (12, 9, (9, 5, 2), [17] * 9 + [9, 5, 2]),
        (6, 4, (9, 5), [17] * 4 + [9, 5]),  # two blocks have two stages
        (6, 5, (4,), [17] * 5 + [4]),
    ],
)
def test_stages(depth: int, base_block: int, budgets: Any, counts: list[int], backend: str, device: str) -> None:
    model = build("lifevit", depth=depth, base_block=base_block, budgets=budgets, device=device)
    with torch.inference_mode():
        _, trace = model(make_images(2, device=device), return_trace=True)
    assert trace.tokens_per_block[:, 1].tolist() == counts


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keep_ratio": 0.0}, ValueError, "keep_ratio"),
        ({"keep_ratio": 1.5}, ValueError, "keep_ratio"),
        ({"budgets": 9}, TypeError, "budgets must be a tuple, got int"),
        ({"budgets": (9, 10, 3)}, ValueError, "budgets must not rise"),
        ({"budgets": (9, 5, 0)}, ValueError, "budgets must be >= 1, got 0"),
        ({"budgets": (9.0, 5, 2)}, TypeError, "budgets must be an int, got float"),
        ({"budgets": (18, 9, 3)}, ValueError, "budgets must be at most the 17 tokens of an image, got 18"),
        ({"budgets": (9, 5)}, ValueError, "budgets must have one entry for each of the 3 stages"),
        ({"base_block": 0}, ValueError, "base_block must be >= 1, got 0"),
        ({"base_block": 6}, ValueError, "base_block must be below the depth 6, got 6"),
        ({"mode": "soft"}, ValueError, "mode must be one of 'budget', 'threshold', got 'soft'"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)
def test_bad_configuration(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = build("vit")
    with pytest.raises(error, match=match):
        model.with_method(Life(LifeConfig(**({"base_block": 3} | options))))
