"""Image sets: the same from folder and zip, cached or not, in every worker; broken files are named and skipped."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import image_cases
import numpy as np
import pytest
import torch
from image_cases import CLASSES, NAMES, break_pictures, make_folder, make_zip, save_picture, small_pixels
from torch.utils.data import DataLoader

from mtvit_ops.photos import normalise, read_rgb
from mtvit_ops.progress import Progress
from mtvit_ops.train import _pixel_cache, images
from mtvit_ops.train.images import ImageSet, open_images
from mtvit_ops.train.views import EvalViews, View

IMAGENETTE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenette128.zip"

KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda folder, _: folder,
    "zip": lambda folder, base: make_zip(folder, base / "set.zip"),
    "deflated": lambda folder, base: make_zip(folder, base / "set.zip", compression=zipfile.ZIP_DEFLATED),
    "common-top": lambda folder, base: make_zip(folder, base / "set.zip", top="pictures/"),
}


def pixels(images: ImageSet) -> list[Any]:
    found = map(images.read, range(len(images)))
    return [None if image is None else np.asarray(image) for image in found]


@pytest.mark.parametrize("cache", [True, False, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_gives_the_same_set(kind: str, cache: bool | str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train", "val")
    found = open_images(KINDS[kind](folder, tmp_path), "train", cache=cache)
    assert (found.names, found.classes, found.problems) == (NAMES, CLASSES, [])
    assert found.targets == [CLASSES.index(name.split("/")[0]) for name in NAMES]
    for index, name in enumerate(NAMES):
        wanted = read_rgb(folder / "train" / name)
        if name == "cat-fish/long.png":
            wanted = wanted.crop((15, 0, 135, 30))
        image = found.read(index)
        assert image is not None
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(wanted))
    assert bool(found.cached_bytes) == bool(cache)


@pytest.mark.parametrize("top", ["", "pictures/"], ids=["no-top", "common-top"])
def test_class_folders_at_the_root(top: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "")
    found = [open_images(root, None) for root in (folder, make_zip(folder, tmp_path / "set.zip", top))]
    for each in found:
        assert (each.names, each.classes) == (NAMES, CLASSES)
    assert all(map(np.array_equal, pixels(found[0]), pixels(found[1])))


def test_one_class_with_folders_of_its_own_is_no_common_top(tmp_path: Path) -> None:
    for name in ("ant/a.png", "ant/young/b.png", "ant/old/c.png"):
        save_picture(tmp_path / "set" / name)
    assert open_images(make_zip(tmp_path / "set", tmp_path / "set.zip"), "").classes == ("ant",)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_workers_give_the_same_batches(kind: str, cache: bool, tmp_path: Path) -> None:
    root = KINDS[kind](make_folder(tmp_path / "set", "train"), tmp_path)
    views = EvalViews(open_images(root, "train", cache=cache), View(small_pixels, 16))
    here = list(DataLoader(views, batch_size=3))
    assert [len(batch[1]) for batch in here] == [3, 3, 1]
    for batch, again in zip(here, DataLoader(views, batch_size=3, num_workers=2), strict=True):
        assert all(map(torch.equal, batch, again))


def test_a_spawned_worker_shares_the_cache(tmp_path: Path) -> None:
    found = open_images(make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip"), "train", cache=True)
    views = EvalViews(found, View(normalise, 1))  # one by one: the sizes differ
    there = list(DataLoader(views, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert found._cache is not None
    assert all(chunk.is_shared() for chunk in found._cache._chunks)
    for (seen, target, index), expected in zip(there, map(views.__getitem__, range(len(views))), strict=True):
        assert torch.equal(seen, expected[0])
        assert (target, index) == expected[1:]


def test_threads_and_copies_read_the_same(tmp_path: Path) -> None:
    found = open_images(make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip"), "train", cache=False)
    expected = pixels(found)
    twin = pickle.loads(pickle.dumps(found))
    with ThreadPoolExecutor(4) as pool:
        for one, many in zip(expected, zip(*[iter(pool.map(twin.read, sorted([*range(len(found))] * 6)))] * 6)):
            assert all(np.array_equal(one, np.asarray(image)) for image in many)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_named_once_and_skipped(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train")
    reasons = break_pictures(folder / "train")
    root = KINDS[kind](folder, tmp_path)
    uncached, cached = open_images(root, "train", cache=False), open_images(root, "train", cache=True)
    assert uncached.problems == []
    assert len(uncached) == len(NAMES) + 3
    for _ in range(2):
        broken = [name for name, image in zip(uncached.names, pixels(uncached)) if image is None]
        assert broken == sorted(reasons)
        assert [problem.path for problem in uncached.problems] == broken
    assert all(reasons[problem.path] in problem.reason for problem in uncached.problems)
    assert cached.problems == uncached.problems
    assert (cached.dropped, uncached.dropped) == (3, 0)
    assert cached.names == NAMES
    assert cached.targets == [CLASSES.index(name.split("/")[0]) for name in NAMES]
    readable = [image for image in pixels(uncached) if image is not None]
    assert all(map(np.array_equal, pixels(cached), readable))


def test_what_a_worker_met_is_known_here(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train")
    reasons = break_pictures(folder / "train")
    found = open_images(folder, "train", cache=False)
    batches = list(DataLoader(EvalViews(found, View(small_pixels, 16)), batch_size=4, num_workers=2))
    targets = torch.cat([batch[1] for batch in batches]).tolist()
    assert [problem.path for problem in found.problems] == sorted(reasons)
    assert [target == -1 for target in targets] == [name in reasons for name in found.names]


def test_a_damaged_member_is_a_problem(tmp_path: Path) -> None:
    path = make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("train/ant/a.png").header_offset + 100
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    found = open_images(path, "train", cache=True)
    assert [problem.path for problem in found.problems] == ["ant/a.png"]
    assert "CRC" in found.problems[0].reason
    assert found.names == [name for name in NAMES if name != "ant/a.png"]


def spoilt(path: Path, name: str, compression: int) -> Path:
    """The archive with another byte in every eighth place of a packed file."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
        assert entry.compress_type == compression
    content = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len(name)
    for place in range(start + 9, start + entry.compress_size, 8):  # behind LZMA's own header
        content[place] ^= 255
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("cache", [True, False])
def test_a_damaged_member_is_a_problem_however_it_is_packed(cache: bool, compression: int, tmp_path: Path) -> None:
    path = make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip", compression=compression)
    found = open_images(spoilt(path, "train/ant/a.png", compression), "train", cache=cache)
    lost = [] if cache else [None]
    assert [image if image is None else 1 for image in pixels(found)] == [*lost, *[1] * (len(NAMES) - 1)]
    assert [problem.path for problem in found.problems] == ["ant/a.png"]
    assert found.problems[0].reason.startswith("cannot be read: ")


