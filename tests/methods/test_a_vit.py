"""A-ViT's numeric invariants, A1 to A13 of its specification; A6 and A12 are in test_every_method.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import NUM_TOKENS, TINY, assert_rounding, build, build_case, make_images, permute_patches, run_blocks

from mtvit_ops import RaggedTokens, VisionTransformer
from mtvit_ops.methods import AViTConfig
from mtvit_ops.testing import assert_equal

BATCH, DEPTH = 5, TINY["depth"]


def constant_score(score: float) -> dict[str, float]:
    """A gate that gives every token the same score in every block."""
    return {"gate_scale": 0.0, "gate_center": -math.log(score / (1 - score))}


def traced(model: VisionTransformer, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    with torch.inference_mode():
        return model(images, return_trace=True)


def test_counters_add_up_to_the_tokens_alive(backend: str, device: str) -> None:
    # A1
    _, trace = traced(build_case("avit", device=device), make_images(BATCH, device=device))
    counters, alive = trace.extras["counters"], trace.tokens_per_block
    assert counters.shape == (BATCH, NUM_TOKENS)
    assert int(counters.min()) >= 1
    assert int(counters.max()) <= DEPTH
    assert alive[0].tolist() == [NUM_TOKENS] * BATCH
    assert bool((alive.diff(dim=0) <= 0).all())
    assert_equal("sum over blocks", alive.sum(dim=0), counters.sum(dim=1))
    for block in range(DEPTH):
        for image in range(BATCH):
            assert_equal("kept", trace.kept(block, image), (counters[image] > block).nonzero()[:, 0])


def test_a_tokens_weights_sum_to_one(backend: str, device: str) -> None:
    # A2: the scores before the block it halts in, and the remainder
    _, trace = traced(build_case("avit", device=device), make_images(BATCH, device=device))
    counters, scores = trace.extras["counters"], trace.extras["halting_scores"]
    before = torch.arange(1, DEPTH + 1, device=device)[:, None, None] < counters
    remainder = trace.extras["ponder"] - counters
    spent = (scores * before).sum(dim=0)
    assert bool((spent < 1).all())
    # the specification's 1e-6, and what adding a remainder to a counter of at most 6 rounds away
    torch.testing.assert_close(spent + remainder, torch.ones_like(spent), rtol=0, atol=1e-6 + 6 * 2**-24)


def test_ponder_is_the_counter_and_the_remainder(backend: str, device: str) -> None:
    # A3
    _, trace = traced(build_case("avit", device=device), make_images(BATCH, device=device))
    counters, ponder = trace.extras["counters"], trace.extras["ponder"]
    assert bool((ponder > counters).all())
    assert bool((ponder <= counters + 1).all())


def test_a_gate_at_infinity_never_halts(backend: str, device: str) -> None:
    # A3; that the logits are the dense model's is in test_every_method.py
    _, trace = traced(build("avit", gate_center=1e9, depth=12, device=device), make_images(2, device=device))
    assert bool((trace.extras["counters"] == 12).all())
    assert bool((trace.extras["ponder"] == 13).all())
    assert float(5e-4 * trace.extras["ponder"].mean()) == pytest.approx(0.0065)


def test_a_gate_at_minus_infinity_halts_at_once(backend: str, device: str) -> None:
    # A3
    model, images = build("avit", gate_center=-1e9, device=device), make_images(BATCH, device=device)
    logits, trace = traced(model, images)
    assert bool((trace.extras["counters"] == 1).all())
    assert bool((trace.extras["ponder"] == 2).all())
    with torch.inference_mode():
        first = model.blocks[0](model.embed(images)).x.reshape(BATCH, NUM_TOKENS, -1)
        assert_rounding(logits, model.head(model.norm(first[:, 0])))


# A4: sums of .3 pass .99 with the fourth; .995 alone does
CONSTANT = {0.3: (4, (0.3, 0.3, 0.3, 0.1), 4.1), 0.5: (2, (0.5, 0.5), 2.5), 0.995: (1, (1.0,), 2.0)}


@pytest.mark.parametrize("score", CONSTANT)
def test_constant_scores(score: float, backend: str, device: str) -> None:
    counter, weights, ponder = CONSTANT[score]
    model, images = build("avit", **constant_score(score), device=device), make_images(BATCH, device=device)
    result = run_blocks(model, images)
    assert bool((result.trace.extras["counters"] == counter).all())
    torch.testing.assert_close(
        result.trace.extras["ponder"], torch.full((BATCH, NUM_TOKENS), ponder, device=device), rtol=1e-6, atol=0
    )
    assert result.trace.tokens_per_block[:, 0].tolist() == [NUM_TOKENS] * counter + [0] * (DEPTH - counter)
    outputs = torch.stack([tokens.x.reshape(BATCH, NUM_TOKENS, -1)[:, 0] for tokens in result.outputs])
    mean = (outputs[:counter] * outputs.new_tensor(weights)[:, None, None]).sum(dim=0)
    with torch.inference_mode():
        assert_rounding(result.logits, model.head(model.norm(mean)))


def test_scores_are_the_gate_on_channel_0(backend: str, device: str) -> None:
    model, images = build("avit", gate_scale=1.5, gate_center=2.0, device=device), make_images(BATCH, device=device)
    result = run_blocks(model, images)
    for block, tokens in enumerate(result.outputs):
        gate = torch.sigmoid(1.5 * tokens.x[:, 0].reshape(BATCH, NUM_TOKENS) - 2.0)
        alive = result.trace.extras["counters"] > block
        assert_rounding(result.trace.extras["halting_scores"][block], gate * alive)


@pytest.mark.parametrize("name", ["avit", "avit-stop_with_class"])
def test_permuted_patches_permute_the_counters(name: str, backend: str, device: str) -> None:
    # A7
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    order = torch.randperm(NUM_TOKENS - 1).to(device)
    logits, trace = traced(model, images)
    moved, moved_trace = traced(*permute_patches(model, images, order))
    assert_rounding(moved, logits)

    def permuted(key: str) -> torch.Tensor:
        value = trace.extras[key]
        return torch.cat((value[:, :1], value[:, 1:][:, order]), dim=1)

    assert_equal("counters", moved_trace.extras["counters"], permuted("counters"))
    assert_rounding(moved_trace.extras["ponder"], permuted("ponder"))


def test_what_halted_tokens_hold_does_not_matter(backend: str, device: str) -> None:
    # A8
    model, images = build_case("avit", device=device), make_images(BATCH, device=device)
    logits, trace = traced(model, images)
    original, overwritten = model.method.before_block, []

    def before_block(index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        if tokens.rows is not None:
            dead = torch.ones(len(tokens.x), dtype=torch.bool, device=device).index_fill(0, tokens.rows.long(), False)
            tokens.x[dead] = 1e3 * torch.randn_like(tokens.x[dead])
            overwritten.append(int(dead.sum()))
        return original(index, tokens, state)

    model.method.before_block = before_block  # type: ignore[method-assign]
    junk_logits, junk_trace = traced(model, images)
    assert max(overwritten) > 0
    assert_equal("logits", junk_logits, logits)
    for key in ("counters", "ponder"):
        assert_equal(key, junk_trace.extras[key], trace.extras[key])


def test_nothing_is_added_to_the_backbone() -> None:
    # A9
    assert list(build("avit").state_dict()) == list(build("vit").state_dict())


def test_stopping_with_the_class_token_changes_no_logit(backend: str, device: str) -> None:
    # A13
    images = make_images(BATCH, device=device)
    logits, trace = traced(build_case("avit", device=device), images)
    stopped_logits, stopped = traced(build_case("avit-stop_with_class", device=device), images)
    assert_rounding(stopped_logits, logits)
    lived = trace.extras["counters"][:, 0]
    assert bool((lived < DEPTH).any()), "no class token halts early: this would show nothing"
    alive = torch.arange(DEPTH, device=device)[:, None] < lived
    assert_equal("counts", stopped.tokens_per_block, trace.tokens_per_block * alive)
    assert_equal("counters", stopped.extras["counters"], trace.extras["counters"].minimum(1 + lived[:, None]))
    assert int(stopped.tokens_per_block.sum()) < int(trace.tokens_per_block.sum())


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("eps", 0.0, ValueError),
        ("eps", 1.5, ValueError),
        ("eps", "0.1", TypeError),
        ("gate_scale", math.nan, ValueError),
        ("gate_center", math.inf, ValueError),
        ("gate_center", None, TypeError),
    ],
)
def test_bad_configuration(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        AViTConfig(**{field: value})
