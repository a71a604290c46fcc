"""Two processes that hold a share of everything each train as one that holds all; files do not tell them apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import assert_close, launch_two, rounding
from sharding_cases import CASES, PAIRED, STOPS_AFTER, run_case
from torch import Tensor
from train_cases import STEPS, VAL_IMAGES, StopsAt, assert_same_run, make_data, make_recipe, records, same_bits

from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import train
from mtvit_ops.train.state import load_state
from mtvit_ops.weights import load_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

WITHOUT = ("dense", *PAIRED)  # trained without shards by two processes, too


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of all cases."""
    out = tmp_path_factory.mktemp("two")
    launch_two("sharding_cases.py", data, out)
    return out


def found(two: Path, what: str) -> list[Any]:
    """What each process says."""
    return [json.loads((two / f"found-{rank}.json").read_text())[what] for rank in range(2)]


def assert_close_runs(out: Path, wanted: Path, steps: int) -> None:
    for kind, count in (("train", steps), ("evaluate", steps // 6)):
        pairs = list(zip(records(wanted, kind), records(out, kind), strict=True))
        assert len(pairs) == count
        for one, other in pairs:
            assert_close(one, other, one["step"])


def steps_of(name: str) -> int:
    return STEPS if name == "dense" else STEPS // 2


@pytest.mark.parametrize("name", CASES)
def test_shards_train_as_one_process(name: str, data: Path, two: Path, tmp_path: Path) -> None:
    score = run_case(name, data, tmp_path / name, sharded=False).score._asdict()
    assert_close_runs(two / name, tmp_path / name, steps_of(name))
    for scores in found(two, "scores"):
        assert scores[name]["images"] == VAL_IMAGES
        assert_close(score, scores[name], STEPS)


@pytest.mark.parametrize("name", WITHOUT)
def test_shards_train_as_whole_weights(name: str, two: Path) -> None:
    steps = steps_of(name)
    assert_close_runs(two / name, two / f"{name}, whole", steps)
    weights, wanted = (load_model(two / each / "last.safetensors") for each in (name, f"{name}, whole"))
    assert weights.info.facts.pop("recipe")["run"].pop("sharding") == "full"
    assert wanted.info.facts.pop("recipe")["run"].pop("sharding") == "none"
    assert weights.info == wanted.info._replace(facts=weights.info.facts)
    state = wanted.model.state_dict()
    assert list(weights.model.state_dict()) == list(state)
    for key, value in weights.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=rounding(steps), atol=rounding(steps), msg=key)


@pytest.mark.parametrize("name", WITHOUT)
def test_each_process_holds_half(name: str, two: Path) -> None:
    for held in found(two, "held"):
        share, whole = held[name], held[f"{name}, whole"]
        assert min(whole[kind] for kind in ("weights", "average", "optimiser")) > 0
        for kind, numbers in whole.items():
            # the class token and positions, one long in the first dimension, are the first process's
            assert 0.45 * numbers <= share[kind] <= 0.55 * numbers, kind


def test_what_never_learns_has_no_state(two: Path) -> None:
    """One block of three learns: two moments of a third of the weights or less, in shards of a half."""
    for held in found(two, "held"):
        share = held["Life, frozen"]
        assert 0 < share["optimiser"] < 2 * share["weights"] / 3


@pytest.mark.parametrize("name", [*CASES, *PAIRED])
def test_every_process_returns_the_model_of_the_file(name: str, data: Path, two: Path) -> None:
    model = load_model(two / name / "last.safetensors").model.state_dict()
    for rank in range(2):
        assert same_bits(dict(model), dict(torch.load(two / f"{name}, {rank}.pt", weights_only=True)))
    one, other = (scores[name] for scores in found(two, "scores"))
    assert one == other
    precision = make_recipe({**CASES, **PAIRED}[name]).run.precision
    score = evaluate(two / name / "last.safetensors", data, workers=0, device="cpu", precision=precision)
    # summed in other batches, which bfloat16 rounds otherwise
    assert one == score._asdict() | {"loss": pytest.approx(one["loss"], rel=2**-8 if precision == "bfloat16" else 1e-5)}


def layout(value: Any) -> Any:
    """Everything but the numbers in tensors."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, Mapping):
        return type(value), [(key, layout(each)) for key, each in value.items()]
    return (type(value), [layout(each) for each in value]) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", WITHOUT)
def test_a_state_is_laid_out_as_without_shards(name: str, two: Path) -> None:
    state, wanted = (load_state(two / each / "state.pt")._asdict() for each in (name, f"{name}, whole"))
    for each in (state, wanted):
        each["recipe"]["run"].pop("sharding")
        assert each.pop("seconds") > 0
        assert each.pop("sums") == {}
        moments = [value for values in each["optimiser"]["state"].values() for value in values.values()]
        assert any(moment.any() for moment in moments if moment is not None)
    assert layout(state) == layout(wanted)


def test_a_stop_asked_of_one_process_changes_nothing_in_the_end(two: Path) -> None:
    for said in found(two, "said"):
        for each in said[:2]:
            assert f"saved after step {STOPS_AFTER} of {STEPS}" in each
    assert_same_run(two / "stopped", two / "dense")


def test_one_process_goes_on_with_what_two_had_in_shards(data: Path, two: Path) -> None:
    out = two / "stopped, left"
    assert load_state(out / "state.pt").step == STOPS_AFTER
    run_case("dense", data, out, sharded=False, resume=True)
    assert_close_runs(out, two / "dense", STEPS)


def test_shards_go_on_with_whole_weights(two: Path) -> None:
    assert load_state(two / "stopped whole, left" / "state.pt").recipe["run"]["sharding"] == "none"
    assert_close_runs(two / "stopped whole", two / "dense", STEPS)


def test_no_number_in_one_share_ends_all_processes(two: Path) -> None:
    for said in found(two, "said"):
        assert said[2].startswith("no finite number after step 6: weights")
    assert not (two / "spoilt" / "state.pt").exists()


def test_one_process_has_nothing_to_shard_and_says_so(data: Path, tmp_path: Path) -> None:
    heard = StopsAt(10**9)
    for sharding, progress in (("none", None), ("full", heard)):
        recipe = make_recipe({"optimiser.epochs": 1, "run.sharding": sharding})
        train(recipe, data, tmp_path / sharding, device="cpu", progress=progress)
    assert sum("nothing to shard" in text for text in heard.said) == 1
    states = [load_state(tmp_path / each / "state.pt")._replace(recipe={}, seconds=0.0) for each in ("none", "full")]
    assert same_bits(*states)


def test_kernels_see_the_weights_of_the_moment(two: Path) -> None:
    for errors in found(two, "errors"):
        assert len(errors) == 5
        assert max(errors) < 1e-5