def test_a_member_packed_in_an_unknown_way_is_a_problem(tmp_path: Path) -> None:
    path = make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        archive.getinfo("train/ant/a.png").compress_type = 97  # what nobody reads
        found = open_images(path, "train", cache=False)
        assert found.problems == []
        found._storage._opened = os.getpid(), archive  # type: ignore[union-attr]
        assert found.read(0) is None
    assert "compression" in found.problems[0].reason


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_that_do_not_belong_are_named(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train")
    save_picture(folder / "train" / "stray.png")
    (folder / "train" / "ant" / "notes.txt").write_text("six legs")
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "later.txt").write_text("no picture yet")
    found = open_images(KINDS[kind](folder, tmp_path), "train")
    assert found.names == NAMES
    assert [(problem.path, problem.reason) for problem in found.problems] == [
        ("ant/notes.txt", "is no picture by its name"),
        ("dog", "holds no picture"),
        ("dog/later.txt", "is no picture by its name"),
        ("stray.png", "lies outside the class folders"),
    ]


def test_names_that_lead_out_of_the_archive(tmp_path: Path) -> None:
    path = make_zip(make_folder(tmp_path / "inner" / "set", "train"), tmp_path / "inner" / "set.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("train/../../out.png", "/train/ant/absolute.png", "../train/ant/up.png"):
            archive.writestr(name, b"x")
    before = sorted(tmp_path.rglob("*"))
    found = open_images(path, "train", cache=True)
    assert found.names == NAMES
    assert [problem.path for problem in found.problems] == ["../../out.png"]
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_pipes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train") / "train"
    (folder / "dog").symlink_to(folder / "bee", target_is_directory=True)  # as large sets are put together
    (folder / "ant" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "ant" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "ant" / "self.png").symlink_to(folder / "ant" / "self.png")
    os.mkfifo(folder / "ant" / "pipe.png")
    found = open_images(folder, None, cache=True)
    assert found.names == sorted([*NAMES, "dog/a.png", "dog/b.png"])
    assert [problem.path for problem in found.problems] == ["ant/gone.png", "ant/pipe.png", "ant/self.png"]


def test_a_models_label_map(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "val")
    labels = ("wasp", *reversed(CLASSES))
    found = open_images(folder, "val", classes=labels)
    assert found.classes == labels
    assert [labels[target] for target in found.targets] == [name.split("/")[0] for name in NAMES]
    with pytest.raises(ValueError, match="2 class folders that are not among the 2 classes: cat, cat-fish"):
        open_images(folder, "val", classes=("ant", "bee"))
    with pytest.raises(ValueError, match="twice"):
        open_images(folder, "val", classes=(*CLASSES, "ant"))
    with pytest.raises(TypeError, match="one str"):
        open_images(folder, "val", classes="ant")


def encrypt(path: Path) -> None:
    """Set the flag of encryption in every entry of the archive's directory."""
    content = path.read_bytes()
    pieces = content.split(b"PK\x01\x02")
    path.write_bytes(b"PK\x01\x02".join([pieces[0], *(p[:4] + bytes([p[4] | 1]) + p[5:] for p in pieces[1:])]))


def test_errors_at_the_door(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train", "val")
    archive = make_zip(folder, tmp_path / "set.zip")
    with pytest.raises(FileNotFoundError, match="there is none at"):
        open_images(tmp_path / "nowhere", "train")
    for root in (folder, archive, make_zip(folder, tmp_path / "top.zip", "top/")):
        with pytest.raises(ValueError, match=r"split must be a folder in .*, got 'test'; there are: (train, val|top)"):
            open_images(root, "test")
    for root in (folder, archive):
        with pytest.raises(ValueError, match="holds splits, not classes: split must be one of train, val"):
            open_images(root, None)
    with pytest.raises(ValueError, match="name of a sub-folder"):
        open_images(folder, "train/../val")
    with pytest.raises(TypeError, match="split must be a str"):
        open_images(folder, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache must be"):
        open_images(folder, "train", cache="yes")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image in a class folder"):
        open_images(tmp_path / "empty", "train")


def test_no_zip_archive(tmp_path: Path) -> None:
    archive = make_zip(make_folder(tmp_path / "set", "train"), tmp_path / "set.zip")
    for content in (b"", b"text", archive.read_bytes()[:-60], b"PK\x05\x06" + bytes(10)):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.zip is not a zip archive that can be read"):
            open_images(tmp_path / "bad.zip", "train")
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    with pytest.raises(ValueError, match="holds no image"):
        open_images(tmp_path / "none.zip", None)
    encrypt(archive)
    with pytest.raises(ValueError, match="is encrypted"):
        open_images(archive, "train")


def test_nothing_readable(tmp_path: Path) -> None:
    break_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"holds no image that can be read; cat/text\.png is not a picture"):
        open_images(tmp_path, None, cache=True)
    found = open_images(tmp_path, None, cache=False)
    assert pixels(found) == [None, None, None]
    with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
        found.read(3)


def test_auto_takes_a_third_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "set", "train")
    needed = open_images(folder, "train", cache=True).cached_bytes
    assert needed == sum(min(w, 4 * h) * h * 3 for (w, h), _ in image_cases.PICTURES.values())
    for available, is_cached in ((3 * needed, True), (3 * needed - 1, False), (None, False)):
        monkeypatch.setattr(images, "available_memory", lambda available=available: available)
        assert bool(open_images(folder, "train").cached_bytes) == is_cached
    monkeypatch.setattr(images, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="cache=True needs about"):
        open_images(folder, "train", cache=True)


def test_a_guess_that_was_too_low(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", "train")
    break_pictures(folder / "train")
    found = open_images(folder, "train", cache=False)
    assert not found.fill_cache(20_000, Progress())
    assert (found.cached_bytes, len(found)) == (0, len(NAMES) + 3)
    assert found.fill_cache(None, Progress())
    assert found.names == NAMES


def test_pictures_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pixel_cache, "_CHUNK", 100)
    cache = _pixel_cache.PixelCache()
    generator = np.random.default_rng(0)
    kept = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((2, 5), (7, 3), (11, 4), (1, 1), (4, 8))]
    for picture in kept:
        cache.append(picture)
    cache.close()
    assert len(cache) == 5
    assert cache.nbytes == sum(picture.size for picture in kept)
    for index, picture in enumerate(kept):
        np.testing.assert_array_equal(cache[index], picture)


