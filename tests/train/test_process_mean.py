"""Several processes with a share of the batch each learn what one learns from the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import gradients
from model_cases import assert_rounding
from process_cases import CASES, WORLD, problem, run_all

from mtvit_ops.testing import assert_equal, max_error
from mtvit_ops.train import compute_loss
from mtvit_ops.train._process_mean import process_mean
from mtvit_ops.train.a_vit import divergence, masked_pass

STATISTICS = {"avit": ["distribution"], "mtvit": ["flops", "entropy"]}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by case."""
    found = run_all(tmp_path_factory.mktemp("processes"))
    assert all(set(each) == set(CASES) for each in found)
    return found


@pytest.mark.parametrize("name", ["avit-intended", "mtvit-dense", "mtvit-sparse"])
def test_two_processes_are_one(name: str, steps: list[dict[str, Any]]) -> None:
    model, images, target, weights = problem(name)
    loss, terms = compute_loss(model, images, target, **weights)
    found = [each[name] for each in steps]
    assert_rounding(torch.stack([each["loss"] for each in found]).mean(), loss.detach())
    for term in STATISTICS[name.split("-")[0]]:
        assert_equal(term, found[0]["terms"][term], found[1]["terms"][term])
        assert_rounding(found[0]["terms"][term], terms[term].detach())
        # the shares' own would be others
        parts = zip(images.chunk(WORLD), target.chunk(WORLD))
        own = [compute_loss(model, *part, **weights)[1][term].detach() for part in parts]
        assert max_error(sum(own) / WORLD, terms[term].detach()) > 1e-3 * float(terms[term].detach().abs())
    wanted = gradients(model, loss)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for each in found:
        assert set(each["grads"]) == {key for key, grad in wanted.items() if bool((grad != 0).any())}
        for key, grad in each["grads"].items():
            assert max_error(grad, wanted[key]) <= 1e-12 * largest, key


def test_each_process_leaves_its_first_image_out(steps: list[dict[str, Any]]) -> None:
    model, images, *_ = problem("avit-official")
    scores = masked_pass(model, images).scores
    kept = torch.cat([share[:, 1:] for share in scores.chunk(WORLD, dim=1)], dim=1)
    want = divergence(kept.mean(dim=(1, 2)), 4)  # two thirds of six layers
    for each in steps:
        assert_rounding(each["avit-official"]["terms"]["distribution"], want.detach())


def test_alone_it_is_the_value_itself() -> None:
    value = torch.ones(3, requires_grad=True)
    assert process_mean(value) is value
