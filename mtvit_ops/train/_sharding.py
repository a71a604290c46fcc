"""Weights, their average and the optimiser's state in shards, one in each process; PyTorch's FSDP does the work.

Accelerate would switch its own on for GPUs only; this is the same on a CPU, where it is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ._weights import M, Weights


class ShardedWeights(Weights):
    """Each process holds a share of every parameter, cut along its first dimension.

    Args:
        device: of this process.
        is_first: whether this is the process that writes files.

    A module is one group. The losses walk through blocks half by half, A-ViT's through their layers, so no forward of a
    block could fetch its weights: all are fetched when the module's forward begins and are whole until the gradient is
    there, which is averaged over the processes. Each keeps its share of it.
    """

    sharded = True

    def __init__(self, device: torch.device, is_first: bool) -> None:
        self._mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self._is_first = is_first

    def shard_(self, module: nn.Module) -> nn.Module:
        fully_shard(module, mesh=self._mesh)
        return module

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        module.unshard()  # type: ignore[operator]
        # fetched without a new version, by which packed weights would see that they have changed
        for parameter in module.parameters():
            torch.autograd.graph.increment_version(parameter)
        # no shards, and batch statistics are each process's own until then: the first one's are saved
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
        try:
            yield
        finally:
            module.reshard()  # type: ignore[operator]

    def release(self, module: nn.Module, model: M) -> M:
        with self.whole(module):
            return copy.deepcopy(model)

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gather(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._gather(state)

    def start_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        # lists of shards in one call, as PyTorch by itself takes tensors on a GPU: one by one, each call costs more
        for group in optimiser.param_groups:
            group["foreach"] = True

    def gather_optimiser(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimiser.state_dict()
        groups = [{**group, "foreach": None} for group in state["param_groups"]]  # as without shards
        return self._gather({**state, "param_groups": groups})

    def restore_optimiser(self, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        # a state counts parameters in the order of the groups
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        shares = {
            index: {name: _share(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        optimiser.load_state_dict({**state, "state": shares})
        self.start_optimiser(optimiser)

    def _gather(self, value: Any) -> Any:
        """Nested dicts and lists with whole tensors on the CPU in the first process, empty ones in the others."""
        if isinstance(value, DTensor):
            tensor = value.full_tensor().detach()
            return tensor.cpu() if self._is_first else tensor.new_empty(0)
        if isinstance(value, dict):
            found = copy.copy(value)  # a module's state is a dict of another kind, with something attached
            found.update((key, self._gather(each)) for key, each in value.items())
            return found
        return [self._gather(each) for each in value] if isinstance(value, list) else value


def _share(value: Any, parameter: Tensor) -> Any:
    """This process's share of what belongs to each value of a parameter; anything else, a step count, itself."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    # every process has read the whole tensor: none sends it
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
