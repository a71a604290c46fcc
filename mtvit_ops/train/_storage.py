"""Where image files lie: in a folder or in a zip archive, listed and read alike."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..photos import Problem

_MOST_BYTES = 1 << 30  # of one file: beyond it is no photograph, but perhaps an archive made to fill the memory


class FolderStorage:
    """Files below a folder.

    Args:
        folder: is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_names(self) -> tuple[list[str], list[Problem]]:
        """Names below the folder with ``/`` between their parts, folders with one at the end, in no order."""
        names: list[str] = []
        problems: list[Problem] = []
        # a link may lead to a folder above it: folders on the way down are not entered again
        waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]
        while waiting:
            inner, above = waiting.pop()
            path = self._folder / inner
            real = os.path.realpath(path)
            try:
                entries = list(os.scandir(path)) if real not in above else []
            except OSError as error:
                problems.append(Problem(inner.rstrip("/") or ".", f"cannot be read: {error.strerror}"))
                continue
            for entry in entries:
                name = inner + entry.name
                if is_hidden(entry.name):
                    continue
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link to itself
                    is_folder = is_file = False
                if is_folder:
                    names.append(f"{name}/")
                    waiting.append((f"{name}/", (*above, real)))
                elif is_file:  # a pipe would keep its reader waiting
                    names.append(name)
                else:
                    problems.append(Problem(name, "is not a file"))
        return names, problems

    def read_bytes(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            ValueError: it cannot be read; the message says why.
        """
        try:
            with open(self._folder / name, "rb") as file:
                _check_length(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None


class ZipStorage:
    """Files below a folder of a zip archive; nothing is ever extracted to a disk.

    Each process opens the archive for itself at its first reading, so an instance may be pickled and may be carried
    across a fork; threads share what their process opened.

    Args:
        path: the archive.

    Raises:
        ValueError: it is no zip archive, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._prefix = ""
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            self._archive()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a zip archive that can be read: {error}") from None

    def enter(self, prefix: str) -> None:
        """Make names relative to a folder of the archive, whose name ends in ``/``."""
        self._prefix = prefix

    def list_names(self) -> tuple[list[str], list[Problem]]:
        """Names below the folder, folders with ``/`` at the end, in no order.

        Raises:
            ValueError: files are encrypted.
        """
        names: list[str] = []
        problems: list[Problem] = []
        for whole, entry in self._archive().NameToInfo.items():
            if not whole.startswith(self._prefix) or whole == self._prefix:
                continue
            name = whole[len(self._prefix) :]
            if whole.startswith("/") or ".." in whole.split("/"):
                problems.append(Problem(name, "has a name that leads out of the archive"))
            elif not is_hidden(name):
                if entry.flag_bits & 1:
                    raise ValueError(f"{self._path} is encrypted ({whole} for one): encrypted archives cannot be read")
                names.append(name)
        return names, problems

    def read_bytes(self, name: str) -> bytes:
        """The content of a file, its checksum checked.

        Raises:
            ValueError: it cannot be read; the message says why.
        """
        try:
            archive = self._archive()
            entry = archive.getinfo(self._prefix + name)
        except KeyError:
            raise ValueError("is no longer in the archive") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"cannot be read: {error}") from None
        _check_length(entry.file_size)
        try:
            return archive.read(entry)
        except MemoryError:
            raise
        except Exception as error:  # each way of packing has errors of its own for what is damaged
            raise ValueError(f"cannot be read: {str(error) or type(error).__name__}") from None

    def _archive(self) -> zipfile.ZipFile:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():  # a file's position is shared across a fork
            self._opened = opened = os.getpid(), zipfile.ZipFile(self._path)
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


Storage = FolderStorage | ZipStorage


def is_hidden(name: str) -> bool:
    """Whether a part of the name is hidden, or archivers' own."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_storage(root: Path, split: str) -> Storage:
    """A folder, or a zip archive, entered as far as the folder that holds the class folders.

    An archive's one common top folder is passed over: where ``split`` lies in it, or, without ``split``, where it holds
    two folders or more.

    Args:
        root: a folder or a zip archive.
        split: a folder in it; empty: ``root`` itself.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is no zip archive, or there is no such folder in it; the message names those there are.
    """
    if root.is_dir():
        if not (root / split).is_dir():
            there = (entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
            raise _no_split(root, split, there)
        return FolderStorage(root / split)
    if not root.exists():
        raise FileNotFoundError(f"root must be a folder or a zip archive, there is none at {root}")
    storage = ZipStorage(root)
    names, _ = storage.list_names()
    first = names[0].partition("/")[0] + "/" if names else ""
    inside = [name[len(first) :] for name in names if name.startswith(first) and name != first]
    wrapped = bool(inside) and all(name.startswith(first) for name in names)
    if split:
        prefixes = (f"{split}/", f"{first}{split}/") if wrapped else (f"{split}/",)
        for prefix in prefixes:
            if any(name.startswith(prefix) for name in names):
                storage.enter(prefix)
                return storage
        raise _no_split(root, split, _folders(names))
    if wrapped and len(_folders(inside)) > 1 and all("/" in name for name in inside):
        storage.enter(first)
    return storage


def _folders(names: Iterable[str]) -> set[str]:
    return {name.partition("/")[0] for name in names if "/" in name}


def _no_split(root: Path, split: str, there: Iterable[str]) -> ValueError:
    return ValueError(
        f"split must be a folder in {root}, got {split!r}; there are: {', '.join(sorted(there)) or 'none'}"
    )


def _check_length(size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"is too large for a picture: {size} bytes")
