"""``evaluate`` equals a plain loop with timm's model and transform; broken images are skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_cases import break_pictures
from torch import Tensor
from torch.nn import functional as F
from train_cases import MICRO, make_data

from mtvit_ops import cli, create_model
from mtvit_ops.photos import MEAN, STD
from mtvit_ops.progress import Progress
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.scoring import Score, score
from mtvit_ops.weights import ModelInfo, save_model

timm = pytest.importorskip("timm", reason="timm is not installed: extra [train]")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [train]")

CLASSES = tuple(f"class-{index}" for index in range(7))  # more than five, or top-5 says nothing
CROP = 0.8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), val=37, classes=CLASSES, side=30)


@pytest.fixture(scope="module")
def timm_model() -> Any:
    """timm's own, with random weights large enough for sure answers."""
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(**MICRO, num_classes=len(CLASSES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def weights(timm_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    options = {"name": "vit_tiny_patch16_224", **MICRO, "num_classes": len(CLASSES)}
    save_model(path, timm_model.state_dict(), ModelInfo(options, CLASSES, CROP, {}))
    return path


@torch.no_grad()
def timm_loop(model: Any, split: Path) -> Score:
    """One image after the other, as torchvision's ImageFolder lists them."""
    transform = timm.data.create_transform(
        model_size := MICRO["img_size"], interpolation="bicubic", crop_pct=CROP, mean=MEAN, std=STD
    )
    assert model_size == 16
    right = among = 0
    losses = []
    folders = sorted(path for path in split.iterdir() if path.is_dir())
    for target, folder in enumerate(folders):
        for path in sorted(folder.iterdir()):
            logits = model(transform(Image.open(path).convert("RGB"))[None])[0]
            right += int(logits.argmax()) == target
            among += target in logits.topk(5).indices
            losses.append(F.cross_entropy(logits.double(), torch.tensor(target)).item())
    return Score(right / len(losses), among / len(losses), float(np.mean(losses)), len(losses), 0)


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (5, 0), (64, 1)])
def test_evaluate_equals_a_plain_timm_loop(
    batch: int, workers: int, data: Path, weights: Path, timm_model: Any
) -> None:
    wanted = timm_loop(timm_model, data / "val")
    found = evaluate(weights, data, batch_size=batch, workers=workers, device="cpu")
    assert found._replace(loss=0.0) == wanted._replace(loss=0.0)
    assert 0 < found.top1 < found.top5 < 1
    # the error of timm's float32 model against its float64 twin is of the order of 1e-6 of the logits, which are < 100
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_bfloat16_is_near(data: Path, weights: Path) -> None:
    exact, rough = (evaluate(weights, data, precision=kind, device="cpu") for kind in ("float32", "bfloat16"))
    assert rough.images == exact.images
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.1)  # bfloat16 carries 8 bits, some 20 roundings deep


def test_the_folder_itself_and_a_subset_of_the_classes(data: Path, weights: Path, tmp_path: Path) -> None:
    whole = evaluate(weights, data, device="cpu")
    assert evaluate(weights, data / "val", split="", device="cpu", workers=0) == whole
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / CLASSES[5]).symlink_to(data / "val" / CLASSES[5])
    one = evaluate(weights, tmp_path, device="cpu", workers=0)
    assert one.images == len(list((data / "val" / CLASSES[5]).iterdir()))


class Listens(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_skipped_and_counted(workers: int, data: Path, weights: Path, tmp_path: Path) -> None:
    whole = evaluate(weights, data, device="cpu")
    (tmp_path / "val").mkdir()
    for folder in (data / "val").iterdir():
        (tmp_path / "val" / folder.name).mkdir()
        for path in folder.iterdir():
            (tmp_path / "val" / folder.name / path.name).symlink_to(path)
    (tmp_path / "val" / CLASSES[0] / "cut.png").write_bytes(b"\x89PNG")
    (tmp_path / "val" / CLASSES[6] / "text.jpg").write_text("no picture")
    listens = Listens()
    found = evaluate(weights, tmp_path, device="cpu", workers=workers, batch_size=4, progress=listens)
    assert found._replace(loss=0.0) == whole._replace(skipped=2, loss=0.0)
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)  # float64 sums in other groups of the same logits
    assert [line.split()[:3] for line in listens.said] == [
        ["not", "used:", f"{CLASSES[0]}/cut.png"],
        ["not", "used:", f"{CLASSES[6]}/text.jpg"],
    ]


def test_nothing_readable(weights: Path, tmp_path: Path) -> None:
    break_pictures(tmp_path / "val" / CLASSES[0] / "in")
    with pytest.raises(ValueError, match="no image could be read, 3 were tried"):
        evaluate(weights, tmp_path, device="cpu", workers=0)


