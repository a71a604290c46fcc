"""Pictures hold, pixel by pixel, what the trace says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtvit_ops import create_model
from mtvit_ops.files import write_atomically
from mtvit_ops.photos import Photo, PhotoFile, normalise
from mtvit_ops.viz import Panel, PictureWriter, blocks_lived, colour, draw_picture, make_panel, overlay

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [demo]")

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 6, "num_classes": 5}
GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def lightness(rgb: tuple[int, ...]) -> float:
    """Relative luminance (ITU-R BT.709)."""
    linear = [(part / 255) ** 2.2 for part in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def nearest(pixel: np.ndarray, depth: int) -> int:
    """The number of blocks whose colour, over middle grey, is nearest to a pixel."""
    tints = np.array([[0.6 * part + 0.4 * 128 for part in colour(blocks, depth)] for blocks in range(depth + 1)])
    return int(np.abs(tints - pixel).sum(axis=1).argmin())


@pytest.mark.parametrize("depth", [1, 6, 12, 24])
def test_colours_grow_lighter(depth: int) -> None:
    scale = [lightness(colour(blocks, depth)) for blocks in range(depth + 1)]
    assert scale == sorted(scale)
    assert len(set(scale)) == depth + 1


def test_overlay_shows_each_patch_at_its_place() -> None:
    blocks = torch.randint(0, 13, (4, 4), generator=torch.Generator().manual_seed(0))
    picture = np.asarray(overlay(GREY, Panel("", (), blocks), 12), dtype=np.float64)
    for row in range(4):
        for column in range(4):
            patch = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert (patch == patch[0, 0]).all()
            assert nearest(patch[0, 0], 12) == int(blocks[row, column])


def test_overlay_lets_the_photograph_through() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    picture = np.asarray(overlay(Image.fromarray(pixels), Panel("", (), torch.full((4, 4), 6)), 12), dtype=np.float64)
    assert (picture[:, 40] - picture[:, 10] > 40).all()


def test_a_grid_is_drawn_where_patches_meet() -> None:
    # 3 patches of 22 pixels overhang 64 pixels by 1 on either side, as MT-ViT pads
    edges = tuple((22 * index - 1) / 64 for index in range(4))
    picture = np.asarray(overlay(GREY, Panel("", (), torch.full((3, 3), 6), edges), 6))
    dark = (picture.sum(axis=2) < 100).all(axis=0)
    assert np.flatnonzero(dark).tolist() == [21, 43]
    dark = (picture.sum(axis=2) < 100).all(axis=1)
    assert np.flatnonzero(dark).tolist() == [21, 43]


def test_blocks_lived_counts_a_real_trace() -> None:
    model = create_model("lifevit_tiny_patch16_224", **SIZES, base_block=2, keep_ratio=0.5).eval()
    with torch.no_grad():
        _, trace = model(torch.randn(2, 3, 64, 64), return_trace=True)
    for image in range(2):
        lived = blocks_lived(trace, image, 16)
        assert lived.shape == (16,)
        # the class token, which is no patch, lives through all blocks
        assert int(lived.sum()) == int(trace.tokens_per_block[:, image].sum()) - 6
        dead = set(range(1, 17)) - set(trace.kept(5, image).tolist())
        assert {token + 1 for token in range(16) if lived[token] < 6} == dead
        assert lived.min() >= 2


def test_panel_of_mt_vit_has_the_chosen_grid() -> None:
    model = create_model("mtvit_tiny_patch16_224", **SIZES, force_tail=1).eval()
    with torch.no_grad():
        _, trace = model(torch.randn(1, 3, 64, 64), return_trace=True)
    panel = make_panel("mtvit", model, trace, 0, 0.5)
    assert panel.blocks.shape == (3, 3)
    assert (panel.blocks == 6).all()
    assert panel.edges == tuple((22 * index - 1) / 64 for index in range(4))
    assert panel.lines == ("chose a 3 x 3 grid: 10 tokens", "50% of the dense model's MACs")


def test_picture_has_photo_panels_and_legend() -> None:
    view = Image.new("RGB", (336, 336), (200, 30, 30))
    panels = [Panel("A", ("x",), torch.zeros(2, 2, dtype=torch.int64)), Panel("B", (), torch.full((2, 2), 12))]
    sheet = np.asarray(draw_picture(view, "photo", panels, 12, "note"))
    assert sheet.shape[1] == 24 + 3 * 360
    middle = 92 + 168
    assert sheet[middle, 24 + 168].tolist() == [200, 30, 30]
    assert lightness(sheet[middle, 384 + 168]) < lightness(sheet[middle, 744 + 168])
    # thirteen different colours in a row under the panels
    legend = sheet[92 + 336 + 20]
    tints = [tuple(legend[384 + 40 * blocks + 20]) for blocks in range(13)]
    assert len(set(tints)) == 13
    assert [nearest(np.array(tint), 12) for tint in tints] == list(range(13))


@pytest.mark.parametrize("panels", [0, 1], ids=["photo-only", "one-method"])
def test_small_pictures_and_long_names_work(panels: int) -> None:
    draw_picture(GREY, "a very long name " * 9, [Panel("t", ("x" * 300,), torch.zeros(2, 2).long())] * panels, 24)


def test_writer_numbers_photographs_of_one_name(tmp_path: Path) -> None:
    models = {name: create_model(f"{name}_tiny_patch16_224", **SIZES).eval() for name in ("vit", "evovit")}
    photo = Photo(PhotoFile(Path("x/cat.png")), normalise(GREY), GREY)
    images = photo.pixels[None]
    with torch.no_grad():
        outputs = {name: model(images, return_trace=True) for name, model in models.items()}
    writer = PictureWriter(tmp_path / "new", models)
    for _ in range(2):
        writer.write(photo, images, outputs, 0)
    # the chart's name is taken
    writer.write(photo._replace(file=PhotoFile(Path("speed-up.jpg"))), images, outputs, 0)
    assert [path.name for path in writer.written] == ["cat.png", "cat-2.png", "speed-up-2.png"]
    # nothing half-written stays behind
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cat-2.png", "cat.png", "speed-up-2.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
