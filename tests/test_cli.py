"""The command line, called in-process: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtvit_ops
from mtvit_ops import create_model
from mtvit_ops.cli import main
from mtvit_ops.environment import describe_environment, environment

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [demo]")

SIZES = ["img_size=64", "embed_dim=32", "num_heads=2", "depth=6", "num_classes=3"]
TINY = [f"--override={field}" for field in [*SIZES, "base_block=2"]] + ["--rounds=1", "--batch=2"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(generator.integers(0, 256, (70, 90, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def call(*arguments: Any) -> int:
    """The exit code, whichever way it comes."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def test_compare_prints_one_table_and_writes_everything(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: extra [demo]")
    out, extra = photos.parent / "new" / "out", photos.parent / "more.json"
    assert call("compare", photos, *TINY, "--out", out, "--json", extra) == 0
    printed = capsys.readouterr()
    for name in ("vit", "avit", "evovit", "lifevit", "mtvit"):
        assert sum(line.startswith(name) and ":" not in line for line in printed.out.splitlines()) == 1
    assert "timings are real, choices are not" in printed.out
    assert "removal equals masking" in printed.out
    assert "calibrating (4) ..." in printed.err  # plain lines: this is no terminal
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "compare.json", "speed-up.png"]
    data = json.loads(extra.read_text())
    assert data["pictures"] == ["a.png", "b.png"]
    assert [model["name"] for model in data["models"]] == ["vit", "avit", "evovit", "lifevit", "mtvit"]


