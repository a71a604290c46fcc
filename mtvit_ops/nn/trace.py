"""Which tokens lived how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_count
from ..ragged import RaggedTokens

if TYPE_CHECKING:
    from .method import Method


@dataclass(frozen=True)
class Trace:
    """The life of every token in one forward pass.

    Attributes:
        tokens_per_block: live tokens entering each block, prefix included, (depth, B), int64.
        extras: what the method shows of itself, by name; see the method's page.
    """

    tokens_per_block: Tensor
    extras: dict[str, Tensor]
    _rows: tuple[Tensor | None, ...] = field(repr=False)
    _offsets: tuple[Tensor, ...] = field(repr=False)
    _first_rows: Tensor = field(repr=False)

    def kept(self, block: int, image: int) -> Tensor:
        """Original token numbers of an image that enter a block, (n,), int64, ascending; prefix tokens come first.

        Token 0 is the class token, token 1 + i the i-th patch, row by row. Reads offsets, which waits for the device.
        """
        depth, batch = self.tokens_per_block.shape
        check_count("block", block, 0, depth - 1)
        check_count("image", image, 0, batch - 1)
        start, end = self._offsets[block][image : image + 2].tolist()
        rows = self._rows[block]
        live = torch.arange(start, end, device=self._first_rows.device) if rows is None else rows[start:end].long()
        return torch.sort(live - self._first_rows[image]).values


class TraceRecorder:
    """Gathers a trace while the model runs; one per forward pass."""

    def __init__(self) -> None:
        self._rows: list[Tensor | None] = []
        self._offsets: list[Tensor] = []
        self._states: list[Any] = []

    def enter(self, tokens: RaggedTokens) -> None:
        """Note the tokens entering a block."""
        self._rows.append(tokens.rows)
        self._offsets.append(tokens.cu_seqlens)

    def leave(self, state: Any) -> None:
        """Note the method's state after a block."""
        self._states.append(state)

    def trace(self, first_rows: Tensor, method: Method) -> Trace:
        """What was gathered."""
        counts = torch.stack([offsets.diff() for offsets in self._offsets]).long()
        extras = method.extras(first_rows, self._states)
        return Trace(counts, extras, tuple(self._rows), tuple(self._offsets), first_rows)
