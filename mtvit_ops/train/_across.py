"""Statistics of the whole batch in every process, for terms of a loss that are no mean over images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_SHARED: ContextVar[bool] = ContextVar("mtvit_ops_shared_statistics", default=False)


@contextmanager
def shared_statistics() -> Iterator[None]:
    """Let ``mean_over_processes`` see the batches of all processes, which must do the same at the same time."""
    token = _SHARED.set(True)
    try:
        yield
    finally:
        _SHARED.reset(token)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over all processes within ``shared_statistics``, else the value itself.

    The gradient is that of the process's own value: averaged over processes, as data-parallel training does, it is that
    of the mean.
    """
    if not _SHARED.get():
        return value
    own = value.detach()
    total = own.clone()
    torch.distributed.all_reduce(total)
    return value + (total / torch.distributed.get_world_size() - own)
