"""Reading many photographs: a sample is kept, the rest comes and goes, and each bad file is named once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .photos import Photo, PhotoFile, Problem, load_photo
from .progress import Progress

VIEW_SIZE = 336  # side of a picture's panels, pixels


class PhotoReader:
    """Reads photographs, keeps the sample, and reports each bad file once."""

    def __init__(self, img_size: int, progress: Progress, problems: list[Problem]) -> None:
        self._img_size, self._progress, self._problems = img_size, progress, problems
        self._kept: dict[Path, Photo | None] = {}

    def sample(self, files: Sequence[PhotoFile], size: int) -> list[Photo]:
        """Photographs from all over the list, in its order."""
        spaced = sorted({index * len(files) // size for index in range(size)})
        for index in self._progress.track(spaced, "reading photographs"):
            self._kept[files[index].path] = self.read(files[index])
        photos = [photo for photo in self._kept.values() if photo is not None]
        for file in files if not photos else ():
            photo = self._kept[file.path] = self.read(file)
            if photo is not None:
                return [photo]
        return photos

    def read(self, file: PhotoFile) -> Photo | None:
        if file.path in self._kept:
            return self._kept[file.path]
        try:
            return load_photo(file, self._img_size, VIEW_SIZE)
        except ValueError as error:
            problem = Problem(str(file.path), str(error))
            if problem not in self._problems:
                self._problems.append(problem)
                self._progress.say(f"{problem.path}: {problem.reason}")
            return None
