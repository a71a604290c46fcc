"""Small sets of pictures on disk, shared by the tests of training data."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mtvit_ops.photos import normalise

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [train]")

PICTURES = {  # name below the split, (width, height), mode
    "ant/a.png": ((40, 30), "RGB"),
    "ant/b.JPG": ((31, 50), "RGB"),
    "ant/deep/deeper/c.webp": ((33, 33), "RGB"),
    "bee/a.png": ((48, 37), "L"),
    "bee/b.png": ((36, 41), "RGBA"),
    "cat-fish/long.png": ((150, 30), "RGB"),  # wider than four times its height
    "cat/é.jpeg": ((64, 48), "RGB"),
}
NAMES = sorted(PICTURES)
CLASSES = ("ant", "bee", "cat", "cat-fish")


def save_picture(path: Path, size: tuple[int, int] = (32, 32), mode: str = "RGB", seed: int = 0) -> Path:
    """Random soft colours, other ones for another seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).convert(mode).save(path)
    return path


def make_folder(root: Path, *splits: str) -> Path:
    """``root`` with all of ``PICTURES`` in each split, and files that are to be passed over."""
    for number, split in enumerate(splits):
        for seed, (name, (size, mode)) in enumerate(PICTURES.items()):
            save_picture(root / split / name, size, mode, seed + 100 * number)
        for name in (".DS_Store", "ant/.hidden.png", "__MACOSX/ant/._a.png"):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(b"not for you")
    return root


def make_zip(folder: Path, path: Path, top: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    """The files of a folder, in an order of their own, below ``top``."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*"), key=lambda file: file.name, reverse=True):
            if file.is_file():
                archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return path


def break_pictures(split: Path) -> dict[str, str]:
    """Three broken files in class folders; what their reasons must say."""
    whole = save_picture(split / "ant" / "whole.jpg", (60, 60)).read_bytes()
    (split / "ant" / "whole.jpg").unlink()
    for name in ("bee", "cat"):
        (split / name).mkdir(exist_ok=True)
    (split / "ant" / "empty.png").write_bytes(b"")
    (split / "bee" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (split / "cat" / "text.png").write_text("this is no picture")
    return {"ant/empty.png": "not a picture", "bee/cut.jpg": "truncated", "cat/text.png": "not a picture"}


def small_pixels(image: Any) -> Tensor:
    """A view without timm, which a worker of any kind can import."""
    return normalise(image.resize((16, 16)))