def test_data_that_does_not_fit(data: Path, weights: Path, timm_model: Any, tmp_path: Path) -> None:
    (tmp_path / "val" / "zebra").mkdir(parents=True)
    image = next((data / "val" / CLASSES[0]).iterdir())
    (tmp_path / "val" / "zebra" / "z.png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match="1 class folders that are not among the 7 classes: zebra"):
        evaluate(weights, tmp_path, device="cpu")
    options = {"name": "vit_tiny_patch16_224", **MICRO, "num_classes": len(CLASSES)}
    nameless = tmp_path / "nameless.safetensors"
    save_model(nameless, timm_model.state_dict(), ModelInfo(options, (), CROP, {}))
    with pytest.raises(ValueError, match="must have the model's 7 classes, got 1"):
        evaluate(nameless, tmp_path, device="cpu")
    assert evaluate(nameless, data, device="cpu", workers=0) == evaluate(weights, data, device="cpu", workers=0)
    for options in ({"batch_size": 0}, {"workers": -1}, {"precision": "float64"}, {"device": "tpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            evaluate(weights, data, **{"device": "cpu", **options})


def call(*arguments: Any) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def test_the_command(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(weights, data, device="cpu", workers=0)
    file = tmp_path / "score.json"
    arguments = ("evaluate", weights, "--data", data, "--device", "cpu", "--workers", 0)
    assert call(*arguments, "--json", file) == 0
    printed = capsys.readouterr()
    assert printed.out == (
        f"top-1 {100 * found.top1:.2f} %  top-5 {100 * found.top5:.2f} %  loss {found.loss:.4f}  of 37 images\n"
    )
    assert Score(**json.loads(file.read_text())) == found
    for folder in (data / "val").iterdir():
        (tmp_path / "other" / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (tmp_path / "other" / folder.name / path.name).symlink_to(path)
    (tmp_path / "other" / CLASSES[0] / "cut.png").write_bytes(b"\x89PNG")
    assert call("evaluate", weights, "--data", tmp_path, "--split", "other", "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert "of 37 images" in printed.out
    assert "1 images could not be read" in printed.err
    assert f"{CLASSES[0]}/cut.png" in printed.err


@pytest.mark.parametrize("target", ["nowhere/score.json", "file/score.json", "folder"])
def test_a_place_for_the_score_that_cannot_be_is_told_first(
    target: str,
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("mtvit_ops.train.evaluation.evaluate", None)  # nothing is scored
    assert call("evaluate", weights, "--data", data, "--json", tmp_path / target) == 2
    assert f"cannot write {tmp_path / target}: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("evaluate", "none", "--data", "."), "weights must be a file, there is none at none"),
        (("evaluate", "WEIGHTS", "--data", "/none"), "root must be a folder or a zip archive"),
        (("evaluate", "WEIGHTS", "--data", "DATA", "--split", "test"), "split must be a folder in"),
        (("evaluate", "WEIGHTS", "--data", "DATA", "--workers", "-1"), "workers must be >= 0, got -1"),
        (("evaluate", "WEIGHTS", "--data", "DATA", "--batch", "0"), "expected a whole number from 1 on"),
        (("evaluate", "WEIGHTS", "--data", "DATA", "--set", "depht=3"), "vit has no option 'depht'"),
        (("evaluate", "WEIGHTS"), "the following arguments are required: --data"),
        (("train", "none.toml", "--data", "DATA", "--out", "o"), "recipe must be a file, there is none at none.toml"),
        (("train", "none.toml", "--data", "DATA"), "the following arguments are required: --out"),
        (("train", "none.toml", "--data", "DATA", "--out", "o", "--set", "lr"), "expected KEY=VALUE, got 'lr'"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: tuple[str, ...],
    what: str,
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"WEIGHTS": weights, "DATA": data}
    assert call(*(places.get(argument, argument) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert what in errors[0]
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(command, "--help") == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if len(line) > 80] == []
    for word in ("exit code:", "examples:", "--data", "--set"):
        assert word in printed


class Fixed(torch.nn.Module):
    """Returns its input's first pixels as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.training)
        return images[:, 0, 0]


def test_score_by_hand() -> None:
    logits = torch.tensor(
        [[3.0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 2, 3, 4, 9], [0, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0]]
    )
    targets = torch.tensor([0, 0, 4, -1])
    model: Any = Fixed()
    images = logits[:, None, None, :]
    found = score(model, [(images[:3], targets[:3]), (images[3:], targets[3:]), (images[:0], targets[:0])])
    losses = [F.cross_entropy(logits[row].double(), targets[row]).item() for row in range(3)]
    assert found._replace(loss=0.0) == Score(1 / 3, 2 / 3, 0.0, 3, 1)  # of equals, the first five
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-15)
    assert model.training
    assert model.seen == [False] * 3
    with pytest.raises(ValueError, match="no image could be read, 1 were tried"):
        score(model, [(images[3:], targets[3:])])
    with pytest.raises(ValueError, match="no image could be read, 0 were tried"):
        score(model, [])


def test_score_of_few_classes_and_modes() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **MICRO, num_classes=3).eval()
    batch = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    assert score(model, [batch]).top5 == 1.0
    assert not model.training
