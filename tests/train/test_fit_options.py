"""What a training may begin with, the modes that it runs in, and what it leaves behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import A_VIT, CLASSES, DENSE, MICRO, StopsAt, make_data, make_recipe, records, same_bits

from mtvit_ops import create_model
from mtvit_ops.progress import Progress
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.state import TrainError, load_state
from mtvit_ops.weights import ModelInfo, load_model, save_model

ONE_EPOCH = {"optimiser.epochs": 1, "run.save_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def state_of(out: Path) -> dict[str, Any]:
    return load_state(out / "state.pt")._replace(seconds=0.0, recipe={})._asdict()


def test_global_generators_stay_and_do_not_matter(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe({**ONE_EPOCH, "augment.auto_augment": "rand-m9-mstd0.5-inc1", "augment.reprob": 0.5})
    for number in range(2):
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        train(recipe, data, tmp_path / str(number), device="cpu")
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]
    assert same_bits(state_of(tmp_path / "0"), state_of(tmp_path / "1"))
    train(make_recipe({**ONE_EPOCH, "run.seed": 1}), data, tmp_path / "seed", device="cpu")
    assert not same_bits(state_of(tmp_path / "0")["model"], state_of(tmp_path / "seed")["model"])


def test_precision_is_each_run_s_own(data: Path, tmp_path: Path) -> None:
    for name, precision in (("a", "float32"), ("b", "bfloat16"), ("c", "float32"), ("d", "bfloat16")):
        train(make_recipe({**ONE_EPOCH, "run.precision": precision}), data, tmp_path / name, device="cpu")
    states = {name: state_of(tmp_path / name) for name in "abcd"}
    assert same_bits(states["a"], states["c"])
    assert same_bits(states["b"], states["d"])
    assert not same_bits(states["a"]["model"], states["b"]["model"])
    assert all(value.dtype == torch.float32 for value in states["b"]["model"].values())
    # one epoch of six small steps: within bfloat16's 8 bits of the loss
    losses = [records(tmp_path / name, "train")[0]["loss"] for name in "ab"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2**-6)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("model", [DENSE, A_VIT], ids=["dense", "avit"])
def test_checkpointing_changes_no_bit(model: dict[str, Any], drop_path: float, data: Path, tmp_path: Path) -> None:
    for on in (False, True):
        changes = {"model": model, "run.checkpointing": on, "regularise.drop_path": drop_path}
        recipe = make_recipe({**ONE_EPOCH, **changes})
        train(recipe, data, tmp_path / str(on), device="cpu")
    assert same_bits(state_of(tmp_path / "True"), state_of(tmp_path / "False"))


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": ({}, {}),
    "avit": ({"gate_scale": 4.0, "gate_center": 0.0}, {}),
    # in another mode than it was made in until the end, and the same after the change
    "evovit-layer": ({"class_head": True, "keep_ratios": 0.5}, {"plan.stage_from": 1.0}),
    "evovit-stage": ({"class_head": True, "keep_ratios": 0.5, "mode": "layer"}, {"plan.stage_from": 0.5}),
    "evovit-drop_path": (
        {"class_head": True, "keep_ratios": 0.5},
        {"plan.stage_from": 0.5, "regularise.drop_path": 0.4, "augment.repeats": 2},
    ),
    "avit-drop_path": (
        {"gate_scale": 4.0, "gate_center": 0.0},
        {"regularise.drop_path": 0.4, "augment.repeats": 3, "run.precision": "bfloat16"},
    ),
    "lifevit-2-drop_path": (
        {"base_block": 1},
        {"loss.stage": 2, "regularise.drop_path": 0.4, "run.checkpointing": True},
    ),
    "lifevit-1": ({"base_block": 1}, {"loss.stage": 1}),
    "lifevit-2": ({"base_block": 1}, {"loss.stage": 2}),
    "mtvit": ({"predictor_size": 16}, {"plan.temperature": [5.0, 0.5], "loss.cost_target": 0.9}),
    "mtvit-sparse": (
        {"predictor_size": 16},
        {"loss.mode": "sparse", "loss.cost_target": 0.9, "plan.predictor_only": 0.5},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_and_its_file_scores_as_it_did(method: str, data: Path, tmp_path: Path) -> None:
    model, changes = METHODS[method]
    name = f"{method.partition('-')[0]}_tiny_patch16_224"
    changes = {**changes, "model": {"name": name, **MICRO, "depth": 3, **model}, "run.save_steps": 0}
    recipe = make_recipe(changes)
    result = train(recipe, data, tmp_path / "whole", device="cpu")
    for stop in (2, 8):
        with pytest.raises(StoppedError):
            train(recipe, data, tmp_path / "parts", resume=True, device="cpu", progress=StopsAt(stop))
    train(recipe, data, tmp_path / "parts", resume=True, device="cpu")
    assert same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    for kind in ("train", "evaluate"):
        assert records(tmp_path / "parts", kind) == records(tmp_path / "whole", kind)
    told = records(tmp_path / "whole", "evaluate")[-1]
    options = {"batch_size": 4, "workers": 0, "precision": recipe.run.precision, "device": "cpu"}
    found = evaluate(tmp_path / "whole" / "last.safetensors", data, **options)
    assert found._asdict() == {key: told[key] for key in found._fields} == result.score._asdict()
    # the returned model is the file's
    loaded, info = load_model(tmp_path / "whole" / "last.safetensors")
    assert same_bits(dict(loaded.state_dict()), dict(result.model.state_dict()))
    assert loaded.method.config == result.model.method.config
    assert info.classes == CLASSES
    assert info.facts["recipe"] == recipe.to_dict()
    assert not result.model.training


def test_a_state_from_before_an_option_goes_on(data: Path, tmp_path: Path) -> None:
    train(make_recipe(), data, tmp_path / "whole", device="cpu")
    with pytest.raises(StoppedError):
        train(make_recipe(), data, tmp_path / "parts", device="cpu", progress=StopsAt(4))
    path = tmp_path / "parts" / "state.pt"
    content = torch.load(path, weights_only=True)
    # as it was written by a version that had neither
    del content["recipe"]["regularise"], content["recipe"]["augment"]["repeats"]
    torch.save(content, path)
    for place, value, was in (("regularise.drop_path", 0.1, 0.0), ("augment.repeats", 3, 1)):
        with pytest.raises(TrainError, match=f"is of another recipe: {place} was {was} and is {value}"):
            train(make_recipe({place: value}), data, tmp_path / "parts", resume=True, device="cpu")
    train(make_recipe(), data, tmp_path / "parts", resume=True, device="cpu")
    assert same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    content["recipe"]["augment"]["blur"] = 1.0  # and by one that has more
    torch.save(content, path)
    with pytest.raises(TrainError, match=r"is of another recipe: augment.blur was 1.0 and is None"):
        train(make_recipe(), data, tmp_path / "parts", resume=True, device="cpu")


def test_what_changes_no_result_may_change_in_between(data: Path, tmp_path: Path) -> None:
    train(make_recipe(), data, tmp_path / "whole", device="cpu")
    with pytest.raises(StoppedError):
        train(make_recipe(), data, tmp_path / "parts", device="cpu", progress=StopsAt(3))
    changes = {"title": "other", "data.workers": 1, "run.log_steps": 5, "run.save_steps": 0}
    train(make_recipe(changes), data, tmp_path / "parts", resume=True, device="cpu")
    assert same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert load_state(tmp_path / "parts" / "state.pt").recipe == make_recipe(changes).to_dict()
    found, wanted = (load_model(tmp_path / run / "best.safetensors") for run in ("parts", "whole"))
    assert same_bits(dict(found.model.state_dict()), dict(wanted.model.state_dict()))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_a_file_is_scored_through_the_crop_that_it_was_trained_with(
    interpolation: str, data: Path, tmp_path: Path
) -> None:
    changes = {**ONE_EPOCH, "augment.interpolation": interpolation, "augment.crop_pct": 0.6}
    result = train(make_recipe(changes), data, tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "last.safetensors"
    assert evaluate(path, data, batch_size=4, workers=0, device="cpu") == result.score
    info = load_model(path).info
    assert info.interpolation == ("bicubic" if interpolation == "random" else interpolation)
    (tmp_path / "other").mkdir()
    other = info._replace(interpolation="bicubic" if interpolation == "bilinear" else "bilinear")
    save_model(tmp_path / "other" / "w.safetensors", result.model.state_dict(), other)
    assert evaluate(tmp_path / "other" / "w.safetensors", data, batch_size=4, workers=0, device="cpu") != result.score


def start_file(path: Path, classes: int, method: str = "vit", **more: Any) -> Path:
    options = {"name": f"{method}_tiny_patch16_224", **MICRO, "num_classes": classes, **more}
    torch.manual_seed(9)
    model = create_model(**options)
    torch.nn.init.normal_(model.head.weight)
    names = tuple(str(index) for index in range(classes))
    save_model(path, model.state_dict(), ModelInfo(options, names, 0.9, {}))
    return path


def test_fine_tuning(data: Path, tmp_path: Path) -> None:
    """A learning rate that moves nothing shows what a run began with."""
    recipe = make_recipe({**ONE_EPOCH, "optimiser.lr": 1e-30, "optimiser.schedule": "constant"})
    three = start_file(tmp_path / "three.safetensors", 3)
    with pytest.raises(ValueError, match=r"mis-shaped head.weight, expected \(2, 16\), got \(3, 16\)"):
        train(recipe, data, tmp_path / "refused", device="cpu", start=three)
    assert not (tmp_path / "refused").exists()
    two = start_file(tmp_path / "two.safetensors", 2)
    train(recipe, data, tmp_path / "none", device="cpu")
    drawn = load_model(tmp_path / "none" / "last.safetensors").model.state_dict()
    for start, reset in ((two, False), (two, True), (three, True)):
        out = tmp_path / f"{start.stem}-{reset}"
        train(recipe, data, out, device="cpu", start=start, reset_head=reset)
        found, given = (load_model(path).model.state_dict() for path in (out / "last.safetensors", start))
        for name, value in found.items():
            wanted = drawn if reset and name.startswith("head.") else given
            assert torch.allclose(value, wanted[name], rtol=0, atol=1e-25), name
    # what was begun with is in the state: it is not needed again, nor is it asked for
    two.unlink()
    train(recipe, data, tmp_path / "two-False", device="cpu", start=two, resume=True)


@pytest.mark.parametrize("method", ["vit", "avit", "evovit", "lifevit", "mtvit"])
def test_from_a_file_like_deit_s(method: str, data: Path, tmp_path: Path) -> None:
    """A pickled state dict under "model", of a thousand classes, for a run of two."""
    torch.manual_seed(0)
    plain = create_model("vit_tiny_patch16_224", **MICRO | {"img_size": 32, "depth": 6}).state_dict()
    plain = {name: value for name, value in plain.items() if not name.startswith("method.")}
    assert plain["head.weight"].shape[0] == 1000
    start = tmp_path / "deit_tiny-0.pth"
    torch.save({"model": plain}, start)
    model = {"name": f"{method}_tiny_patch16_224", **MICRO, "img_size": 32, "depth": 6}
    own = {"evovit": {"pool": "class"}, "lifevit": {"base_block": 2}, "mtvit": {"grids": [2, 4]}}
    loss = {"evovit": {"class_task": 0.0}, "mtvit": {"mode": "tails"}}
    frozen = {"optimiser.lr": 1e-30, "optimiser.schedule": "constant", "loss": loss.get(method, {})}
    recipe = make_recipe({**ONE_EPOCH, **frozen, "model": model | own.get(method, {})})
    train(recipe, data, tmp_path / "run", device="cpu", start=start, reset_head=True)
    found = load_model(tmp_path / "run" / "last.safetensors").model.state_dict()
    for name, value in plain.items():
        if not name.startswith("head."):
            assert torch.allclose(found[name], value, rtol=0, atol=1e-25), name
    assert found["head.weight"].shape[0] == len(CLASSES)


def test_gates_of_a_file_s_name_outlive_an_interruption(data: Path, tmp_path: Path) -> None:
    start = start_file(tmp_path / "tiny-3-1.safetensors", 2, "avit", depth=A_VIT["depth"])
    recipe = make_recipe({"model": A_VIT, "run.save_steps": 0})
    train(recipe, data, tmp_path / "whole", device="cpu", start=start)
    with pytest.raises(StoppedError):
        train(recipe, data, tmp_path / "parts", device="cpu", start=start, progress=StopsAt(3))
    train(recipe, data, tmp_path / "parts", device="cpu", resume=True)
    assert same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    config = load_model(tmp_path / "parts" / "best.safetensors").model.method.config
    assert (config.gate_scale, config.gate_center) == (3.0, 1.0)


class Listens(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [True, False])
def test_broken_images_are_named_once(cache: bool, workers: int, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (data / "train" / "ant" / "cut.png").write_bytes(b"\x89PNG")
    (data / "val" / "bee" / "text.png").write_text("no picture")
    (data / "val" / "bee" / "readme.txt").write_text("for people")
    recipe = make_recipe({"optimiser.batch_size": 2, "data.cache": cache, "data.workers": workers})
    listens = Listens()
    result = train(recipe, data, tmp_path / "run", device="cpu", progress=listens)
    assert (result.score.images, result.score.skipped) == (11, 1)
    assert [record["skipped"] for record in records(tmp_path / "run", "evaluate")] == [1, 1]
    told = [line for line in listens.said if line.startswith("not used: ")]
    for name in ("ant/cut.png", "bee/text.png", "bee/readme.txt"):
        assert name in told[-1]
    assert len(told) == len(set(told)) <= 3


def test_a_cache_that_drops_images_is_not_resumed_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    (data / "train" / "ant" / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(StoppedError):
        train(make_recipe({"data.cache": "auto"}), data, tmp_path / "run", device="cpu", progress=StopsAt(2))
    monkeypatch.setattr("mtvit_ops.train.images.available_memory", lambda: 1000)
    with pytest.raises(TrainError, match=r"24, .*; now 25, .*data.cache"):
        train(make_recipe({"data.cache": "auto"}), data, tmp_path / "run", device="cpu", resume=True)
