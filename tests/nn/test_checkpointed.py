"""Blocks that are computed again for the gradient: nothing changes but memory."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from loss_cases import gradients
from model_cases import ALL, assert_rounding, build_case, make_images

from mtvit_ops.nn import checkpointed_twin, masked_twin
from mtvit_ops.testing import assert_equal

BATCH = 4


@pytest.mark.parametrize("name", ALL)
def test_equals_the_model(name: str, backend: str, device: str) -> None:
    model, images = build_case(name, device=device), make_images(BATCH, device=device)
    twin = checkpointed_twin(model)
    assert [value.data_ptr() for value in twin.parameters()] == [value.data_ptr() for value in model.parameters()]
    (logits, trace), (want, wanted_trace) = (each(images, return_trace=True) for each in (twin, model))
    assert_equal("tokens per block", trace.tokens_per_block, wanted_trace.tokens_per_block)
    # the norm behind the attention is another kernel where it does not come with the residual
    assert_rounding(logits.detach(), want.detach())
    wanted = gradients(model, want.square().sum())
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in gradients(model, logits.square().sum()).items():
        assert_rounding(grad / largest, wanted[key] / largest)
    with torch.inference_mode():
        assert_equal("inference", twin(images), model(images))


@pytest.mark.parametrize("scores", [None, "class", "mean"])
def test_a_half_takes_what_a_block_takes(scores: Literal["class", "mean"] | None) -> None:
    model = build_case("vit")
    twin = checkpointed_twin(model)
    found = []
    for block in (model.blocks[0], twin.blocks[0]):
        tokens = model.embed(make_images(BATCH))
        bias = torch.linspace(-2, 2, len(tokens.x)).requires_grad_()
        attended = block.attend(tokens, key_bias=bias, scores=scores)
        found.append((attended, *torch.autograd.grad(attended.tokens.x.square().sum(), bias)))
    (attended, grad), (want, wanted) = found
    assert_equal("tokens", attended.tokens.x, want.tokens.x)
    assert_equal("gradient of the key bias", grad, wanted)
    assert bool((grad != 0).all())
    assert (attended.scores is None) == (scores is None)
    if scores is not None:
        assert_equal("scores", attended.scores, want.scores)


@pytest.mark.parametrize("name", ALL)
def test_keeps_less(name: str) -> None:
    # so deep that the blocks outweigh the embedding
    model, images = build_case(name, depth=12), make_images(BATCH)
    kept = []
    for each in (checkpointed_twin(model), model, checkpointed_twin(masked_twin(model)), masked_twin(model)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1], lambda x: x
        ):
            each(images)
        kept.append(sum(sizes))
    assert kept[0] < kept[1] / 2
    assert kept[2] < kept[3] / 2
