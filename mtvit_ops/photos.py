"""Photographs: finding them, reading them, and what the models see of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, what the published weights expect
STD = (0.229, 0.224, 0.225)
RESIZE = 256 / 224  # shorter side before the crop, over the crop
_LONGEST = 4  # times the shorter side: beyond that the ends are cut off before resizing, for memory


class DefaultPhoto(NamedTuple):
    """A free photograph inside scikit-image's wheel."""

    file: str
    licence: str
    shows: str


DEFAULT_PHOTOS = (
    DefaultPhoto("astronaut.png", "public domain, NASA", "Eileen Collins before the shuttle"),
    DefaultPhoto("camera.png", "CC0, Lav Varshney", "a photographer"),
    DefaultPhoto("chelsea.png", "CC0, Stefan van der Walt", "the cat Chelsea"),
    DefaultPhoto("clock_motion.png", "public domain, Stefan van der Walt", "a clock, blurred by motion"),
    DefaultPhoto("coffee.png", "CC0, Rachel Michetti", "a cup of coffee"),
    DefaultPhoto("hubble_deep_field.jpg", "public domain, NASA", "galaxies"),
    DefaultPhoto("retina.jpg", "CC0, Häggström", "an eye's retina"),
    DefaultPhoto("rocket.jpg", "public domain, SpaceX", "a rocket on its pad"),
)


class PhotoFile(NamedTuple):
    """A file to read, and the class folder it lies in, if any."""

    path: Path
    folder: str | None = None


class Problem(NamedTuple):
    """What could not be used, and why."""

    path: str
    reason: str


class Found(NamedTuple):
    """Photographs to read, what could not be found, and files in folders that are no pictures by their names."""

    files: tuple[PhotoFile, ...]
    problems: tuple[Problem, ...]
    ignored: tuple[Path, ...]


class Photo(NamedTuple):
    """A photograph, read."""

    file: PhotoFile
    pixels: Tensor  # (3, img_size, img_size) float32, normalised
    view: Image  # what the models see of it, for pictures


