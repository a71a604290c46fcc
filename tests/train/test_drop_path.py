"""Drop-path in every method's training: against hooks on plain blocks, under checkpointing, and by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drop_path_cases import TRAINED, drop_by_hooks, scripted_draws
from loss_cases import gradients, make_target, saved_bytes
from model_cases import NUM_TOKENS, assert_rounding, build, in_float64, make_images
from torch import Tensor
from train_cases import make_data, make_recipe, same_bits

from mtvit_ops.nn import VisionTransformer, checkpointed_twin, drop_path_twin, masked_twin
from mtvit_ops.testing import assert_equal
from mtvit_ops.train import compute_loss, fit
from mtvit_ops.train.fit import train
from mtvit_ops.train.state import load_state

BATCH, RATE = 5, 0.5
EVERY = pytest.mark.parametrize("name", TRAINED)


def trained(name: str) -> VisionTransformer:
    method, options, _ = TRAINED[name]
    return build(method, **options).train()


def run(
    name: str, model: VisionTransformer, twin: VisionTransformer, script: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step, with scripted draws of drop-path or with drawn ones."""
    images, target = make_images(BATCH).to(model.cls_token), make_target(BATCH)
    torch.manual_seed(8)
    if script is None:
        loss, _ = compute_loss(twin, images, target, **TRAINED[name][2])
    else:
        with scripted_draws(script):
            loss, _ = compute_loss(twin, images, target, **TRAINED[name][2])
    return loss.detach(), gradients(model, loss)


@EVERY
def test_equals_hooks_on_masked_blocks(name: str) -> None:
    """In float64, where nothing is removed and every image has all of its rows (MT-ViT's those of its tails)."""
    model = in_float64(trained(name))
    plain = drop_by_hooks(in_float64(trained(name)), RATE)
    got, grads = run(name, model, drop_path_twin(model, RATE), script=4)
    want, wanted = run(name, plain, masked_twin(plain), script=4)
    assert_rounding(got, want)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in grads.items():
        assert_rounding(grad / largest, wanted[key] / largest)
    assert (got - run(name, model, model)[0]).abs() > 1e-6  # it is no small thing that is equal


@pytest.mark.parametrize("name", ["avit-removed", "evovit-stage", "lifevit-2", "lifevit-2-threshold"])
def test_the_lists_are_ragged(name: str) -> None:
    model = in_float64(trained(name))
    with scripted_draws(4):
        _, trace = drop_path_twin(model, RATE)(make_images(BATCH).double(), return_trace=True)
    assert int(trace.tokens_per_block[-1].max()) < NUM_TOKENS
    if name in ("avit-removed", "lifevit-2-threshold"):
        assert len(trace.tokens_per_block[-2].unique()) > 1


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@EVERY
def test_checkpointing_draws_once(name: str, autocast: bool) -> None:
    model = trained(name)
    twins = (
        drop_path_twin(model, RATE),
        checkpointed_twin(drop_path_twin(model, RATE)),
        drop_path_twin(checkpointed_twin(model), RATE),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (want, wanted), *others = [run(name, model, twin) for twin in twins]
    for loss, grads in others:
        assert_equal("loss", loss, want)
        for key, grad in grads.items():
            assert_equal(key, grad, wanted[key])
    images, target, weights = make_images(BATCH), make_target(BATCH), TRAINED[name][2]
    kept = [saved_bytes(twin, images, target, **weights) for twin in (*twins, model)]
    assert max(kept[1:3]) < kept[0] / 2
    # a factor a token and a half, and the draws: what is multiplied with them is not kept
    tokens = 3 * NUM_TOKENS if name.startswith("mtvit") else NUM_TOKENS
    assert kept[0] <= kept[3] + model.config.depth * 2 * 4 * BATCH * (tokens + 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def state_of(out: Path) -> dict[str, Any]:
    return load_state(out / "state.pt")._replace(seconds=0.0, recipe={})._asdict()


def test_a_recipe_without_it_takes_no_part_in_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe({"optimiser.epochs": 1, "mix": {}})
    train(recipe, data, tmp_path / "plain", device="cpu")
    rates = []
    monkeypatch.setattr(fit, "drop_path_twin", lambda model, rate: (rates.append(rate), drop_path_twin(model, rate))[1])
    train(
        make_recipe({"optimiser.epochs": 1, "mix": {}, "regularise.drop_path": 0}), data, tmp_path / "0", device="cpu"
    )
    assert rates == []
    train(
        make_recipe({"optimiser.epochs": 1, "mix": {}, "regularise.drop_path": 0.4}), data, tmp_path / "4", device="cpu"
    )
    assert rates == [0.4]
    assert same_bits(state_of(tmp_path / "plain"), state_of(tmp_path / "0"))
    assert not same_bits(state_of(tmp_path / "plain")["model"], state_of(tmp_path / "4")["model"])


def test_it_is_no_part_of_the_file(data: Path, tmp_path: Path) -> None:
    """What is evaluated and saved is the model without it, under the same names."""
    result = train(
        make_recipe({"optimiser.epochs": 1, "regularise.drop_path": 0.4, "run.checkpointing": True}),
        data,
        tmp_path / "run",
        device="cpu",
    )
    assert {type(block).__name__ for block in result.model.blocks} == {"Block"}
    assert not any("block." in name for name in result.model.state_dict())
