"""The trained models in ``checkpoints/``: small, documented, and right on photographs of their classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mtvit_ops.lineup import METHODS
from mtvit_ops.lineup_trained import build_trained, find_trained
from mtvit_ops.weights import load_model, read_info

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "checkpoints"
DATA = ROOT.parent / "shared" / "data" / "imagenette128.zip"


def test_every_method_is_there_and_small() -> None:
    files = find_trained(FOLDER)
    assert set(files) == set(METHODS)
    sizes = [path.stat().st_size for path in FOLDER.glob("*.safetensors")]
    assert max(sizes) <= 4 * 2**20
    assert sum(sizes) <= 20 * 2**20


@pytest.mark.parametrize("name", METHODS)
def test_a_card_says_what_the_file_is(name: str) -> None:
    path = find_trained(FOLDER)[name]
    model, info = load_model(path)
    assert {value.dtype for value in _tensors(path)} <= {torch.float16, torch.int64}
    assert len(info.classes) == len(info.facts["class_names"]) == model.config.num_classes == 10
    card = path.with_suffix(".md").read_text()
    assert info.model["name"] in card
    assert info.facts["chain"] in card
    for field, value in info.model.items():
        if field != "name":
            assert f"`{field}={value}`" in card
    assert re.search(r"top-1 \| \d\d\.\d\d%", card)


def test_they_run_side_by_side() -> None:
    lineup = build_trained(FOLDER, METHODS, {}, torch.device("cpu"), torch.float32)
    assert tuple(lineup.models) == METHODS
    assert not lineup.untrained


@pytest.mark.skipif(
    not DATA.is_file(), reason="Imagenette's photographs are not here: ../shared/data/imagenette128.zip"
)
@pytest.mark.parametrize("name", METHODS)
def test_answers_on_photographs_are_mostly_right(name: str) -> None:
    from mtvit_ops.train.images import open_images
    from mtvit_ops.train.views import EvalViews, eval_view, options_of

    path = find_trained(FOLDER)[name]
    model, info = load_model(path)
    images = open_images(DATA, "val", classes=info.classes, cache=False)
    views = EvalViews(images, eval_view(model.config.img_size, options_of(info)))
    chosen = [views[index] for index in range(0, len(views), len(views) // 200)]
    pixels, targets = torch.stack([each[0] for each in chosen]), torch.tensor([each[1] for each in chosen])
    with torch.inference_mode():
        right = (model(pixels).argmax(dim=1) == targets).double().mean().item()
    written = re.search(r"top-1 \| (\d\d\.\d\d)%", path.with_suffix(".md").read_text())
    assert written is not None
    # the card's share of all photographs, three standard errors of a sample of this size away at most
    share = float(written[1]) / 100
    assert abs(right - share) <= 3 * (share * (1 - share) / len(chosen)) ** 0.5


def _tensors(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    assert read_info(path) is not None
    return list(load_file(path).values())
