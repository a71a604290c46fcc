"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._cpu_linear import panel_columns, panel_dtypes
from .._register import native_kernel, native_serves
from .linear import Packed, linear_patches, packed_anew
from .plain import is_plain, modules_are_watched


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution, with timm's parameter name ``proj``."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        return linear_patches(images, self.proj)


class Tail(NamedTuple):
    """One way to cut an image into tokens."""

    conv: nn.Conv2d  # square, no dilation, no groups
    table: Tensor  # (1, 1 + patches, D): positions, the class token's first
    stride: int
    padding: int


class NativeEmbedding:
    """Patches, class token and positions as one native operator, which can keep the convolutions' weights packed.

    Serves where our own kernel multiplies (``_cpu_linear``). Weights changed in place, loaded, moved or cast are packed
    anew; changes through ``.data`` are not seen, as in ``PackedLinear``.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, int], Packed] = {}  # by the tail's place and the number of tails

    def __call__(
        self, images: Tensor, chosen: Tensor | None, cls_token: Tensor, tails: Sequence[Tail], keep: bool
    ) -> tuple[Tensor, Tensor] | None:
        """What ``ragged_patch_embed`` gives, (B * longest, D) and offsets; None: it cannot serve here.

        Args:
            images: (B, C, H, W).
            chosen: each image's tail, (B,), int32; None: there is one.
            cls_token: (1, 1, D).
            tails: K of them.
            keep: pack the weights once, for all calls.
        """
        # in this order: the compiler need not look into the second
        if not native_serves(images) or images.dtype not in panel_dtypes() or images.numel() == 0:
            return None
        if modules_are_watched() or any(not _plain_conv(tail.conv) for tail in tails):
            return None
        convs = [tail.conv for tail in tails]
        tensors = [cls_token, *(tail.table for tail in tails)]
        tensors += [tensor for conv in convs for tensor in (conv.weight, conv.bias) if tensor is not None]
        if any(type(tensor) is not nn.Parameter or tensor.dtype is not images.dtype for tensor in tensors):
            return None
        if chosen is None:
            chosen = torch.zeros(len(images), dtype=torch.int32, device=images.device)
        weights = [conv.weight for conv in convs]
        if keep:
            weights = [self._panels((place, len(convs)), weight) for place, weight in enumerate(weights)]
        biases, tables = [conv.bias for conv in convs], [tail.table[0] for tail in tails]
        strides, paddings = [tail.stride for tail in tails], [tail.padding for tail in tails]
        embed = native_kernel("ragged_patch_embed")
        result: tuple[Tensor, Tensor] = embed(
            images, chosen, cls_token[0], weights, biases, tables, strides, paddings, True
        )
        return result

    def _panels(self, place: tuple[int, int], weight: Tensor) -> Tensor:
        if weight.is_inference() or weight.shape[0] % panel_columns():  # has no version; is no whole number of panels
            return weight
        kept = self._packed[place] = packed_anew(self._packed.get(place), weight)
        return kept[1]

    def __deepcopy__(self, memo: Any) -> NativeEmbedding:
        return NativeEmbedding()

    def __reduce__(self) -> Any:
        return NativeEmbedding, ()


def _plain_conv(conv: nn.Conv2d) -> bool:
    return type(conv) is nn.Conv2d and conv.bias is not None and is_plain(conv)
