"""Distillation: targets softened by a trained model, in every method and however the run is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from train_cases import (
    A_VIT,
    CLASSES,
    DENSE,
    MICRO,
    RECIPE,
    StopsAt,
    assert_same_run,
    make_data,
    make_recipe,
    records,
    write_recipe,
)

from mtvit_ops import cli
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.recipe import RecipeError, TeacherOptions
from mtvit_ops.train.state import TrainError, load_state
from mtvit_ops.train.teacher import Teacher
from mtvit_ops.weights import load_model

TAUGHT = {"teacher.share": 0.6, "teacher.temperature": 2.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(make_recipe({"optimiser.epochs": 1}), data, out, device="cpu")
    return out / "last.safetensors"


def make_teacher(weights: Path, share: float, temperature: float = 1.0) -> Teacher:
    return Teacher(weights, TeacherOptions(share, temperature), CLASSES, MICRO["img_size"], torch.device("cpu"))


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_that_of_the_labels_and_the_divergence_from_the_teacher(soft: bool, weights: Path) -> None:
    share, temperature = 0.3, 2.0
    teacher = make_teacher(weights, share, temperature)
    model, _ = load_model(weights)
    torch.manual_seed(0)
    images = torch.randn(5, 3, MICRO["img_size"], MICRO["img_size"])
    targets: Tensor = torch.randint(2, (5,))
    labels = F.one_hot(targets, 2).float()
    if soft:
        targets = labels = torch.rand(5, 2).softmax(dim=1)
    mixed = teacher.soften(images, targets)
    assert mixed.dtype == torch.float32
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(5))

    logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    said = (model(images).detach().double() / temperature).softmax(dim=1)
    wanted = (1 - share) * F.cross_entropy(logits, labels.double())
    wanted = wanted + share * F.kl_div(logits.log_softmax(dim=1), said, reduction="batchmean")
    (wanted_grad,) = torch.autograd.grad(wanted, logits)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, mixed.double()), logits)
    torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=1e-6)  # the targets are float32


def test_the_ends_of_the_share(weights: Path) -> None:
    images, targets = torch.randn(3, 3, MICRO["img_size"], MICRO["img_size"]), torch.tensor([1, 0, 1])
    assert torch.equal(make_teacher(weights, 0.0).soften(images, targets), F.one_hot(targets, 2).float())
    with torch.no_grad():
        said = load_model(weights).model(images).softmax(dim=1)
    assert torch.equal(make_teacher(weights, 1.0).soften(images, targets), said)


@pytest.mark.parametrize("class_head", [False, True])
def test_an_mt_vit_teaches_what_its_dearest_tail_and_its_classifier_say(
    class_head: bool, data: Path, tmp_path: Path
) -> None:
    model = {"name": "mtvit_tiny_patch16_224", **MICRO, "grids": [1, 2], "predictor_size": 16, "class_head": class_head}
    train(
        make_recipe({"model": model, "loss.mode": "tails", "optimiser.epochs": 1}), data, tmp_path / "run", device="cpu"
    )
    weights, temperature = tmp_path / "run" / "last.safetensors", 2.0
    images, targets = torch.randn(5, 3, MICRO["img_size"], MICRO["img_size"]), torch.tensor([1, 0, 1, 1, 0])
    model, _ = load_model(weights, force_tail=1)
    with torch.no_grad():
        want = (model(images) / temperature).softmax(dim=1)
        if class_head:
            predictor = model.method.predictor
            pooled = predictor.features(F.interpolate(images, (16, 16))).mean(dim=(2, 3))
            want = (want + (predictor.head_cls(pooled) / temperature).softmax(dim=1)) / 2
    got = make_teacher(weights, 1.0, temperature).soften(images, targets)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


METHODS: dict[str, dict[str, Any]] = {
    "vit": {},
    "avit": {"model": A_VIT},
    "evovit": {"model": {"name": "evovit_tiny_patch16_224", **MICRO, "class_head": True}},
    "lifevit": {"model": {"name": "lifevit_tiny_patch16_224", **MICRO, "base_block": 1}, "loss.stage": 1},
    "mtvit": {
        "model": {"name": "mtvit_tiny_patch16_224", **MICRO, "grids": [1, 2], "predictor_size": 16},
        "loss.flops": 0.0,
    },
}


@pytest.mark.parametrize("mix", [{}, {"mix": {}}], ids=["mixed", "labels"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_teacher_and_resumes_to_the_same_bits(
    name: str, mix: dict[str, Any], weights: Path, data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe({**METHODS[name], **TAUGHT, **mix})
    train(recipe, data, tmp_path / "whole", teacher=weights, device="cpu")
    with pytest.raises(StoppedError):
        train(recipe, data, tmp_path / "parts", teacher=weights, device="cpu", progress=StopsAt(5))
    train(recipe, data, tmp_path / "parts", teacher=weights, device="cpu", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    alone = make_recipe({**METHODS[name], **mix})
    train(alone, data, tmp_path / "alone", device="cpu")
    # the first step begins with the same weights and views: only the targets differ
    tasks = [records(tmp_path / run, "train")[0]["task"] for run in ("whole", "alone")]
    assert tasks[0] != tasks[1]


def test_the_teacher_is_no_part_of_what_is_saved(weights: Path, data: Path, tmp_path: Path) -> None:
    train(make_recipe({**TAUGHT, "optimiser.epochs": 1}), data, tmp_path / "run", teacher=weights, device="cpu")
    saved = load_model(tmp_path / "run" / "last.safetensors").model.state_dict()
    assert saved.keys() == load_model(weights).model.state_dict().keys()
    assert load_state(tmp_path / "run" / "state.pt").teacher == make_teacher(weights, 0.5).digest


def test_another_teacher_is_not_gone_on_with(weights: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train(make_recipe(TAUGHT), data, tmp_path / "run", teacher=weights, device="cpu", progress=StopsAt(3))
    train(make_recipe({"run.seed": 3, "optimiser.epochs": 1}), data, tmp_path / "other", device="cpu")
    other = tmp_path / "other" / "last.safetensors"
    with pytest.raises(TrainError, match="another teacher"):
        train(make_recipe(TAUGHT), data, tmp_path / "run", teacher=other, device="cpu", resume=True)
    assert load_state(tmp_path / "run" / "state.pt").step == 3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_share_and_a_teacher_come_together(share: float, weights: Path, data: Path, tmp_path: Path) -> None:
    recipe, teacher = make_recipe({"teacher.share": share}), None if share else weights
    with pytest.raises(ValueError, match=r"teacher must be .*teacher\.share is 0"):
        train(recipe, data, tmp_path / "run", teacher=teacher, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "classes", "what"),
    [
        ({**DENSE, "img_size": 24}, CLASSES, "must see 24 pixels, as the model does, got 16"),
        (DENSE, ("ant", "wasp"), "must know the data's classes ant, wasp, got ant, bee"),
    ],
    ids=["size", "classes"],
)
def test_teachers_that_do_not_fit(
    model: dict[str, Any], classes: tuple[str, ...], what: str, weights: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data", classes=classes)
    with pytest.raises(ValueError, match=what):
        train(make_recipe({**TAUGHT, "model": model}), data, tmp_path / "run", teacher=weights, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"teacher.share": 1.5}, {"teacher.temperature": 0.0}, {"teacher.weight": 1.0}])
def test_options_that_cannot_be_meant(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="teacher"):
        make_recipe(changes)


def test_on_the_command_line(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.toml", {**RECIPE, "teacher": {"share": 0.5}})
    words = ["train", str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 2
    assert "teacher must be a file of weights" in capsys.readouterr().err
    assert cli.main([*words, "--teacher", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*words, "--teacher", str(weights)]) == 0
    assert load_model(out / "last.safetensors").info.facts["recipe"]["teacher"]["share"] == 0.5