def test_bad_photographs_are_named_and_the_others_processed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(good[: len(good) // 2])
    text = photos.parent / "letter.txt"
    text.write_text("Dear model,")
    missing, long = photos.parent / "missing.jpg", photos.parent / f"{300 * 'x'}.jpg"
    assert call("compare", photos, text, missing, long, *TINY[:-3], "--models=evovit", "--rounds=1") == 1
    printed = capsys.readouterr()
    reasons = {photos / "cut.png": "cannot be read", text: "not a picture", missing: "no such file", long: "too long"}
    for path, reason in reasons.items():
        assert any(str(path) in line and reason in line for line in printed.err.splitlines())
    assert printed.out.startswith("2 photographs")
    assert "evovit " in printed.out


def test_nothing_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert call("compare", tmp_path / "empty") == 2
    assert "nothing to read is left" in capsys.readouterr().err
    assert call("compare", text, *TINY) == 2
    printed = capsys.readouterr().err
    assert "not a picture" in printed
    assert "none of the 1 files can be read" in printed


WRONG = {
    "model": (["--models=resnet"], ["--models", "vit, avit", "'resnet'"]),
    "no-model": (["--models=,"], ["--models", "','"]),
    "size": (["--size=huge"], ["--size", "tiny", "'huge'"]),
    "size-trained": (["--size=tiny", "--trained=models"], ["size must be None beside trained models", "'tiny'"]),
    "dtype": (["--dtype=int8"], ["--dtype", "float32", "'int8'"]),
    "ratio-0": (["--mac-ratio=0"], ["--mac-ratio", "above 0 and up to 1", "'0'"]),
    "ratio-2": (["--mac-ratio=2"], ["--mac-ratio", "'2'"]),
    "ratio-nan": (["--mac-ratio=nan"], ["--mac-ratio", "'nan'"]),
    "ratio-word": (["--mac-ratio=half"], ["--mac-ratio", "'half'"]),
    "batch": (["--batch=0"], ["--batch", "from 1 on", "'0'"]),
    "rounds": (["--rounds=-1"], ["--rounds", "'-1'"]),
    "seed": (["--seed=x"], ["--seed", "'x'"]),
    "device": (["--device=abacus"], ["device", "auto, cpu", "'abacus'"]),
    "checkpoint-form": (["--checkpoint=deit.pth"], ["--checkpoint", "NAME=PATH", "'deit.pth'"]),
    "checkpoint-name": (["--checkpoint=resnet=x"], ["--checkpoint", "all", "'resnet=x'"]),
    "checkpoint-missing": (["--checkpoint=all=nothing.pth"], ["--checkpoint", "no file", "'nothing.pth'"]),
    "override-form": (["--override=depth"], ["--override", "KEY=VALUE", "'depth'"]),
    "override-field": (["--override=colour=1"], ["override", "'colour'", "depth"]),
    "override-of-one": (["--override=evovit.colour=1"], ["override", "'evovit.colour'"]),
    "override-value-of-one": ([*TINY, "--override=evovit.mode=deep"], ["mode must be one of", "'layer'", "'deep'"]),
    "override-value": (["--override=depth=deep"], ["depth must be an int", "str"]),
    "override-channels": ([*TINY, "--override=in_chans=1"], ["'in_chans' must be 3", "got 1"]),
    "threads": (["--threads=99999999999"], ["threads", "[1, 4096]", "99999999999"]),
    "checkpoint-long": (["--checkpoint=all=" + 300 * "x"], ["--checkpoint", "NAME=PATH", "too long"]),
    "out-nothing": (["--out="], ["--out", "a folder", "''"]),
    "labels": (["--labels=nothing.txt"], ["--labels", "text file", "'nothing.txt'"]),
    "json": (["--json=no/such/folder/x.json"], ["--json", "existing folder"]),
    "unknown-option": (["--fast"], ["--fast"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_explained(case: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = WRONG[case]
    assert call("compare", photos, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    last = printed.err.strip().splitlines()[-1]
    assert "error: " in last
    for word in words:
        assert word in last


def test_a_file_that_is_no_checkpoint(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = photos.parent / "wrong.pth"
    wrong.write_text("no checkpoint")
    assert call("compare", photos, *TINY, f"--checkpoint=all={wrong}") == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"checkpoint all={wrong}" in printed
    assert "not a checkpoint" in printed


def test_a_checkpoint_that_does_not_fit(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"head.weight": torch.zeros(3, 32)}, photos.parent / "head.pth")
    assert call("compare", photos, *TINY, f"--checkpoint=avit={photos.parent / 'head.pth'}") == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint avit=" in printed
    assert "missing cls_token" in printed


def test_checkpoints_are_shared_or_a_method_s_own(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: int(value) for key, value in (field.split("=") for field in SIZES)}
    torch.save(create_model("vit_tiny_patch16_224", **sizes).state_dict(), photos.parent / "all.pth")
    torch.save(create_model("evovit_tiny_patch16_224", **sizes).state_dict(), photos.parent / "own.pth")
    files = [f"--checkpoint=all={photos.parent / 'all.pth'}", f"--checkpoint=evovit={photos.parent / 'own.pth'}"]
    assert call("compare", photos, *TINY, *files) == 0
    # lines are wrapped to the terminal
    printed = " ".join(capsys.readouterr().out.split())
    assert "choices are not" not in printed
    assert "lifevit: method.weight is not in the checkpoint and untrained" in printed
    assert "were not trained with them" in printed


@pytest.mark.parametrize("given", ["photos", "photos/a.png", "photos/../photos/link.png"])
def test_photographs_are_never_written_over(
    given: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos / "link.png").symlink_to(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    assert call("compare", given, *TINY, "--out=photos") == 2
    assert "out must be a folder that holds none of the photographs, got 'photos'" in capsys.readouterr().err
    assert (photos / "a.png").read_bytes() == before


def test_out_that_is_a_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", photos, *TINY, "--out", photos / "a.png") == 2
    assert "argument --out: expected a folder" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: extra [demo]")
    (photos.parent / "out" / "a.png").mkdir(parents=True)
    assert call("compare", photos, *TINY, "--out", photos.parent / "out") == 2
    assert "out: cannot write the picture" in capsys.readouterr().err


def test_an_instruction_set_that_is_none(photos: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mtvit_ops", "env"],
        cwd=Path(mtvit_ops.__file__).parent.parent,
        env={**os.environ, "MTVIT_OPS_ISA": "z80"},
        capture_output=True,
        text=True,
        check=False,
    )
    if mtvit_ops.has_extension():
        assert done.returncode == 2
        assert "error: MTVIT_OPS_ISA must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_check_has_its_own_exit_code(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mtvit_ops.equality.masked_twin", lambda model: model.with_method(mtvit_ops.create_method("vit"))
    )
    assert call("compare", photos, *TINY[:-3], "--models=evovit") == 3
    printed = capsys.readouterr()
    assert "removing tokens differs from masking them" in printed.err
    assert printed.out == ""


def test_missing_packages_are_named(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert call("compare") == 2
    assert 'pip install "mtvit_ops[demo]"' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert call("compare", photos, *TINY) == 2
    assert "needs Pillow" in capsys.readouterr().err


def test_a_stream_without_blocks_gets_ascii(photos: Path) -> None:
    code = f"import sys; from mtvit_ops.cli import main; sys.exit(main({['compare', str(photos), *TINY]!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(mtvit_ops.__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"@@" in done.stdout
    # the profiler's own lines are kept away
    assert b"profiler_start" not in done.stderr


def test_env_says_what_is_there_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env") == 0
    printed = capsys.readouterr().out
    for word in (mtvit_ops.__version__, str(torch.__version__), "numpy", "triton", "threads", "device", "reference"):
        assert word in printed
    for name, found in mtvit_ops.available_backends().items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name] and "available" in line)
        assert ("not available" in line) != found.available
        assert found.reason in line
    assert printed.strip() == describe_environment().strip()


def test_environment_fits_into_json() -> None:
    assert json.loads(json.dumps(environment()))["mtvit_ops"] == mtvit_ops.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["env", "--help"], ["compare", "--help"]], ids=" ".join)
@pytest.mark.parametrize("columns", ["80", "140"])
def test_help_fits_the_terminal(
    arguments: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert call(*arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= int(columns)
    if arguments[0] == "compare":
        assert "default: 0.65" in printed
        assert "exit code" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mtvit-ops {mtvit_ops.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["frobnicate"]], ids=["nothing", "unknown"])
def test_no_or_unknown_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_package_imports_no_extras() -> None:
    code = (
        "import sys, mtvit_ops, mtvit_ops.cli, mtvit_ops.compare, mtvit_ops.report, mtvit_ops.viz, mtvit_ops.chart\n"
        "print({'PIL', 'matplotlib', 'rich', 'skimage', 'timm', 'safetensors'} & set(sys.modules))"
    )
    root = Path(mtvit_ops.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
