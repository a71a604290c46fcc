"""What the tests of the training loop share: a tiny data set, a recipe that takes seconds, and equality of runs."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtvit_ops.progress import Progress
from mtvit_ops.train.recipe import Recipe, load_recipe

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [train]")
for package in ("accelerate", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: extra [train]")

CLASSES = ("ant", "bee")
TRAIN_IMAGES, VAL_IMAGES = 24, 11  # an odd number to evaluate: two processes get different shares

MICRO = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1}
DENSE = {"name": "vit_tiny_patch16_224", **MICRO}
# so steep a gate that some tokens halt in every block
A_VIT = {"name": "avit_tiny_patch16_224", **MICRO, "depth": 3, "gate_scale": 40.0, "gate_center": 0.0}
# grids of 4, 2 and 1
LEVIT = {
    "name": "evolevit_128s_224",
    "img_size": 64,
    "embed_dim": [16, 32, 48],
    "key_dim": 8,
    "num_heads": [2, 2, 2],
    "depth": [1, 2, 1],
    "keep_ratios": [1.0, 1.0, 0.5, 1.0],
    "class_head": True,
}

RECIPE: dict[str, Any] = {
    "title": "a test",
    "model": DENSE,
    "optimiser": {"batch_size": 4, "epochs": 2, "lr": 1e-3, "clip_grad": 1.0, "ema_decay": 0.9},
    "data": {"workers": 0},
    "mix": {"mixup": 0.8, "cutmix": 1.0},
    "run": {"save_steps": 2, "log_steps": 1, "eval_batch": 4},
}
STEPS = 12  # 2 epochs of 24 images by 4


def make_recipe(changes: Mapping[str, Any] | None = None) -> Recipe:
    """``RECIPE`` with changes by dotted name."""
    return load_recipe(copy.deepcopy(RECIPE), changes)


def write_recipe(path: Path, content: Mapping[str, Any] = RECIPE) -> Path:
    """A recipe's tables as TOML; JSON's strings, numbers and lists are TOML's too."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items() if not isinstance(value, Mapping)]
    for table, values in content.items():
        if isinstance(values, Mapping):
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines))
    return path


def make_data(root: Path, *, val: int = VAL_IMAGES, classes: tuple[str, ...] = CLASSES, side: int = 24) -> Path:
    """Noise whose colour tells the class, in ``root/train`` and ``root/val``."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", val)):
        for index in range(count):
            kind = index % len(classes)
            pixels = generator.integers(0, 256, (side, side + index % 3, 3), np.uint8)
            pixels[..., kind % 3] //= 3
            path = root / split / classes[kind] / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, without the time that they took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines if line["kind"] == kind]


def same_bits(one: Any, other: Any) -> bool:
    """Whether nested containers hold the same tensors, bit for bit, and the same other values."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and list(one) == list(other)
            and all(same_bits(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and one == other


def assert_same_run(out: Path, wanted: Path) -> None:
    """Two finished runs: files of weights, state and records, bit for bit."""
    for name in ("best.safetensors", "last.safetensors"):
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (out, wanted)]
    for state in states:
        assert state.pop("seconds") > 0
    for key in states[1]:
        assert same_bits(states[0][key], states[1][key]), key
    assert states[0].keys() == states[1].keys()
    for kind in ("train", "evaluate"):
        assert records(out, kind) == records(wanted, kind)
    assert [record["step"] for record in records(out, "train")] == list(range(1, STEPS + 1))
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


class StopsAt(Progress):
    """Sends the process a signal once it is told of a step."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number, self.said = step, number, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)
        if f"step {self.step}/" in text:
            os.kill(os.getpid(), self.number)
