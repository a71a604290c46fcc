"""A labelled set of images: a folder of class folders, or a zip archive of one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..photos import SUFFIXES, Problem, read_rgb, require_pillow, without_far_ends
from ..progress import Progress
from ._pixel_cache import PixelCache, available_memory
from ._storage import Storage, open_storage

if TYPE_CHECKING:
    from PIL.Image import Image

_SAMPLE = 64  # images decoded to guess what all of them need
_SHARE = 3  # the cache may take this part of the memory there is: spawned workers and the training want some too
_MOST_THREADS = 8  # decoding them all; reading the files is in turn
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class ImageSet:
    """Images with classes; made by ``open_images``.

    A broken image is named once in ``problems``, in whichever process it was met: loader workers share the note of it.
    An instance may be pickled, forked and read by several threads.

    Attributes:
        place: where they are, for messages.
        classes: the label map, one folder name for each output.
        names: paths inside the set, ``"n01440764/x.webp"``, sorted.
        targets: an index into ``classes`` for each image.
        dropped: how many broken images a cache left out, which are in no list any more.
    """

    def __init__(
        self,
        storage: Storage,
        classes: tuple[str, ...],
        names: list[str],
        targets: list[int],
        problems: Sequence[Problem],
        place: str,
    ) -> None:
        self.place = place
        self.classes, self.names, self.targets = classes, names, targets
        self._storage = storage
        self._cache: PixelCache | None = None
        self.dropped = 0
        self._found = list(problems)
        self._reasons: dict[int, str] = {}
        # bytes that every worker sees: which images are broken
        self._broken = torch.zeros(len(names), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def cached_bytes(self) -> int:
        """Memory that decoded images take; 0: they are decoded at every reading."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def problems(self) -> list[Problem]:
        """What could not be used so far, and why: files by their order in the set, after what the listing found."""
        found = list(self._found)
        for index in self._broken.nonzero().flatten().tolist():
            if index not in self._reasons:  # met by another process
                try:
                    self._decode(index)
                    self._reasons[index] = "could not be read by a loader worker"
                except ValueError as error:
                    self._reasons[index] = str(error)
            found.append(Problem(self.names[index], self._reasons[index]))
        return found

    def read(self, index: int) -> Image | None:
        """An image as RGB, its rotation tag respected; None: it is broken, and now one of ``problems``.

        What is more than four times as long as wide is cut to its middle. With and without a cache the pixels are the
        same.

        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        if self._cache is not None:
            from PIL import Image as PillowImage

            return PillowImage.fromarray(self._cache[index])
        if self._broken[index]:
            return None
        try:
            return self._decode(index)
        except ValueError as error:
            self._reasons[index] = str(error)
            self._broken[index] = 1
            return None

    def fill_cache(self, most_bytes: int | None, progress: Progress) -> bool:
        """Decode every image once and drop the broken ones from the set.

        Args:
            most_bytes: give up where the cache would be larger; None: it may be as large as it gets.
            progress: told how far the work is.

        Returns:
            Whether the cache is there; where not, the set is as before.
        """
        cache = PixelCache()
        kept = []
        for index, pixels in zip(progress.track(range(len(self)), "decoding images"), self._decode_all()):
            if pixels is None:
                continue
            if most_bytes is not None and cache.nbytes + pixels.size > most_bytes:
                return False
            cache.append(pixels)
            kept.append(index)
        cache.close()
        self._found = self.problems
        self.dropped += len(self) - len(kept)
        self.names = [self.names[index] for index in kept]
        self.targets = [self.targets[index] for index in kept]
        self._reasons = {}
        self._broken = torch.zeros(len(kept), dtype=torch.uint8).share_memory_()
        self._cache = cache
        return True

    def _decode(self, index: int) -> Image:
        return without_far_ends(read_rgb(BytesIO(self._storage.read_bytes(self.names[index]))))

    def _pixels(self, index: int) -> Any:
        import numpy as np

        image = self.read(index)
        return None if image is None else np.asarray(image)

    def _decode_all(self) -> Iterator[Any]:
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Any]] = deque()
            try:
                for index in range(len(self)):
                    # a few ahead and no more: decoded pictures wait in memory
                    if len(waiting) > 2 * threads:
                        yield waiting.popleft().result()
                    waiting.append(pool.submit(self._pixels, index))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def open_images(
    root: str | Path,
    split: str | None,
    *,
    classes: Sequence[str] | None = None,
    cache: bool | str = "auto",
    progress: Progress | None = None,
) -> ImageSet:
    """Open a folder or a zip archive in the layout ``split/class/.../image.jpg``.

    Classes are the folders in ``split`` that hold a picture at any depth. Hidden files and ``__MACOSX`` are passed
    over; other files that are no pictures by their names, or lie in no class folder, are ``problems``. The same files
    give the same set from a folder and from an archive, whose one common top folder is passed over.

    Args:
        root: the folder or the archive. Nothing is ever extracted.
        split: the sub-folder to take, such as ``"train"``; None or empty: ``root`` itself holds the class folders.
        classes: the label map of a model: the folder name of each output, in order; folders may be missing, but not be
            others. None: the sorted folder names are the label map.
        cache: True: decode everything now, once, and keep it; False: decode at every reading; ``"auto"``: keep it where
            it takes at most a third of the memory there is (where nobody knows how much: do not).
        progress: told how far the decoding is.

    Returns:
        The images, sorted by name. With a cache, broken ones are dropped and named in ``problems``.

    Raises:
        FileNotFoundError: there is no such path.
        ImportError: Pillow is not installed.
        TypeError: an argument of another kind.
        ValueError: no zip archive, an encrypted one, no such split, no image, none that can be read (where they are
            decoded), class folders that are not in ``classes``, or images that do not fit into memory with ``cache``.
    """
    if cache not in (True, False, "auto"):
        raise ValueError(f"cache must be True, False or 'auto', got {cache!r}")
    require_pillow("train")
    where = _checked_split(split)
    storage = open_storage(Path(root), where)
    place = f"{root}, split {where!r}" if where else str(root)
    listed, problems = storage.list_names()
    names, others = _pictures(sorted(listed))
    if not names:
        raise ValueError(f"{place} holds no image in a class folder ({', '.join(SUFFIXES)})")
    folders = sorted({name.partition("/")[0] for name in names})
    if not where and set(folders) <= _SPLITS:
        raise ValueError(f"{place} holds splits, not classes: split must be one of {', '.join(folders)}")
    labels = _label_map(place, folders, classes)
    number = {label: index for index, label in enumerate(labels)}
    targets = [number[name.partition("/")[0]] for name in names]
    images = ImageSet(storage, labels, names, targets, sorted([*problems, *others]), place)
    decode_images(images, cache, progress or Progress())
    return images


def decode_images(images: ImageSet, cache: bool | str, progress: Progress) -> None:
    """Decode the images now as ``open_images`` does, once they are open.

    Raises:
        ValueError: none can be read, or they do not fit into memory with ``cache`` True.
    """
    if cache is not False:
        _fill(images, cache is True, progress)


def _checked_split(split: str | None) -> str:
    if split is not None and not isinstance(split, str):
        raise TypeError(f"split must be a str or None, got {type(split).__name__}")
    where = (split or "").strip("/")
    if any(part in (".", "..", "") for part in where.split("/")) and where:
        raise ValueError(f"split must be the name of a sub-folder, got {split!r}")
    return where


def _pictures(listed: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """The pictures in class folders, and what else there is."""
    names: list[str] = []
    problems: list[Problem] = []
    for name in listed:
        if name.endswith("/"):
            continue
        if "/" not in name:
            problems.append(Problem(name, "lies outside the class folders"))
        elif not name.lower().endswith(SUFFIXES):
            problems.append(Problem(name, "is no picture by its name"))
        else:
            names.append(name)
    filled = {name.partition("/")[0] for name in names}
    empty = sorted({name.partition("/")[0] for name in listed if "/" in name} - filled)
    return names, [*problems, *(Problem(folder, "holds no picture") for folder in empty)]


def _label_map(place: str, folders: list[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None:
        return tuple(folders)
    if isinstance(classes, str):
        raise TypeError("classes must be a sequence of folder names, got one str")
    if len(set(classes)) != len(classes):
        raise ValueError("classes must be different names, got one of them twice")
    unknown = [folder for folder in folders if folder not in set(classes)]
    if unknown:
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"{place} has {len(unknown)} class folders that are not among the {len(classes)} classes: {some}"
        )
    return tuple(classes)


def _fill(images: ImageSet, must: bool, progress: Progress) -> None:
    available = available_memory()
    if available is None and not must:
        return
    most = None if available is None else available if must else available // _SHARE
    count = len(images)
    spread = sorted({index * count // _SAMPLE for index in range(_SAMPLE)})
    sizes = [image.width * image.height * 3 for image in map(images.read, spread) if image is not None]
    needed = sum(sizes) * count // max(1, len(sizes))
    if (most is not None and needed > most) or not images.fill_cache(most, progress):
        if must:
            raise ValueError(
                f"cache=True needs about {needed >> 20} MiB for the images of {images.place}, and"
                f" {(available or 0) >> 20} MiB are free: cache=False decodes them at every reading"
            )
        return
    if not len(images):
        problem = images.problems[-1]
        raise ValueError(f"{images.place} holds no image that can be read; {problem.path} {problem.reason}")
