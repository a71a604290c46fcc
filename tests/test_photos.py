"""Photographs: what is found, what the models see, and what is said about bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtvit_ops.photos import (
    DEFAULT_PHOTOS,
    MEAN,
    STD,
    PhotoFile,
    centre_square,
    default_photos,
    find_labels,
    find_photos,
    load_photo,
)
from mtvit_ops.progress import Progress
from mtvit_ops.reading import PhotoReader

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [demo]")


def save(path: Path, mode: str = "RGB", colour: object = (255, 0, 0), size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_default_photos_are_free_and_there() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed: extra [demo]")
    found = default_photos()
    assert found.problems == ()
    assert [file.path.name for file in found.files] == [photo.file for photo in DEFAULT_PHOTOS]
    for photo in DEFAULT_PHOTOS:
        assert photo.licence.startswith(("CC0", "public domain"))
    for file in found.files:
        assert load_photo(file, 32, 32).pixels.shape == (3, 32, 32)


CASES = {  # mode, colour, the RGB it must become
    "rgb": ("RGB", (255, 0, 51), (255, 0, 51)),
    "grey": ("L", 102, (102, 102, 102)),
    "grey-alpha": ("LA", (0, 0), (255, 255, 255)),
    "transparent-is-white": ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    "opaque": ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    "one-bit": ("1", 1, (255, 255, 255)),
    "sixteen-bits": ("I;16", 257 * 51, (51, 51, 51)),
    "palette": ("P", 0, (0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mode_becomes_rgb(case: str, tmp_path: Path) -> None:
    mode, colour, wanted = CASES[case]
    photo = load_photo(PhotoFile(save(tmp_path / "photo.png", mode, colour)), 16, 20)
    assert photo.view.size == (20, 20)
    assert photo.view.getpixel((10, 10)) == wanted
    normalised = (torch.tensor(wanted) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(photo.pixels, normalised[:, None, None].expand(3, 16, 16), rtol=0, atol=1e-6)


def test_rotation_tag_is_respected(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # the stored top is white
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 3  # turned by half a turn
    image.save(tmp_path / "turned.png", exif=exif)
    view = load_photo(PhotoFile(tmp_path / "turned.png"), 16, 16).view
    assert view.getpixel((8, 1)) == (0, 0, 0)
    assert view.getpixel((8, 14)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(100, 100), (300, 100), (100, 300), (1, 1), (3, 4000), (2000, 1)], ids=str)
def test_the_centre_is_cut_out(size: tuple[int, int]) -> None:
    assert centre_square(Image.new("RGB", size), 28).size == (28, 28)


def test_the_crop_is_that_of_deit() -> None:
    # 256 x 256 needs no resizing for 224: the crop must be the middle, pixel for pixel
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert np.array_equal(np.asarray(centre_square(Image.fromarray(pixels), 224)), pixels[16:240, 16:240])


def test_a_long_strip_needs_no_long_buffer(tmp_path: Path) -> None:
    path = save(tmp_path / "strip.png", size=(20000, 2))
    assert load_photo(PhotoFile(path), 224, 224).view.size == (224, 224)


def broken_files(folder: Path) -> dict[str, Path]:
    whole = save(folder / "whole.png", size=(200, 200), colour=(1, 2, 3)).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.jpg")
    files = {
        "truncated-jpg": (folder / "noise.jpg").read_bytes()[:900],
        "truncated-png": whole[: len(whole) // 2],
        "text": b"this is no picture",
        "empty": b"",
    }
    (folder / "whole.png").unlink()
    (folder / "noise.jpg").unlink()
    for name, content in files.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return {name: folder / f"{name}.jpg" for name in files}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated-jpg", "cannot be read"),
        ("truncated-png", "cannot be read"),
        ("text", "not a picture"),
        ("empty", "not a picture"),
    ],
)
def test_broken_files_say_why(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load_photo(PhotoFile(broken_files(tmp_path)[name]), 16, 16)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        load_photo(PhotoFile(path), 16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # between one and two times the limit: only large
    assert load_photo(PhotoFile(path), 16, 16).pixels.shape == (3, 16, 16)


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "cat/c.png", "cat/deep/d.png", ".hidden.png", ".cache/e.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = find_photos([tmp_path])
    names = [(file.path.name, file.folder) for file in found.files]
    assert sorted(names, key=str) == [("a.JPG", None), ("b.png", None), ("c.png", "cat"), ("d.png", "cat")]
    assert [path.name for path in found.ignored] == ["notes.txt"]
    assert found.problems == ()


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = find_photos([tmp_path / "nothing.png", tmp_path / "empty", save(tmp_path / "a.png")])
    assert len(found.files) == 1
    assert [Path(problem.path).name for problem in found.problems] == ["nothing.png", "empty"]
    assert "no such file" in found.problems[0].reason
    assert "no picture" in found.problems[1].reason


FILES = [PhotoFile(Path("x/dog/1.png"), "dog"), PhotoFile(Path("x/cat/2.png"), "cat")]


def test_labels_are_sorted_folders() -> None:
    assert find_labels(FILES, 2).indices == (1, 0)


def test_labels_from_names() -> None:
    assert find_labels(FILES, 4, ["dog", "cow", "cat", "owl"]).indices == (0, 2)


@pytest.mark.parametrize(
    ("files", "outputs", "names", "reason"),
    [
        (FILES, 1000, None, "2 class folders for 1000 outputs"),
        ([PhotoFile(Path("a.png"))], 1, None, "no class folders"),
        ([*FILES, PhotoFile(Path("a.png"))], 2, None, "outside"),
        (FILES, 2, ["dog", "cow"], "'cat'"),
        (FILES, 2, ["dog"], "names 1 classes for 2"),
    ],
    ids=["too-few", "none", "mixed", "unnamed-folder", "short-list"],
)
def test_no_labels_says_why(files: list[PhotoFile], outputs: int, names: list[str] | None, reason: str) -> None:
    labels = find_labels(files, outputs, names)
    assert labels.indices is None
    assert reason in labels.reason


def test_the_sample_is_spread_and_bad_files_are_named_once(tmp_path: Path) -> None:
    files = [PhotoFile(save(tmp_path / f"{index}.png")) for index in range(8)]
    files[4].path.write_bytes(b"no picture")
    problems: list = []
    reader = PhotoReader(16, Progress(), problems)
    assert [photo.file.path.stem for photo in reader.sample(files, 4)] == ["0", "2", "6"]
    assert reader.read(files[4]) is None
    assert [Path(problem.path).stem for problem in problems] == ["4"]


def test_the_sample_goes_on_until_a_file_is_good(tmp_path: Path) -> None:
    files = [PhotoFile(tmp_path / f"{index}.png") for index in range(3)]
    for file in files[:2]:
        file.path.write_bytes(b"no picture")
    save(files[2].path)
    problems: list = []
    assert [photo.file for photo in PhotoReader(16, Progress(), problems).sample(files, 1)] == [files[2]]
    assert len(problems) == 2
