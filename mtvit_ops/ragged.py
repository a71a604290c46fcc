"""The data type: tokens that never move, and the list of those still alive."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_count,
    check_cu_seqlens,
    check_offset_values,
    check_row_values,
    check_rows,
    check_tensor,
)
from .ops import TokenSelection
from .ops.gather_rows import gather_rows


class RaggedTokens(NamedTuple):
    """A batch of images with a number of live tokens each. Immutable; a pytree, as every named tuple.

    ``rows`` lists the live rows of ``x`` image after image, and ``cu_seqlens`` says where each image starts and ends in
    it. Pruning replaces the list and leaves ``x`` alone. Entries of ``rows`` past ``cu_seqlens[-1]`` are -1.
    """

    x: Tensor  # (R, D) float, one row a token, rows of one image adjacent
    rows: Tensor | None  # (T,) int32, live rows; None: all
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int  # host-side upper bound of an image's live tokens
    num_prefix_tokens: int = 1  # class (and distillation) tokens at the head of each image

    @classmethod
    def from_dense(cls, x: Tensor, num_prefix_tokens: int = 1) -> RaggedTokens:
        """All tokens of a dense batch (B, N, D), alive. Shares memory with ``x`` where ``x`` is contiguous."""
        check_tensor("x", x, ("B", "N", "D"), FLOATS)
        batch, length, dim = x.shape
        check_count("num_prefix_tokens", num_prefix_tokens, 0, length)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length
        return cls(x.reshape(batch * length, dim), None, cu_seqlens, length, num_prefix_tokens)

    @classmethod
    def from_nested(cls, nested: Tensor, num_prefix_tokens: int = 1) -> RaggedTokens:
        """All tokens of a jagged ``torch.nested`` tensor (B, n, D), alive. Shares its memory."""
        if not isinstance(nested, Tensor) or not nested.is_nested or nested.layout != torch.jagged:
            raise TypeError(f"nested must be a nested tensor of layout torch.jagged, got {_kind(nested)}")
        jagged: Any = nested  # its methods are on no stub
        if nested.dim() != 3 or jagged.lengths() is not None:
            raise ValueError(f"nested must have shape (B, n, D) without holes, got {nested.dim()} dimensions")
        if jagged.dtype not in FLOATS:
            raise TypeError(f"nested must have a floating-point dtype, got {jagged.dtype}")
        check_count("num_prefix_tokens", num_prefix_tokens)
        # a bound that the host knows without asking the device
        longest = jagged.values().shape[0] if jagged._maybe_max_seqlen is None else jagged._max_seqlen
        return cls(jagged.values(), None, jagged.offsets().to(torch.int32), int(longest), num_prefix_tokens)

    @property
    def num_images(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    def lengths(self) -> Tensor:
        """Live tokens of each image, (B,), int32, on the device."""
        return self.cu_seqlens.diff()

    def packed(self) -> Tensor:
        """The live tokens, (T, D), in list order; dead entries are 0."""
        if self.rows is None:
            return self.x
        return gather_rows(self.x, self.rows)

    def with_packed(self, packed: Tensor) -> RaggedTokens:
        """The same list, its tokens replaced by those of ``packed`` (T, D); no entry of the list may be dead."""
        # index_put, not index_copy: that one keeps its source for the gradient
        x = packed if self.rows is None else self.x.index_put((self.rows.long(),), packed)
        return RaggedTokens(x, self.rows, self.cu_seqlens, self.max_seqlen, self.num_prefix_tokens)

    def per_token(self, values: Tensor) -> Tensor:
        """An image's value at each of its tokens, (B,) to (T, 1); dead entries take any. No device synchronisation."""
        # not repeat_interleave: that one asks the device for the length, or wants a list without dead entries
        tokens = torch.arange((self.x if self.rows is None else self.rows).shape[0], device=values.device)
        image = torch.searchsorted(self.cu_seqlens[1:], tokens.to(torch.int32), right=True)
        return values[image.clamp_max(self.num_images - 1), None]

    def select(self, selection: TokenSelection, max_seqlen: int | None = None) -> RaggedTokens:
        """The same tokens with a shorter list; ``max_seqlen`` tightens the bound where the host knows a tighter one."""
        bound = self.max_seqlen if max_seqlen is None else max_seqlen
        # not _replace: PyTorch 2.11 compiles that to an empty tuple where it leaves the graph
        return RaggedTokens(self.x, selection.rows, selection.cu_seqlens, bound, self.num_prefix_tokens)

    def trimmed(self) -> RaggedTokens:
        """Without the dead entries behind the live ones; on the CPU only, since elsewhere looking would wait."""
        if self.x.device.type != "cpu":
            return self
        offsets = self.cu_seqlens.tolist()
        longest = max(map(operator.sub, offsets[1:], offsets), default=0)
        x, rows = self.x, self.rows
        if rows is None:
            x = x[: offsets[-1]]
        else:
            rows = rows[: offsets[-1]]
        return RaggedTokens(x, rows, self.cu_seqlens, longest, self.num_prefix_tokens)

    def to_dense(self, fill: float = 0.0) -> Tensor:
        """Live tokens in list order, (B, max_seqlen, D), ``fill`` behind each image's last. Differentiable."""
        packed = self.packed()
        start, end = self.cu_seqlens[:-1, None].long(), self.cu_seqlens[1:, None].long()
        index = start + torch.arange(self.max_seqlen, device=packed.device)
        source = torch.cat((packed, packed.new_full((1, packed.shape[1]), fill)))
        return source[index.where(index < end, packed.shape[0])]

    def to_grid(self, grid_size: tuple[int, int], fill: float = 0.0) -> Tensor:
        """Live patch tokens at their places on the image, (B, D, height, width), ``fill`` elsewhere. Differentiable.

        Raises:
            TypeError, ValueError: a size that is no int or below 0, or the residual stream is not B images of
                ``num_prefix_tokens + height * width`` rows.
        """
        height, width = grid_size
        check_count("grid_size[0]", height)
        check_count("grid_size[1]", width)
        length = self.num_prefix_tokens + height * width
        if self.x.shape[0] != self.num_images * length:
            raise ValueError(
                f"grid_size must fit {self.num_images} images of {self.num_prefix_tokens} prefix tokens and the grid in"
                f" {self.x.shape[0]} rows, got {height} x {width}"
            )
        if self.rows is None:
            grid = self.x
        else:
            alive = torch.zeros(self.x.shape[0] + 1, dtype=torch.bool, device=self.x.device)
            alive[self.rows.where(self.rows >= 0, self.x.shape[0]).long()] = True
            grid = self.x.where(alive[:-1, None], fill)
        patches = grid.reshape(self.num_images, length, grid.shape[1])[:, self.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(self.num_images, grid.shape[1], height, width)

    def to_nested(self) -> Tensor:
        """Live tokens as a jagged ``torch.nested`` tensor (B, n, D). Differentiable."""
        packed = self.packed()
        return torch.nested.nested_tensor_from_jagged(packed, self.cu_seqlens.long(), max_seqlen=self.max_seqlen)

    def validate(self) -> RaggedTokens:
        """This, after checking everything about it; values are read, which waits for the device.

        Raises:
            TypeError, ValueError: what is wrong, by field name, with expected and got.
        """
        check_tensor("x", self.x, ("R", "D"), FLOATS)
        tokens = self.x.shape[0]
        if self.rows is not None:
            check_rows("rows", self.rows, self.x)
            tokens = self.rows.shape[0]
        check_cu_seqlens("cu_seqlens", self.cu_seqlens, self.x)
        check_count("max_seqlen", self.max_seqlen)
        check_count("num_prefix_tokens", self.num_prefix_tokens)
        live = check_offset_values("cu_seqlens", self.cu_seqlens, tokens, self.max_seqlen)[-1]
        if self.rows is not None:
            check_row_values("rows", self.rows, self.x.shape[0])
            alive = self.rows[:live]
            if bool((alive < 0).any()):
                raise ValueError(f"rows must name a row in each of its {live} live entries, got -1")
            if alive.unique().numel() != live:
                raise ValueError("rows must name every row at most once, got repeats")
        return self


def _kind(value: object) -> str:
    return f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