def test_memory_of_a_container(tmp_path: Path) -> None:
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 150\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert _pixel_cache._of_container(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert _pixel_cache._of_container(tmp_path) is None
    assert _pixel_cache._of_container(tmp_path / "nowhere") is None
    available = _pixel_cache.available_memory()
    assert available is not None
    assert available > 0


@pytest.mark.skipif(not IMAGENETTE.is_file(), reason=f"no photographs: there is no file {IMAGENETTE}")
def test_imagenette() -> None:
    train, val = (open_images(IMAGENETTE, split, cache=False) for split in ("train", "val"))
    assert (len(train), len(val)) == (9469, 3925)
    assert train.classes == val.classes
    assert len(val.classes) == 10
    assert min(np.bincount(val.targets)) > 300
    views = EvalViews(val, View(small_pixels, 16))
    seen, targets, indices = next(iter(DataLoader(views, batch_size=64, sampler=range(0, 3925, 60))))
    assert seen.shape == (64, 3, 16, 16)
    assert targets.tolist() == [val.targets[index] for index in indices]
    assert sorted(set(targets.tolist())) == list(range(10))
    assert val.problems == []


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pixel_cache, "_of_machine", lambda: 800)
    monkeypatch.setattr(_pixel_cache, "_of_container", lambda folder: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert _pixel_cache.available_memory() == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _pixel_cache.available_memory() == 100


def test_a_process_s_share_of_the_memory_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "set", "train")
    needed = open_images(folder, "train", cache=True).cached_bytes
    monkeypatch.setattr(_pixel_cache, "_of_container", lambda folder: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for available, is_cached in ((4 * 3 * needed, True), (4 * 3 * needed - 4, False)):
        monkeypatch.setattr(_pixel_cache, "_of_machine", lambda available=available: available)
        assert bool(open_images(folder, "train").cached_bytes) == is_cached
