"""What goes wrong in a training is told in words, and what was saved before stays as it was."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from train_cases import A_VIT, MICRO, StopsAt, make_data, make_recipe, records, write_recipe

from mtvit_ops import cli, files
from mtvit_ops.train import fit
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.images import ImageSet
from mtvit_ops.train.journal import Journal
from mtvit_ops.train.order import TrainOrder
from mtvit_ops.train.processes import Processes
from mtvit_ops.train.recipe import RecipeError
from mtvit_ops.train.signals import stop_requests
from mtvit_ops.train.state import TrainError, load_state, save_state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def begun(data: Path, tmp_path: Path) -> Path:
    """A run that was asked to stop after its second step."""
    out = tmp_path / "begun"
    with pytest.raises(StoppedError):
        train(make_recipe(), data, out, device="cpu", progress=StopsAt(2))
    assert load_state(out / "state.pt").step == 2
    return out


def resume(data: Path, out: Path, **changes: Any) -> fit.TrainResult:
    return train(make_recipe(changes), data, out, resume=True, device="cpu")


@contextmanager
def kept(out: Path) -> Iterator[None]:
    """The state is the same afterwards, and nothing half-written lies beside it."""
    before = (out / "state.pt").read_bytes()
    yield
    assert (out / "state.pt").read_bytes() == before
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def spoil_loss(monkeypatch: pytest.MonkeyPatch, call: int, *, terms: bool = True) -> None:
    """From that call on the loss is no number, or its value only."""
    original, calls = fit.compute_loss, 0

    def replaced(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        loss, parts = original(*args, **kwargs)
        bad = float("nan") if calls >= call else 1.0
        return loss * bad, {name: part * bad if terms else part for name, part in parts.items()}

    monkeypatch.setattr(fit, "compute_loss", replaced)


@pytest.mark.parametrize("terms", [True, False])
def test_a_loss_that_is_no_number(terms: bool, data: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, 3, terms=terms)  # step 5: step 4 was saved, and step 6 would be
    names = "loss, task" if terms else "loss"
    with pytest.raises(TrainError, match=f"no finite number in step 5: {names};.*state.pt is from before"):
        resume(data, begun)
    state = load_state(begun / "state.pt")
    assert state.step == 4
    assert all(value.isfinite().all() for value in state.model.values())
    assert [record["step"] for record in records(begun, "train")] == [1, 2, 3, 4]


def test_the_very_step_is_named_though_lines_are_rare(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, 3)
    with pytest.raises(TrainError, match=r"no finite number in step 3: loss, task;.*nothing had been saved"):
        train(make_recipe({"run.log_steps": 5, "run.save_steps": 0}), data, tmp_path, device="cpu")
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("step", [4, 6])
def test_weights_that_are_no_numbers_are_never_saved(
    step: int, data: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step before a save is finite, its update is not."""
    left = step - 2

    def clip(self: Processes, parameters: Any, norm: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            next(iter(parameters)).grad.fill_(float("nan"))

    monkeypatch.setattr(Processes, "clip", clip)
    with pytest.raises(TrainError, match=f"no finite number after step {step}: weights"):
        resume(data, begun)
    state = load_state(begun / "state.pt")
    assert state.step == step - 2
    assert all(value.isfinite().all() for value in state.model.values())
    assert not (begun / "best.safetensors").exists()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing more into any file of this process fails, as on a full disk, in the middle of the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_the_state(data: Path, begun: Path) -> None:
    size = (begun / "state.pt").stat().st_size
    with (
        kept(begun),
        files_up_to(size // 2),
        pytest.raises(TrainError, match=r"cannot save .*state.pt: .*; the last state is intact"),
    ):
        resume(data, begun)
    assert resume(data, begun).steps == 12


def fail(error: int) -> Callable[..., NoReturn]:
    def replaced(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(error, os.strerror(error))

    return replaced


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        (files.os, "fsync", "cannot write to"),
        (files.os, "replace", "cannot write to"),
        (fit, "save_model", "cannot write .*best.safetensors"),
        (Journal, "_write", "cannot write the record of step 3"),
        (Journal, "_open", "cannot write to"),
    ],
)
def test_a_full_disk(
    owner: Any, name: str, what: str, data: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(begun), monkeypatch.context() as patch:
        if name == "save_model":
            patch.setattr(fit, "save_state", lambda path, state: None)  # the state from before must do
        patch.setattr(owner, name, fail(errno.ENOSPC))
        with pytest.raises(TrainError, match=f"{what}.*No space left on device"):
            resume(data, begun)
    assert resume(data, begun).steps == 12


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_state_is_whole_or_the_old_one(step: str, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_state(begun / "state.pt")
    with kept(begun):
        monkeypatch.setattr(files.os, step, fail(errno.EIO))
        with pytest.raises(TrainError, match=r"Input/output error; the last state is intact"):
            save_state(begun / "state.pt", state._replace(step=3))
    with pytest.raises(TrainError, match="there is no earlier one"):
        save_state(begun / "other.pt", state)


def test_folders_that_cannot_be(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageSet, "read", None)  # no image is looked at
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder or a place for one, got the file"):
        train(make_recipe(), data, file, device="cpu")
    with pytest.raises(TrainError, match=r"cannot write to .*file/run: "):
        train(make_recipe(), data, file / "run", device="cpu")
    if os.geteuid():  # the superuser may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(TrainError, match=r"cannot write to .*closed: Permission denied"):
            train(make_recipe(), data, tmp_path / "closed", device="cpu")
    assert file.read_text() == "mine"


def test_what_does_not_belong_to_the_run_is_refused(data: Path, begun: Path, tmp_path: Path) -> None:
    with kept(begun):
        with pytest.raises(ValueError, match=r"without a training, or resume be asked for: .* has state.pt"):
            train(make_recipe(), data, begun, device="cpu")
        with pytest.raises(TrainError, match=r"is of another recipe: optimiser.lr was 0.001 and is 0.01"):
            resume(data, begun, **{"optimiser.lr": 0.01})
        others = make_data(tmp_path / "others", classes=("ant", "fly"))
        with pytest.raises(TrainError, match="the state's classes are ant, bee, the data has others"):
            resume(others, begun)
        fewer = make_data(tmp_path / "fewer")
        (fewer / "train" / "ant" / "00.png").unlink()
        with pytest.raises(TrainError, match=r"other training images \(24, .*; now 23, "):
            resume(fewer, begun)
    (begun / "state.pt").rename(begun / "best.safetensors")
    with pytest.raises(ValueError, match=r"has best.safetensors"):
        train(make_recipe(), data, begun, device="cpu")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not a training's state"),
        (b"not a pickle", "is not a training's state"),
        ({"version": 0}, "is not a training's state of version"),
        ({"version": 1, "step": 3}, "it holds step"),
        ([1], "is not a training's state of version"),
    ],
)
def test_files_that_are_no_state(content: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(TrainError, match=what):
        load_state(path)


EVO_VIT = {"name": "evovit_tiny_patch16_224", **MICRO}
MT_VIT = {"name": "mtvit_tiny_patch16_224", **MICRO, "grids": [1, 2], "predictor_size": 16}


@pytest.mark.parametrize(
    ("changes", "options", "error", "what"),
    [
        ({"optimiser.batch_size": 26}, {}, ValueError, "batch_size must be at most the 24 training images, got 26"),
        ({"optimiser.name": "adamm"}, {}, RecipeError, "optimiser 'adamm' cannot be made"),
        ({"optimiser.schedule": "cosin"}, {}, RecipeError, "schedule must be one of timm's by step, got 'cosin'"),
        ({"optimiser.schedule": "plateau"}, {}, RecipeError, "schedule must be one of timm's by step, got 'plateau'"),
        ({"model.num_classes": 3}, {}, RecipeError, "num_classes must be the data's 2"),
        ({"model.depht": 3}, {}, RecipeError, "has no option 'depht'"),
        ({"plan.freeze": True}, {}, TypeError, "the plan of Dense has no 'freeze'"),
        ({}, {"reset_head": True}, ValueError, "reset_head must be False without start"),
        ({}, {"start": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({}, {"device": "cuda:7"}, ValueError, "device must be 'cpu' or None"),
        ({}, {"teacher": "nowhere.safetensors"}, ValueError, "teacher must be None"),
        ({"teacher.share": 0.5}, {"teacher": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"loss.ponder": 1.0}, {}, TypeError, "DenseLoss has no weight 'ponder'"),
        ({"model": EVO_VIT}, {}, ValueError, "class_task must be 0 for a model without a second classifier"),
        ({"model": {**A_VIT, "stop_with_class": True}}, {}, ValueError, "stop_with_class must be False in training"),
        ({"model": A_VIT, "loss.target_depth": 4}, {}, ValueError, r"target_depth must be in \[1, 3\], got 4"),
        (
            {"model": A_VIT, "loss.statistic": "official", "optimiser.batch_size": 1, "mix": {}},
            {},
            ValueError,
            "images must hold two images for the official statistic",
        ),
        ({"model": MT_VIT, "loss.temperature": 2.0}, {}, ValueError, r"temperature must be left out .*, got 2.0"),
        ({"model": MT_VIT, "loss.mode": "tails", "plan.predictor_only": 0.5}, {}, ValueError, "predictor_only must be"),
        (
            {"model": MT_VIT, "loss.mode": "tails", "plan.temperature": [5.0, 1.0]},
            {},
            ValueError,
            r"temperature must be \(1.0, 1.0\) in the loss's mode 'tails', which does not read it, got \(5.0, 1.0\)",
        ),
        ({"model": MT_VIT, "loss.mode": "tails", "plan.anneal_entropy": False}, {}, ValueError, "anneal_entropy must"),
        ({"model": MT_VIT, "loss.mode": "regret", "plan.encoder_lr": 0.5}, {}, ValueError, "encoder_lr must be 1.0 in"),
        ({"model": MT_VIT, "loss.cost_target": 0.01}, {}, ValueError, "cost_target must be in"),
        ({"model": {**MT_VIT, "force_tail": 0}}, {}, ValueError, "force_tail must be None in mode 'dense'"),
        ({"model": {**MICRO, "name": "vit_tiny_patch16_224", "in_chans": 1}}, {}, ValueError, "images must have shape"),
    ],
)
def test_wrong_use_writes_nothing_and_is_told_before_an_image_is_decoded(
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    what: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageSet, "read", None)
    with pytest.raises(error, match=what):
        train(make_recipe(changes), data, tmp_path / "run", **{"device": "cpu", **options})
    assert not (tmp_path / "run").exists()


def test_exit_codes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(write_recipe(tmp_path / "r.toml")), "--data", str(data), "--out", str(tmp_path / "run")]
    arguments += ["--device", "cpu", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        batches = TrainOrder.batches

        def stopping(self: TrainOrder, *rest: int) -> Iterator[list[tuple[int, int]]]:
            os.kill(os.getpid(), signal.SIGTERM)
            return batches(self, *rest)

        patch.setattr(TrainOrder, "batches", stopping)
        assert cli.main(arguments) == 143
    assert "asked to stop: saved after step 1 of 12" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        spoil_loss(patch, 1)
        assert cli.main(arguments) == 1
    assert "error: no finite number in step 2: loss, task" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("top-1 ")
    assert "going on after step 1 of 12" in printed.err
    assert cli.main([*arguments, "--set", "optimiser.epochs=0"]) == 2
    assert "epochs must be >= 1, got 0" in capsys.readouterr().err
    assert cli.main(arguments[:-1]) == 2
    assert "error: out must be a folder without a training" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal is None


@pytest.mark.usefixtures("interruptible")
def test_a_request_that_is_sent_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("mtvit_ops.train.signals.time.monotonic", lambda: now)
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        now = 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        now = 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


UNCAUGHT = """
import sys, torch
from train_cases import make_recipe
from mtvit_ops.train import fit

def fail(*_, **__):
    raise RuntimeError("what nobody expected")

{where} = fail
fit.train(make_recipe({{"data.workers": 1, "data.cache": False}}), sys.argv[1], sys.argv[2], device="cpu")
"""


@pytest.mark.parametrize("where", ["fit._Run._train_step", "fit.score"])
def test_an_error_that_nobody_catches_ends_the_workers_too(where: str, data: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parents[2])))
    run = subprocess.run(
        [sys.executable, "-c", UNCAUGHT.format(where=where), str(data), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # it would wait for ever
        check=False,
    )
    assert run.returncode == 1
    assert "what nobody expected" in run.stderr
