"""Pictures of which patches lived how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .files import write_atomically
from .flops import count_macs
from .lineup import BASELINE, TITLES
from .methods import MTViT
from .nn import Trace, VisionTransformer

if TYPE_CHECKING:
    from PIL.Image import Image

    from .photos import Photo

# from a short life to a long one: lightness rises all the way and blue turns to yellow, which every kind of colour
# vision tells apart
_ANCHORS = ((26, 22, 84), (52, 76, 150), (86, 134, 160), (160, 180, 120), (253, 231, 76))
_COLOUR_SHARE = 0.6  # of an overlay; the rest is the photograph in grey
_CONTRAST = 0.7  # of that grey
_MARGIN, _HEADER, _FOOTER = 24, 92, 84  # pixels
CHART_NAME = "speed-up.png"  # no photograph's picture may take it
_INK, _QUIET, _PAPER = (20, 20, 20), (90, 90, 90), (255, 255, 255)


class Panel(NamedTuple):
    """One method's view of one photograph."""

    title: str
    lines: tuple[str, ...]
    blocks: Tensor  # (G, G) int64, blocks that each patch went through
    edges: tuple[float, ...] = ()  # where patches meet, in shares of the side; empty: G equal patches, not outlined


def blocks_lived(trace: Trace, image: int, num_patches: int) -> Tensor:
    """How many blocks each patch of an image entered, (num_patches,), int64, from 0 to the depth."""
    lived = torch.zeros(1 + num_patches, dtype=torch.int64)
    for block in range(trace.tokens_per_block.shape[0]):
        lived[trace.kept(block, image).cpu()] += 1
    return lived[1:]


