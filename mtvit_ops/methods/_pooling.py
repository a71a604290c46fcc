"""What a classifier reads from the residual stream."""

from __future__ import annotations

from torch import Tensor


def pool_tokens(x: Tensor, first_rows: Tensor, num_prefix_tokens: int, pool: str) -> Tensor:
    """The class tokens or the patch means of images of one length, (R, D) to (B, D)."""
    if pool == "class" or len(first_rows) == 0:
        return x[first_rows]
    return x.reshape(len(first_rows), -1, x.shape[1])[:, num_prefix_tokens:].mean(dim=1)
