"""Views: timm's own, each drawn from (seed, epoch, index) and nothing else."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_cases import NAMES, break_pictures, make_folder, save_picture, small_pixels
from torch.utils.data import DataLoader

from mtvit_ops.train.images import ImageSet, open_images
from mtvit_ops.train.views import EvalViews, TrainViews, View, ViewOptions, _seeded, eval_view, train_view

timm_data = pytest.importorskip("timm.data", reason="timm is not installed: extra [train]")

STATISTICS = {"mean": timm_data.IMAGENET_DEFAULT_MEAN, "std": timm_data.IMAGENET_DEFAULT_STD}
STRONG = ViewOptions(scale=(0.3, 0.9), auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
JITTER = ViewOptions(color_jitter=0.3, reprob=0.5, interpolation="bilinear")


@pytest.fixture
def found(tmp_path: Path) -> ImageSet:
    return open_images(make_folder(tmp_path / "set", "train"), "train")


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


def stir() -> None:
    random.seed()
    np.random.seed()
    torch.seed()


@pytest.mark.parametrize("options", [STRONG, JITTER], ids=["strong", "jitter"])
def test_a_view_depends_on_seed_epoch_and_index_alone(options: ViewOptions, found: ImageSet) -> None:
    def draw(seed: int, epoch: int, index: int) -> torch.Tensor:
        stir()
        before = states()
        pixels, target, used = TrainViews(found, train_view(24, options), seed)[epoch, index]
        assert states() == before
        assert (target, used) == (found.targets[index], index)
        assert (pixels.shape, pixels.dtype) == ((3, 24, 24), torch.float32)
        return pixels

    keys = [(seed, epoch, index) for seed in (0, 2**40) for epoch in (0, 1) for index in range(len(found))]
    first, second = ([draw(*key) for key in keys] for _ in range(2))
    assert all(map(torch.equal, first, second))
    same = [(one, other) for one in range(len(keys)) for other in range(one) if torch.equal(first[one], first[other])]
    assert same == []


@pytest.mark.parametrize("seed", [3, 2**40])
def test_repeats_are_other_views_and_the_first_stays(seed: int, found: ImageSet) -> None:
    views = TrainViews(found, train_view(24, STRONG), seed)
    keys = [(epoch, index, *more) for epoch in (0, 1) for index in range(3) for more in ((), (1,), (2,))]
    drawn = []
    for key in keys:
        stir()
        pixels, target, used = views[key]
        assert (target, used) == (found.targets[key[1]], key[1])
        assert torch.equal(pixels, views[key][0])
        drawn.append(pixels)
    assert not [1 for one in range(len(keys)) for other in range(one) if torch.equal(drawn[one], drawn[other])]


def test_the_draws_of_a_view_are_written_down() -> None:
    """A change of these numbers would break every interrupted run."""
    for parts, want in (
        ((3, 1, 4), [0.6073477268218994, 0.920487105846405]),
        ((2**40, 1, 4), [0.5208498239517212, 0.5385343432426453]),
        ((3, 1, 4, 1), [0.922197699546814, 0.42305999994277954]),
    ):
        with _seeded(*parts):
            assert torch.rand(2).tolist() == want


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same_views(workers: int, found: ImageSet) -> None:
    views = TrainViews(found, train_view(24, STRONG), 3)
    keys = [(epoch, index) for epoch in (0, 1) for index in torch.randperm(len(found)).tolist()]
    here = [views[key] for key in keys]
    loader = DataLoader(views, batch_size=4, sampler=keys, num_workers=workers, persistent_workers=True)
    for _ in range(2):
        pixels, targets, indices = map(torch.cat, zip(*loader))
        assert torch.equal(pixels, torch.stack([each[0] for each in here]))
        assert targets.tolist() == [each[1] for each in here]
        assert indices.tolist() == [key[1] for key in keys]


def test_an_error_inside_puts_the_generators_back(found: ImageSet) -> None:
    before = states()

    def fail(image: Any) -> torch.Tensor:
        assert states() != before
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        TrainViews(found, View(fail, 16), 0)[0, 0]
    assert states() == before


OPTIONS = {  # fields of ours, arguments of timm's
    "default": ({}, {"color_jitter": None, "interpolation": "random"}),
    "crop": (
        {"scale": (0.4, 0.5), "ratio": [1, 2.0], "interpolation": "bicubic"},
        {"scale": (0.4, 0.5), "ratio": (1, 2), "interpolation": "bicubic", "color_jitter": None},
    ),
    "mirror": ({"hflip": 1.0}, {"hflip": 1.0, "color_jitter": None, "interpolation": "random"}),
    "jitter": ({"color_jitter": 0.4, "hflip": 0}, {"color_jitter": 0.4, "hflip": 0.0, "interpolation": "random"}),
    "policy": (
        {"auto_augment": "rand-m5-n3-mstd0.5-inc1", "interpolation": "bilinear"},
        {"auto_augment": "rand-m5-n3-mstd0.5-inc1", "interpolation": "bilinear"},
    ),
    "erasing": (
        {"reprob": 1.0},
        {"re_prob": 1.0, "re_mode": "pixel", "color_jitter": None, "interpolation": "random"},
    ),
}


@pytest.mark.parametrize(("ours", "timms"), OPTIONS.values(), ids=OPTIONS)
def test_train_views_are_timms(ours: dict[str, Any], timms: dict[str, Any], found: ImageSet) -> None:
    expected = timm_data.create_transform(20, is_training=True, **timms, **STATISTICS)
    views = TrainViews(found, train_view(20, ViewOptions(**ours)), 7)
    for index in range(len(found)):
        with _seeded(7, 2, index):
            wanted = expected(found.read(index))
        assert torch.equal(views[2, index][0], wanted)


@pytest.mark.parametrize(
    ("options", "interpolation", "crop_pct"),
    [
        (ViewOptions(), "bicubic", 0.875),
        (ViewOptions(interpolation="bilinear", crop_pct=1.0), "bilinear", 1.0),
        (ViewOptions(interpolation="bicubic", crop_pct=0.6), "bicubic", 0.6),
    ],
    ids=["default", "bilinear", "small-crop"],
)
def test_eval_views_are_timms(options: ViewOptions, interpolation: str, crop_pct: float, found: ImageSet) -> None:
    expected = timm_data.create_transform(32, interpolation=interpolation, crop_pct=crop_pct, **STATISTICS)
    views = EvalViews(found, eval_view(32, options))
    assert len(views) == len(found)
    for index in range(len(found)):
        pixels, target, used = views[index]
        assert torch.equal(pixels, expected(found.read(index)))
        assert (target, used) == (found.targets[index], index)


def test_broken_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train") / "train"
    reasons = break_pictures(folder)
    (folder / "cat" / "zz.png").write_bytes(b"broken, and the last of all")
    found = open_images(folder, None, cache=False)
    broken = {*reasons, "cat/zz.png"}
    train, val = TrainViews(found, View(small_pixels, 16), 0), EvalViews(found, View(small_pixels, 16))
    for index, name in enumerate(found.names):
        wanted = next(i % len(found) for i in range(index, 99) if found.names[i % len(found)] not in broken)
        pixels, target, used = train[0, index]
        assert (used, target) == (wanted, found.targets[wanted])
        assert torch.equal(pixels, val[wanted][0])
        pixels, target, used = val[index]
        assert (target, used) == (-1 if name in broken else found.targets[index], index)
        assert (pixels.shape, bool(pixels.any())) == ((3, 16, 16), name not in broken)
    assert {problem.path for problem in found.problems} == broken
    for name in NAMES:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="none of the 4 images can be read"):
        TrainViews(open_images(folder, None, cache=False), View(small_pixels, 16), 0)[0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 2), (3, 4000)], ids=str)
def test_tiny_pictures(size: tuple[int, int], tmp_path: Path) -> None:
    save_picture(tmp_path / "ant" / "tiny.png", size)
    found = open_images(tmp_path, None)
    for options in (ViewOptions(), ViewOptions(scale=(0.001, 0.001), ratio=(0.05, 20))):
        views = TrainViews(found, train_view(8, options), 0)
        assert all(views[epoch, 0][0].isfinite().all() for epoch in range(40))
        assert EvalViews(found, eval_view(8, options))[0][0].isfinite().all()


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m5-n2-p0.7-mmax12-t3a",
        "rand-mstd101-tweights",
        "rand-t3aw",
        "augmix-m3-w2-d1-b1",
        "augmix-a0.5-mstd1",
        "v0",
        "v0r-mstd0.5",
        "original",
        "originalr",
        "3a",
    ],
)
def test_policies_that_timm_knows(policy: str, found: ImageSet) -> None:
    view = train_view(16, ViewOptions(auto_augment=policy))
    for index in range(len(found)):
        assert TrainViews(found, view, 1)[0, index][0].shape == (3, 16, 16)


VALUE_ERRORS = {
    "scale-empty": ({"scale": (0.5, 0.4)}, "scale must be 0 < a <= b <= 1, got"),
    "scale-zero": ({"scale": (0.0, 1.0)}, "scale must be"),
    "scale-large": ({"scale": (0.5, 1.1)}, "scale must be"),
    "scale-nan": ({"scale": (float("nan"), 1.0)}, "scale must be"),
    "ratio": ({"ratio": (1.0, float("inf"))}, "ratio must be 0 < a <= b, got"),
    "hflip": ({"hflip": 1.5}, r"hflip must be in \[0, 1\], got 1.5"),
    "reprob": ({"reprob": -0.1}, r"reprob must be in \[0, 1\]"),
    "crop_pct": ({"crop_pct": 0.0}, r"crop_pct must be in \(0, 1\], got 0.0"),
    "color_jitter": ({"color_jitter": -1}, "color_jitter must be at least 0, or None"),
    "interpolation": ({"interpolation": "nearest"}, "interpolation must be one of random, bicubic, bilinear"),
    "policy": ({"auto_augment": "random"}, "auto_augment must be a policy of timm"),
    "policy-typing-error": ({"auto_augment": "rand-m9-mst0.5"}, "auto_augment must be a policy"),
    "policy-no-number": ({"auto_augment": "rand-m-inc1"}, "auto_augment must be a policy"),
    "policy-fraction": ({"auto_augment": "rand-m9.5"}, "auto_augment must be a policy"),
    "repeats": ({"repeats": 0}, "repeats must be >= 1, got 0"),
    "policy-and-jitter": ({"auto_augment": "rand-m9", "color_jitter": 0.3}, "color_jitter must be None beside"),
}


@pytest.mark.parametrize(("fields", "match"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_values_out_of_range(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ViewOptions(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", 0.5),
        ("scale", (0.1, 0.2, 0.3)),
        ("ratio", "ab"),
        ("hflip", "0.5"),
        ("reprob", True),
        ("color_jitter", (0.4, 0.4)),
        ("auto_augment", 9),
        ("repeats", 1.5),
    ],
    ids=str,
)
def test_values_of_another_kind(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} must be"):
        ViewOptions(**{field: value})


def test_three_augment_goes_with_jitter(found: ImageSet) -> None:
    view = train_view(16, ViewOptions(auto_augment="3a", color_jitter=0.3))
    assert "ColorJitter" in str(view.transform)


def test_sizes_and_seeds(found: ImageSet) -> None:
    view = View(small_pixels, 16)
    for wrong, error in ((-1, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed must be"):
            TrainViews(found, view, wrong)  # type: ignore[arg-type]
    for make in (train_view, eval_view):
        for wrong, error in ((0, ValueError), (16.0, TypeError)):
            with pytest.raises(error, match="img_size must be"):
                make(wrong, ViewOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["timm", "PIL"])
def test_what_is_not_installed_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (missing, f"{missing}.data"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = r'pip install "mtvit_ops\[train\]"'
    with pytest.raises(ImportError, match=wanted):
        train_view(16, ViewOptions()) if missing == "timm" else open_images(tmp_path, None)


def test_importing_it_is_lean() -> None:
    code = (
        "import sys, mtvit_ops.train.views\n"
        "heavy = {'timm', 'torchvision', 'PIL', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
