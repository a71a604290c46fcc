"""Augmentation by kornia on the device."""

from __future__ import annotations

import pytest
import torch

from mtvit_ops.photos import MEAN, STD
from mtvit_ops.train.device_views import DeviceViews, worker_options
from mtvit_ops.train.views import ViewOptions

pytest.importorskip("kornia", reason="augmentation on the device is kornia's")


def pixels(count: int = 4, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (torch.rand(count, 3, side, side, generator=generator) - mean) / std


def test_nothing_asked_for_changes_nothing() -> None:
    images = pixels()
    assert torch.equal(DeviceViews(ViewOptions())(images), images)


@pytest.mark.parametrize("options", [{"color_jitter": 0.4}, {"auto_augment": "rand-m9-n2"}, {"reprob": 0.9}])
def test_a_seed_fixes_the_draws_and_another_changes_them(options: dict[str, object]) -> None:
    views, images = DeviceViews(ViewOptions(**options)), pixels()  # type: ignore[arg-type]
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(views(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == images.shape
    assert results[0].dtype == torch.float32
    assert torch.isfinite(results[0]).all()
    assert torch.equal(images, pixels())  # the caller's batch is as it was


def test_colours_stay_colours() -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    seen = DeviceViews(ViewOptions(color_jitter=0.8))(pixels()) * std + mean
    assert seen.min() > -1e-5
    assert seen.max() < 1 + 1e-5


def test_erased_rectangles_take_the_mean_colour() -> None:
    torch.manual_seed(0)
    erased = DeviceViews(ViewOptions(reprob=1.0))(pixels())
    assert ((erased == 0).all(dim=1).flatten(1).sum(dim=1) > 0).all()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3", "rand-m0"])
def test_a_policy_without_a_counterpart_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="auto_augment must be"):
        DeviceViews(ViewOptions(auto_augment=policy))


def test_workers_keep_crop_and_mirror_only() -> None:
    left = worker_options(ViewOptions(scale=(0.2, 0.9), auto_augment="rand-m9", reprob=0.3))
    assert left == ViewOptions(scale=(0.2, 0.9))
