"""Every tile of the ragged product, with and without descriptors, and which tile a device is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import _backend
from mtvit_ops.testing import assert_equal, offsets, poison_behind, random_rows

pytest.importorskip("triton")

from mtvit_ops.kernels import _launch
from mtvit_ops.kernels import ragged_linear as kernels

interpreted = pytest.mark.skipif(
    not _backend.triton_is_interpreted(), reason="for the run with TRITON_INTERPRET=1 (make test)"
)
TILES = {
    f"triton-cpu-{str(dtype).removeprefix('torch.')}-{tile.rows}x{tile.columns}{'-tma' if tma else ''}": (
        dtype,
        tile,
        tma,
    )
    for dtype, tiles, descriptors in (
        (torch.bfloat16, _launch.HALF_TILES, (False, True)),
        (torch.float16, _launch.HALF_TILES, (False, True)),
        (torch.float32, _launch.FLOAT_TILES, (False,)),
    )
    for tile in tiles
    for tma in descriptors
}
CAPACITY, COLUMNS, DEPTH = 300, 264, 72  # no multiples of a tile; of 16 bytes, as TMA wants them


def whole(*shape: int) -> Tensor:
    """Numbers whose products and sums are exact in float32, in whatever order."""
    return torch.randint(-4, 5, shape).float()


@interpreted
@pytest.mark.parametrize("live", [0, 261])
@pytest.mark.parametrize(("dtype", "tile", "tma"), TILES.values(), ids=TILES)
def test_every_tile_multiplies(dtype: torch.dtype, tile: _launch.LinearTile, tma: bool, live: int) -> None:
    a, weight, bias = whole(CAPACITY, DEPTH).to(dtype), whole(COLUMNS, DEPTH).to(dtype), whole(COLUMNS).to(dtype)
    x, rows = whole(CAPACITY + 2, COLUMNS).to(dtype), random_rows(CAPACITY + 2, CAPACITY)
    poison_behind(a, live)
    assert not tma or _launch.descriptors_fit(a, weight, x)
    exact = F.linear(a[:live].float(), weight.float(), bias.float())
    cu_seqlens = offsets((live,))

    out = kernels.ragged_linear(a, weight, bias, cu_seqlens, False, tile=tile, tma=tma)
    assert_equal("out", out[:live], exact.to(dtype))
    assert_equal("dead rows", out[live:], torch.zeros_like(out[live:]))

    wanted = x.float().index_add(0, rows[:live].long(), exact).to(dtype)
    kernels.ragged_linear_residual_(x, rows, a, weight, bias, cu_seqlens, None, tile=tile, tma=tma)
    assert_equal("x", x, wanted)


H200 = _launch.Limits(132, 233472, 232448, True)
A100 = _launch.Limits(108, 167936, 166912, False)
L40S = _launch.Limits(142, 102400, 101376, False)
MI300 = _launch.Limits(304, 65536, 32768, False)
CHOICES = {  # device, tokens, columns, depth: the tile, and how many programs
    "DeiT-B": (H200, 50432, 3072, 768, (128, 256, 3), 132),
    "DeiT-S": (H200, 50432, 1152, 384, (128, 128, 3), 264),
    "DeiT-T": (H200, 50432, 576, 192, (128, 64, 4), 264),
    "DeiT-S, 8 images": (H200, 1576, 1152, 384, (128, 64, 4), 264),
    "DeiT-S, 4 images": (H200, 788, 1152, 384, (64, 64, 4), 396),
    "DeiT-S, an image": (H200, 197, 384, 1536, (64, 32, 5), 396),
    "classes": (H200, 256, 1000, 768, (64, 32, 5), 396),
    "Ampere": (A100, 50432, 3072, 768, (128, 128, 3), 108),
    "little memory": (L40S, 50432, 3072, 768, (128, 128, 3), 142),
    "AMD": (MI300, 50432, 3072, 768, (128, 128, 2), 304),
}


@pytest.mark.parametrize(("here", "tokens", "columns", "depth", "wanted", "programs"), CHOICES.values(), ids=CHOICES)
def test_choices(
    here: _launch.Limits,
    tokens: int,
    columns: int,
    depth: int,
    wanted: tuple[int, int, int],
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "limits", lambda device: here)
    like = torch.empty(0, dtype=torch.bfloat16)
    tile = _launch.linear_tile(tokens, columns, depth, like)
    assert (tile.rows, tile.columns, tile.stages) == wanted
    assert _launch.linear_programs(tile, like) == programs
    # Ampere and AMD have no registers to spare beside the factors
    assert tile.registers is None or here.warp_groups


def test_descriptors_want_aligned_rows() -> None:
    fits = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert _launch.descriptors_fit(fits, fits[::2], fits[:, 8:40])
    for matrix in (fits.T, fits[:, 1:], fits[:, :60].contiguous(), fits.float(), fits[:1].expand(8, 64)):
        assert not _launch.descriptors_fit(fits, matrix)
