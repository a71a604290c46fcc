"""Interrupted trainings end as if nothing had been; what goes wrong is told and leaves the last state intact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import STEPS, StopsAt, assert_same_run, make_data, make_recipe, records, write_recipe

from mtvit_ops import files
from mtvit_ops.train import fit
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.journal import Journal
from mtvit_ops.train.state import load_state

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """What nothing in the loop may catch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(make_recipe(), data, out, device="cpu")
    assert result.steps == STEPS
    assert [record["step"] for record in records(out, "evaluate")] == [STEPS // 2, STEPS]
    return out


def test_a_finished_run_is_resumed_to_itself(whole: Path, data: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    result = train(make_recipe(), data, whole, resume=True, device="cpu")
    assert result.best == load_state(whole / "state.pt").best
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


def test_killed_at_any_moment_of_the_process(whole: Path, data: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.toml"), tmp_path / "run"
    command = [sys.executable, "-m", "mtvit_ops", "train", str(recipe), "--resume", "--device", "cpu"]
    command += ["--data", str(data), "--out", str(out)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    generator, kills = random.Random(), 0
    for _ in range(2):
        log = (tmp_path / "log").open("w+")
        process = subprocess.Popen(command, env={**os.environ, **threads}, stderr=log, stdout=log, cwd=tmp_path)
        done = lines(out)
        goal = generator.randrange(done + 1, done + 5)  # the start takes longer than the training
        while process.poll() is None and lines(out) < goal:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        kills += process.poll() is None
        process.kill()
        process.wait()
        log.seek(0)
        assert process.returncode in (0, -signal.SIGKILL), log.read()
    assert kills
    subprocess.run(command, env={**os.environ, **threads}, check=True, capture_output=True, cwd=tmp_path)
    assert_same_run(out, whole)


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """Let the call of that number raise, before it does its work or after."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, replaced)


# calls of a whole run: 2 epochs of 6 steps, saves after steps 2, 4, 6 of each and after the evaluation, best and last
CALLS = {"save_state": 8, "save_model": 3, "record": 14, "compute_loss": 12, "score": 2}
POINTS = [(name, call, False) for name, last in CALLS.items() for call in range(1, last + 1)]
POINTS += [(name, call, True) for name in ("save_state", "save_model") for call in range(1, CALLS[name] + 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_at_every_point(
    workers: int, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)  # against power cuts, which are not in this test
    # with a worker, which takes longer to start, only some
    points = POINTS if workers == 0 else POINTS[::12]
    if workers:
        monkeypatch.setattr(fit, "train_batches", with_worker(fit.train_batches))
    reached = 0
    for number, (name, call, after) in enumerate(points):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            kill_at(patch, Journal if name == "record" else fit, name, call, after)
            try:
                train(recipe, data, out, device="cpu")
            except Killed:
                reached += 1
        train(recipe, data, out, resume=True, device="cpu")
        assert_same_run(out, whole)
    # the second evaluation need not be better: the last one or two calls of save_model may be missing
    assert reached >= len(points) - 2


@pytest.mark.parametrize("call", [1, 2])
def test_killed_while_it_evaluates(
    call: int, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, fit, "score", call, after=False)
        with pytest.raises(Killed):
            train(make_recipe(), data, tmp_path, device="cpu")
    state = load_state(tmp_path / "state.pt")
    assert (state.step, state.owed) == (call * STEPS // 2, True)
    train(make_recipe(), data, tmp_path, resume=True, device="cpu")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_signal_ends_an_evaluation_between_two_batches(
    evaluation: int, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, evaluations, batches = fit.eval_batches, 0, 0

    def signalling(*args: Any) -> Any:
        nonlocal evaluations, batches
        evaluations += 1
        for batch in load(*args):
            if evaluations == evaluation:
                batches += 1
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    step = evaluation * STEPS // 2
    with monkeypatch.context() as patch:
        patch.setattr(fit, "eval_batches", signalling)
        with pytest.raises(StoppedError, match=f"asked to stop: saved after step {step} of {STEPS}"):
            train(make_recipe(), data, tmp_path, device="cpu")
    assert batches == 1
    assert load_state(tmp_path / "state.pt").step == step
    train(make_recipe(), data, tmp_path, resume=True, device="cpu")
    assert_same_run(tmp_path, whole)


def with_worker(load: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(images: Any, recipe: Any, *rest: Any) -> Any:
        return load(images, make_recipe({"data.workers": 1}), *rest)

    return replaced


@pytest.mark.parametrize("step", [1, 6, 9])
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(number: signal.Signals, step: int, whole: Path, data: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    progress = StopsAt(step, number)
    with pytest.raises(StoppedError, match="asked to stop: saved after step") as info:
        train(make_recipe(), data, tmp_path, device="cpu", progress=progress)
    assert info.value.signal == number
    assert progress.said[-1] == str(info.value)
    assert load_state(tmp_path / "state.pt").step in (step, step + 1)
    assert signal.getsignal(number) == before
    train(make_recipe(), data, tmp_path, resume=True, device="cpu")
    assert_same_run(tmp_path, whole)
