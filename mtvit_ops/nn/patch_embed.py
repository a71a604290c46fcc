"""Images to patch tokens."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import linear_patches


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution, with timm's parameter name ``proj``."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        return linear_patches(images, self.proj)
