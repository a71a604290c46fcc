"""Each image's chosen tail, packed: the meaning of ``ops.ragged_patch_embed``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight


def ragged_patch_embed(
    images: Tensor,  # (B, C, H, W)
    tails: Tensor,  # (B,) int32
    prefix: Tensor,  # (P, D)
    weights: list[Tensor],  # K of (D, C, k, k)
    biases: list[Tensor],  # K of (D,)
    pos_embeds: list[Tensor],  # K of (P + patches, D)
    strides: list[int],
    paddings: list[int],
) -> tuple[Tensor, Tensor]:  # (B * longest, D) with zeros behind the live rows, (B + 1,)
    lengths = _lengths(tails, pos_embeds)
    counts = lengths[tails.long()]
    cu_seqlens = F.pad(torch.cumsum(counts, 0), (1, 0)).to(torch.int32)
    num_prefix, longest = prefix.shape[0], max(len(table) for table in pos_embeds)
    x = images.new_zeros(len(images) * longest + 1, prefix.shape[1])
    for tail, (weight, bias, pos_embed) in enumerate(zip(weights, biases, pos_embeds)):
        chosen = tails == tail
        if images.device.type == "cpu":  # the CPU may look: only the images of this tail are embedded
            which = chosen.nonzero()[:, 0]
        else:  # looking would wait for the device: embed all, and let the others' rows go nowhere
            which = torch.arange(len(images), device=images.device)
        patches = F.conv2d(images[which], weight, bias, strides[tail], paddings[tail]).flatten(2).transpose(1, 2)
        tokens = torch.cat((prefix.expand(len(which), -1, -1), patches), dim=1) + pos_embed  # (b, N, D)
        target = cu_seqlens[which].long()[:, None] + torch.arange(num_prefix + patches.shape[1], device=images.device)
        target = target.where(chosen[which][:, None], len(x) - 1)
        x = x.index_copy(0, target.flatten(), tokens.flatten(0, 1))
    return x[:-1].clone(), cu_seqlens


def ragged_patch_embed_backward(
    grad: Tensor,  # (B * longest, D)
    images: Tensor,
    tails: Tensor,
    prefix: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    pos_embeds: list[Tensor],
    strides: list[int],
    paddings: list[int],
    wants_images: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of images (empty unless wanted), prefix, and the lists of weights, biases and position tables."""
    num_prefix = prefix.shape[0]
    lengths = _lengths(tails, pos_embeds)
    starts = F.pad(torch.cumsum(lengths[tails.long()], 0), (1, 0))
    source = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))
    grad_images = torch.zeros_like(images) if wants_images else images.new_zeros(0)
    grad_prefix = torch.zeros_like(prefix)
    grad_weights, grad_biases, grad_tables = [], [], []
    for tail, (weight, pos_embed) in enumerate(zip(weights, pos_embeds)):
        index = starts[:-1, None] + torch.arange(len(pos_embed), device=images.device)
        tokens = source[index.where((tails == tail)[:, None], len(grad))]  # (B, N, D), zeros for other tails' images
        patches = tokens[:, num_prefix:].transpose(1, 2)
        step, pad = strides[tail], paddings[tail]
        grid = [(side + 2 * pad - kernel) // step + 1 for side, kernel in zip(images.shape[2:], weight.shape[2:])]
        patches = patches.reshape(*patches.shape[:2], *grid)
        if wants_images:
            grad_images += conv2d_input(images.shape, weight, patches, step, pad)
        grad_weights.append(conv2d_weight(images, weight.shape, patches, step, pad))
        grad_biases.append(patches.sum(dim=(0, 2, 3)))
        grad_tables.append(tokens.sum(dim=0))
        grad_prefix += tokens[:, :num_prefix].sum(dim=0)
    return grad_images, grad_prefix, grad_weights, grad_biases, grad_tables


def _lengths(tails: Tensor, pos_embeds: list[Tensor]) -> Tensor:
    """Tokens of an image by tail, (K,) int32: filled on the device, since a copy from the host would wait for it."""
    return torch.cat([tails.new_full((1,), len(table)) for table in pos_embeds])
