"""Patch embeddings of other sizes, derived from a trained one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_kernel(weight: Tensor, size: int) -> Tensor:
    """A (D, C, size, size) kernel whose response to an enlarged patch is that of ``weight`` to the patch itself.

    With B the matrix that resizes a patch bilinearly, the new kernel w solves ``B^T w = weight`` in the least-squares
    sense (FlexiViT, arXiv 2212.08013).
    """
    old = weight.shape[-1]
    if size == old:
        return weight.clone()
    basis = torch.eye(old * old, dtype=torch.float64, device="cpu").reshape(old * old, 1, old, old)
    resized = F.interpolate(basis, (size, size), mode="bilinear", antialias=True, align_corners=False)
    solve = torch.linalg.pinv(resized.reshape(old * old, size * size))  # (size^2, old^2)
    flat = weight.double().reshape(-1, old * old) @ solve.T.to(weight.device)
    return flat.reshape(*weight.shape[:2], size, size).to(weight)


def resize_pos_embed(pos_embed: Tensor, grid: int, num_prefix_tokens: int = 1) -> Tensor:
    """A position table (1, P + grid^2, D) from one of another grid: bicubic, the prefix rows copied."""
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return pos_embed.clone()
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((prefix, resized.flatten(2).transpose(1, 2).to(prefix.dtype)), dim=1)
