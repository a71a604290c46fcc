"""Two processes train as one does, to rounding; evaluation counts each image once; a signal saves first."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, ENVIRONMENT, LAUNCH, OWN_DRAWS, assert_close, launch_two, run_case
from torch.distributed.run import get_args_parser
from train_cases import CLASSES, RECIPE, STEPS, VAL_IMAGES, StopsAt, make_data, make_recipe, records, write_recipe

from mtvit_ops.cli_train import add_commands
from mtvit_ops.train.build import build_model
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.state import load_state
from mtvit_ops.weights import load_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of all cases."""
    out = tmp_path_factory.mktemp("two")
    launch_two("distributed_cases.py", data, out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, data: Path, two: Path, tmp_path: Path) -> None:
    score = run_case(name, data, tmp_path)
    for kind, count in (("train", STEPS), ("evaluate", 2)):
        found, wanted = records(two / name, kind), records(tmp_path / name, kind)
        assert len(found) == len(wanted) == count
        for one, other in zip(wanted, found):
            assert_close(one, other, one["step"])
    assert [record["images"] for record in records(two / name, "evaluate")] == [VAL_IMAGES] * 2
    for rank in range(2):
        assert_close(score, json.loads((two / f"scores-{rank}.json").read_text())[name], STEPS)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_draws_of_their_own_leave_the_processes_alike(name: str, data: Path, two: Path) -> None:
    assert len(records(two / name, "train")) == STEPS
    scores = [json.loads((two / f"scores-{rank}.json").read_text())[name] for rank in range(2)]
    assert scores[0] == scores[1]
    assert scores[0] == evaluate(two / name / "last.safetensors", data, workers=0, device="cpu")._asdict() | {
        "loss": pytest.approx(scores[0]["loss"], rel=1e-5)  # summed in another order
    }


def test_the_predictor_learns_alone_as_long_as_it_should(two: Path) -> None:
    for name in ("MT-ViT, predictor alone", "MT-ViT, predictor first"):
        recipe = make_recipe(OWN_DRAWS[name])
        torch.manual_seed(recipe.run.seed)
        begun = build_model(recipe, len(CLASSES)).state_dict()
        learned = {
            key
            for key, value in load_model(two / name / "last.safetensors").model.state_dict().items()
            if not torch.equal(value, begun[key])
        }
        others = {key for key in learned if not key.startswith("method.predictor.")}
        assert learned > others
        assert bool(others) == (name == "MT-ViT, predictor first")


def test_an_evaluation_that_one_process_was_asked_to_stop_comes_again(two: Path) -> None:
    for rank in range(2):
        assert "saved after step 6 of 12" in (two / f"said-{rank}").read_text()
    for kind in ("train", "evaluate"):
        pairs = zip(records(two / "dense, mixed", kind), records(two / "stopped in evaluation", kind), strict=True)
        for one, other in pairs:
            assert_close(one, other, one["step"])


def test_processes_with_folders_of_their_own_do_not_go_on(two: Path) -> None:
    for rank in range(2):
        said = (two / f"apart-{rank}").read_text()
        assert said.startswith("out must be one folder that all processes share, got ")
        assert "where process 0 found the state of step 12, " in said
        assert said.endswith("process 1 found no state")
    assert not (two / "elsewhere").exists()


def test_the_uneven_case_is_uneven(two: Path) -> None:
    """Images keep different numbers of tokens, so two processes' shares of a batch do."""
    model = load_model(two / "A-ViT, uneven" / "last.safetensors").model
    _, _, state = model.encode(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    alive = (state.halting.ponder.unflatten(0, (32, -1)) > 3).sum(dim=1)  # in the third block
    assert len(alive.unique()) > 1


def test_a_signal_to_the_launcher_saves_first_and_one_process_goes_on(data: Path, tmp_path: Path) -> None:
    long = make_recipe({"optimiser.epochs": 100, "run.eval_epochs": 100, "run.save_steps": 0})
    tables = {**RECIPE, "optimiser": {**RECIPE["optimiser"], "epochs": 100}}
    tables["run"] = {**RECIPE["run"], "save_steps": 0, "eval_epochs": 100}
    recipe = write_recipe(tmp_path / "recipe.toml", tables)
    out, alone = tmp_path / "run", tmp_path / "alone"
    command = [*LAUNCH, "-m", "mtvit_ops", "train", str(recipe), "--data", str(data), "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], env=ENVIRONMENT, stdout=log, stderr=log)
        path = out / "metrics.jsonl"
        while process.poll() is None and (not path.exists() or len(path.read_bytes().splitlines()) < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    said = (tmp_path / "log").read_text()
    assert said.count("asked to stop: saved after step") == 1, said
    step = load_state(out / "state.pt").step
    assert f"saved after step {step} of 600" in said
    last = StopsAt(step + 3)
    for folder in (out, alone):
        with pytest.raises(StoppedError):
            train(long, data, folder, resume=True, device="cpu", progress=last)
    found, wanted = records(out, "train"), records(alone, "train")
    assert [record["step"] for record in found] == list(range(1, step + 4))
    for one, other in zip(wanted, found, strict=True):
        assert_close(one, other, one["step"])


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_torchrun_takes_no_option_of_ours_for_its_own(name: str) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    add_commands(commands)
    own = [option for action in commands.choices[name]._actions for option in action.option_strings if len(option) > 2]
    assert own
    for option in own:
        words = ["mtvit_ops", name, "FILE", option, "VALUE"]
        found = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", *words])
        assert [found.training_script, *found.training_script_args] == words
