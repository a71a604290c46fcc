"""Where weights, their average and the optimiser's state lie between two steps: whole in every process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Weights:
    """All of everything is in every process; ``_sharding.ShardedWeights`` is the other way.

    What says that every process must call waits for the others where there are shards.
    """

    sharded = False

    def shard_(self, module: nn.Module) -> nn.Module:
        """Keep this process's share of every parameter, and return the module; every process must call.

        Args:
            module: the same in all processes. Training calls its own forward and no part of it. Parameters become other
                objects: an optimiser of them is made afterwards.
        """
        return module

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Have all weights of a module of ``shard_``, as ordinary parameters; every process must enter.

        Within, no process waits for another, so each may run the model as often as it likes.
        """
        return nullcontext()

    def release(self, module: nn.Module, model: M) -> M:
        """A model within a module of ``shard_``, with all of its weights and for good; every process must call."""
        return model

    def held(self, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter; it may be empty."""
        return tensor

    def gather(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A module's state dict with whole tensors; every process must call, and the first one gets it."""
        return state

    def start_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Make the optimiser of a module of ``shard_`` ready."""

    def gather_optimiser(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """Its state with whole tensors; every process must call, and the first one gets it."""
        return optimiser.state_dict()

    def restore_optimiser(self, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state of ``gather_optimiser``, the same in every process."""
        optimiser.load_state_dict(state)