def default_photos() -> Found:
    """The free photographs of scikit-image's wheel; nothing is downloaded.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise ImportError(
            "without PHOTO arguments, scikit-image's photographs are used, and scikit-image is not installed:"
            ' pip install "mtvit_ops[demo]", or name photographs of your own'
        ) from error
    folder = Path(skimage.__file__).parent / "data"
    files = [folder / photo.file for photo in DEFAULT_PHOTOS]
    missing = [Problem(str(path), "is not in this version of scikit-image") for path in files if not path.is_file()]
    return Found(tuple(PhotoFile(path) for path in files if path.is_file()), tuple(missing), ())


def find_photos(paths: Sequence[str | Path]) -> Found:
    """Files as they are named; folders with everything in them whose name ends like a picture's, in sorted order.

    A picture in a sub-folder remembers the first sub-folder's name as its class. Hidden files are left out.
    """
    files: list[PhotoFile] = []
    problems: list[Problem] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        try:
            is_folder, is_there = path.is_dir(), path.exists()
        except OSError as error:  # a name too long, a folder that may not be entered
            problems.append(Problem(str(path), f"cannot be read: {error.strerror}"))
            continue
        if not is_folder:
            if is_there:
                files.append(PhotoFile(path))
            else:
                problems.append(Problem(str(path), "there is no such file or folder"))
            continue
        before = len(files)
        for inner in sorted(path.rglob("*")):
            parts = inner.relative_to(path).parts
            if inner.is_dir() or any(part.startswith(".") for part in parts):
                continue
            if inner.suffix.lower() not in SUFFIXES:
                ignored.append(inner)
                continue
            files.append(PhotoFile(inner, parts[0] if len(parts) > 1 else None))
        if len(files) == before:
            problems.append(Problem(str(path), f"the folder holds no picture ({', '.join(SUFFIXES)})"))
    return Found(tuple(files), tuple(problems), tuple(ignored))


def load_photo(file: PhotoFile, img_size: int, view_size: int) -> Photo:
    """Read a photograph as the models want it.

    The shorter side is resized (bicubic) to 256/224 of ``img_size``, the centre is cut out, and colours are normalised
    by ImageNet's statistics. Its rotation tag is respected; grey, palette and 16-bit pictures become RGB, transparency
    becomes white, and an animation its first frame.

    Args:
        file: what to read.
        img_size: side of what the models see, pixels.
        view_size: side of the same square for pictures, pixels.

    Raises:
        ValueError: the file cannot be read as a picture; the message says why.
    """
    with warnings.catch_warnings():
        # Pillow warns of large pictures; those beyond its limit are errors
        warnings.simplefilter("ignore", require_pillow("demo").Image.DecompressionBombWarning)
        image = without_far_ends(read_rgb(file.path))
    return Photo(file, normalise(centre_square(image, img_size)), centre_square(image, view_size))


def require_pillow(extra: str) -> Any:
    """The module ``PIL`` with ``Image`` and ``ImageOps``, or an error that names the extra to install."""
    try:
        import PIL
        from PIL import Image, ImageOps  # noqa: F401 (both become attributes of PIL)
    except ImportError as error:
        raise ImportError(f'reading photographs needs Pillow: pip install "mtvit_ops[{extra}]"') from error
    return PIL


def read_rgb(source: Path | BinaryIO) -> Image:
    """Read a picture of any kind as RGB.

    Its rotation tag is respected; grey, palette and 16-bit pictures become RGB, transparency becomes white, and an
    animation its first frame.

    Args:
        source: a file, or its content open for reading.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: this cannot be read as a picture; the message says why.
    """
    modules = require_pillow("demo")
    try:
        with modules.Image.open(source) as opened:
            opened.load()
            return _to_rgb(modules.ImageOps.exif_transpose(opened))
    except modules.UnidentifiedImageError:
        raise ValueError("is not a picture in any format that Pillow reads") from None
    except Exception as error:  # no promise of Pillow's says what its readers raise for a broken file
        raise ValueError(f"cannot be read: {str(error) or type(error).__name__}") from None


def without_far_ends(image: Image) -> Image:
    """The middle of a picture that is more than four times as long as wide; other pictures as they are."""
    width, height = image.size
    limit = _LONGEST * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def centre_square(image: Image, side: int) -> Image:
    """The centre of the picture, its shorter side scaled to 256/224 of ``side``, as a ``side`` x ``side`` picture."""
    from PIL.Image import Resampling

    width, height = image.size
    short = round(side * RESIZE)
    if width <= height:
        size = (short, max(short, int(short * height / width)))
    else:
        size = (max(short, int(short * width / height)), short)
    resized = image.resize(size, Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return resized.crop((left, top, left + side, top + side))


def normalise(image: Image) -> Tensor:
    """An RGB picture as (3, height, width) float32 with ImageNet's mean and deviation."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class Labels(NamedTuple):
    """The class of each file by its index, or why there is none."""

    indices: tuple[int, ...] | None
    reason: str


def find_labels(files: Sequence[PhotoFile], num_classes: int, names: Sequence[str] | None = None) -> Labels:
    """Classes from the folders' names.

    Args:
        files: from ``find_photos``.
        num_classes: outputs of the model.
        names: the folder name that belongs to each output, in order; None: the sorted folder names are the classes, if
            there are ``num_classes`` of them.
    """
    folders = sorted({file.folder for file in files if file.folder is not None})
    if not folders:
        return Labels(None, "no class folders, so no labels")
    if any(file.folder is None for file in files):
        return Labels(None, "some photographs lie outside the class folders")
    if names is None:
        if len(folders) != num_classes:
            return Labels(
                None,
                f"{len(folders)} class folders for {num_classes} outputs: --labels FILE can say which output each is",
            )
        names = folders
    elif len(names) != num_classes:
        return Labels(None, f"the label file names {len(names)} classes for {num_classes} outputs")
    index = {name: number for number, name in enumerate(names)}
    unknown = [folder for folder in folders if folder not in index]
    if unknown:
        return Labels(None, f"the label file does not name the class folder {unknown[0]!r}")
    return Labels(tuple(index[str(file.folder)] for file in files), "from the class folders")


def _to_rgb(image: Image) -> Image:
    from PIL import Image as PillowImage

    if image.mode.startswith("I"):  # 16 bits a channel, whatever the container
        import numpy as np

        grey = (np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8)
        return PillowImage.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PillowImage.new("RGBA", image.size, "white")
        return PillowImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