def colour(blocks: int, depth: int) -> tuple[int, int, int]:
    """The colour of a patch that went through ``blocks`` of ``depth`` blocks."""
    place = blocks / depth * (len(_ANCHORS) - 1)
    index = min(int(place), len(_ANCHORS) - 2)
    share = place - index
    low, high = _ANCHORS[index], _ANCHORS[index + 1]
    return tuple(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def overlay(view: Image, panel: Panel, depth: int) -> Image:
    """The photograph in grey under the colours of its patches.

    Args:
        view: square RGB picture.
        panel: whose patches.
        depth: blocks of the model.
    """
    import numpy as np
    from PIL import Image as PillowImage
    from PIL import ImageDraw

    side, grid = view.width, panel.blocks.shape[0]
    # each pixel's patch: by the edges where they are given (MT-ViT's grids overhang the picture), else equal patches
    edges = panel.edges or tuple(index / grid for index in range(grid + 1))
    centres = (np.arange(side) + 0.5) / side
    patch = (np.searchsorted(np.array(edges), centres, side="right") - 1).clip(0, grid - 1)
    palette = np.array([colour(blocks, depth) for blocks in range(depth + 1)], dtype=np.float64)
    colours = palette[panel.blocks.numpy()[patch[:, None], patch[None, :]]]
    # less contrast, so that the photograph does not look like a difference in colour
    grey = 128 + (np.asarray(view.convert("L"), dtype=np.float64)[..., None] - 128) * _CONTRAST
    mixed = _COLOUR_SHARE * colours + (1 - _COLOUR_SHARE) * grey
    picture = PillowImage.fromarray(mixed.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for edge in panel.edges:
        place = round(edge * side)
        if 0 < place < side:
            draw.line((place, 0, place, side), fill=_INK, width=1)
            draw.line((0, place, side, place), fill=_INK, width=1)
    return picture


def draw_picture(
    view: Image,
    caption: str,
    panels: Sequence[Panel],
    depth: int,
    note: str = "",
    seen: Sequence[str] = ("what the models see of the photograph",),
) -> Image:
    """The photograph and one overlay a method side by side, with titles, a legend and a note beside it."""
    from PIL import Image as PillowImage
    from PIL import ImageDraw, ImageFont

    side = view.width
    width = _MARGIN + (1 + len(panels)) * (side + _MARGIN)
    sheet = PillowImage.new("RGB", (width, _HEADER + side + _FOOTER), _PAPER)
    draw = ImageDraw.Draw(sheet)
    titles, text = [ImageFont.load_default(size=size) for size in (24, 22, 20, 18)], ImageFont.load_default(size=17)

    def column(index: int, heading: str, lines: Sequence[str], picture: Image) -> None:
        left = _MARGIN + index * (side + _MARGIN)
        title = next((font for font in titles if font.getlength(heading) <= side), titles[-1])
        draw.text((left, 34), _fitted(heading, title, side), fill=_INK, font=title, anchor="ls")
        for row, line in enumerate(lines):
            draw.text((left, 42 + 22 * row), _fitted(line, text, side), fill=_QUIET, font=text)
        sheet.paste(picture, (left, _HEADER))

    column(0, caption, seen, view)
    for index, panel in enumerate(panels, start=1):
        column(index, panel.title, panel.lines, overlay(view, panel, depth))

    # legend: the colours as they look in the overlays, over a middle grey
    top, left = _HEADER + side + 18, _MARGIN + side + _MARGIN
    draw.text((_MARGIN, top + 5), "blocks a patch went through:", fill=_INK, font=text)
    if panels:
        cell = min(40, (width - _MARGIN - left) // (depth + 1))
        step = 1 if cell >= 26 else 5
        for blocks in range(depth + 1):
            tint = tuple(round(_COLOUR_SHARE * part + (1 - _COLOUR_SHARE) * 128) for part in colour(blocks, depth))
            x = left + blocks * cell
            draw.rectangle((x, top, x + cell - 1, top + 27), fill=tint)
            if blocks % step == 0 or blocks == depth:
                draw.text((x + cell / 2, top + 44), str(blocks), fill=_INK, font=text, anchor="mm")
        end = left + (depth + 1) * cell + 12
        draw.text((end, top + 5), f"{depth}: to the end", fill=_QUIET, font=text)
        draw.text((width - _MARGIN, top + 5), note, fill=_INK, font=text, anchor="ra")
    return sheet


def make_panel(name: str, model: VisionTransformer, trace: Trace, image: int, mac_share: float) -> Panel:
    """What a trace says of one image of its batch.

    Args:
        name: the method, as in ``lineup.TITLES``.
        model, trace: that ran.
        image: its place in the batch.
        mac_share: the image's multiply-accumulates over the dense model's.
    """
    depth, grid = len(model.blocks), model.config.grid_size
    macs = f"{mac_share:.0%} of the dense model's MACs"
    if isinstance(model.method, MTViT):
        tail = int(trace.extras["tail"][image])
        grid = model.method.config.grids[tail]
        kernel, padding = model.method.geometry[tail]
        edges = tuple((index * kernel - padding) / model.config.img_size for index in range(grid + 1))
        lines = (f"chose a {grid} x {grid} grid: {1 + grid**2} tokens", macs)
        return Panel(TITLES[name], lines, torch.full((grid, grid), depth), edges)
    blocks = blocks_lived(trace, image, grid**2).reshape(grid, grid)
    counts = trace.tokens_per_block[:, image].tolist()
    return Panel(TITLES[name], (f"{counts[-1]} of {counts[0]} tokens in the last block", macs), blocks)


class PictureWriter:
    """Writes one picture for each photograph into a folder.

    Args:
        folder: where to; created if need be.
        models: by name; all but the baseline get a panel.
        note: what every picture must say.
        class_names: of the outputs, to tell what each model sees; empty: nobody knows them.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, VisionTransformer],
        note: str = "",
        class_names: Sequence[str] = (),
    ) -> None:
        self._folder, self._models, self._note, self._class_names = folder, models, note, class_names
        folder.mkdir(parents=True, exist_ok=True)
        self.written: list[Path] = []

    def write(self, photo: Photo, image: Tensor, outputs: Mapping[str, tuple[Tensor, Trace]], index: int) -> Path:
        """Draw one photograph.

        Args:
            photo: as it was read.
            image: its pixels as the models take them, (1, C, H, W).
            outputs: logits and trace of the batch it was in, by model.
            index: its place in that batch.
        """
        dense = self._models[BASELINE]
        dense_macs = count_macs(dense, image).per_image
        panels = [
            self._panel(name, outputs[name], index, count_macs(model, image).per_image / dense_macs)
            for name, model in self._models.items()
            if name != BASELINE
        ]
        seen: tuple[str, ...] = ("what the models see of the photograph",)
        if self._class_names:
            seen = (*seen, f"dense: {self._answer(outputs[BASELINE][0][index])}")
        picture = draw_picture(photo.view, photo.file.path.stem, panels, len(dense.blocks), self._note, seen)
        path = self._free_name(photo.file.path.stem)
        write_atomically(path, lambda file: picture.save(file, format="PNG"))
        self.written.append(path)
        return path

    def _panel(self, name: str, output: tuple[Tensor, Trace], index: int, mac_share: float) -> Panel:
        logits, trace = output
        panel = make_panel(name, self._models[name], trace, index, mac_share)
        if not self._class_names:
            return panel
        return panel._replace(title=f"{panel.title}: {self._answer(logits[index])}")

    def _answer(self, logits: Tensor) -> str:
        share, best = logits.float().softmax(dim=0).max(dim=0)
        return f"{self._class_names[int(best)]} {float(share):.0%}"

    def _free_name(self, stem: str) -> Path:
        """Photographs of one name in several folders get a number each."""
        number, path = 1, self._folder / f"{stem}.png"
        while path in self.written or path.name == CHART_NAME:
            number += 1
            path = self._folder / f"{stem}-{number}.png"
        return path


def _fitted(line: str, font: Any, width: int) -> str:
    """The line, shortened in its middle until it fits."""
    if font.getlength(line) <= width:
        return line
    half = len(line) // 2
    while half > 1 and font.getlength(f"{line[:half]}...{line[-half:]}") > width:
        half -= 1
    return f"{line[:half]}...{line[-half:]}"
