"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._cpu_linear import panel_columns, panel_dtypes
from .._register import native_kernel, native_serves
from .linear import linear_patches, packed_anew
from .plain import is_plain, modules_are_watched
from .prepared import Prepared


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
        self._prepared = Prepared()
        self._firsts: Tensor | None = None  # the first tail for all images, made once a batch size

    def __call__(
        self,
        images: Tensor,
        chosen: Tensor | None,
        owner: nn.Module,
        modules: Sequence[nn.Module],
        tails: Callable[[], Sequence[Tail]],
        keep: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """What ``ragged_patch_embed`` gives, (B * longest, D) and offsets; None: it cannot serve here.

        Args:
            images: (B, C, H, W).
            chosen: each image's tail, (B,), int32; None: the first for all.
            owner: whose ``cls_token`` (1, 1, D) and ``pos_embed`` these are.
            modules: all that the tails are made from but the owner's own parameters.
            tails: makes them, where they are not known yet.
            keep: pack the weights once, for all calls.
        """
        # in this order: the compiler need not look into the second
        if not native_serves(images) or images.dtype not in panel_dtypes() or images.numel() == 0:
            return None
        if modules_are_watched():
            return None

        def make(_: Sequence[nn.Module], x: Tensor) -> tuple[Any, ...] | None:
            return _embedding_arguments(owner._parameters.get("cls_token"), tails(), x.dtype, keep)

        entries = [(owner._parameters, name) for name in ("cls_token", "pos_embed")]
        given = self._prepared.arguments((len(modules), keep), modules, images, make, entries)
        if given is None:
            return None
        if chosen is None:
            chosen = self._firsts
        if chosen is None or len(chosen) != len(images):
            chosen = self._firsts = torch.zeros(len(images), dtype=torch.int32, device=images.device)
        result: tuple[Tensor, Tensor] = native_kernel("ragged_patch_embed")(images, chosen, *given)
        return result

    def __deepcopy__(self, memo: Any) -> NativeEmbedding:
        return NativeEmbedding()

    def __reduce__(self) -> Any:
        return NativeEmbedding, ()


def _embedding_arguments(
    cls_token: Tensor | None, tails: Sequence[Tail], dtype: torch.dtype, keep: bool
) -> tuple[Any, ...] | None:
    """Those of the native operator behind images and choice; None: it cannot serve these tails."""
    if cls_token is None or not tails or any(not _plain_conv(tail.conv) for tail in tails):
        return None
    weights, biases = [tail.conv.weight for tail in tails], [tail.conv.bias for tail in tails]
    tensors = [cls_token, *weights, *biases, *(tail.table for tail in tails)]
    if any(type(tensor) is not nn.Parameter or tensor.dtype is not dtype for tensor in tensors):
        return None
    # views of the tensors' memory and not of the tensors, which must stay free to be swapped
    return (
        cls_token.detach()[0],
        [_panels(weight) if keep else weight for weight in weights],
        biases,
        [tail.table.detach()[0] for tail in tails],
        [tail.stride for tail in tails],
        [tail.padding for tail in tails],
        True,
    )


def _panels(weight: Tensor) -> Tensor:
    # an inference tensor has no version that would tell of a change; a part of a panel is not to be had
    return weight if weight.is_inference() or weight.shape[0] % panel_columns() else packed_anew(None, weight)[1]


def _plain_conv(conv: nn.Conv2d) -> bool:
    return type(conv) is nn.Conv2d and conv.bias is not None and is_plain(conv)
