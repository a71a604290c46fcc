"""Statistics of a batch that several processes share."""

from __future__ import annotations

import torch
from torch import Tensor


def process_mean(value: Tensor) -> Tensor:
    """The mean of a value over all processes of a data-parallel training.

    Args:
        value: any shape, float, the same shape and dtype in every process; the mean over this process's images, of
            which every process has as many.

    Returns:
        Like value, the same in every process; value itself in a process that is alone, and where gradients are
        disabled, so that one process may score images by itself.

    Gradients flow to value as if it were the mean: averaged over the processes, as ``DistributedDataParallel`` does,
    they are those of the whole batch, provided that every process makes the same of the mean. No device
    synchronisation; every process of the default group must call.

    Equivalent PyTorch: ``torch.distributed.nn.functional.all_reduce(value) / torch.distributed.get_world_size()``.
    """
    if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return value
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    # the slope is the same everywhere: no collective that a backward pass would have to fit in between others
    return mean / world_size + (value - value.detach())
