"""The processes and the device of a training; Hugging Face Accelerate does the work, all but the sharding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._timm import import_timm
from ._weights import Weights
from .recipe import OptimiserOptions
from .state import TrainError


def is_first_process() -> bool:
    """Whether this process is the one, among those that ``torchrun`` started, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


class Processes:
    """This process among those of a training, alone or under ``torchrun``.

    Args:
        precision: ``"float32"`` or ``"bfloat16"``.
        device: ``"cpu"``, or None: what Accelerate finds.
        sharding: ``"none"``: every process holds everything; ``"full"``: each holds a share, if there are several.

    Raises:
        ImportError: Accelerate is not installed.
        ValueError: another device.
    """

    def __init__(self, precision: str, device: str | None = None, sharding: str = "none") -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"device must be 'cpu' or None (what Accelerate finds), got {device!r}")
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import DistributedDataParallelKwargs
        except ImportError as error:
            raise ImportError('training needs accelerate: pip install "mtvit_ops[train]"') from error
        # it keeps the first run's precision and device for the process's life; every run here has its own
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        # a method may leave parameters out of a step: a tail that nobody chose
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        mixed = "bf16" if precision == "bfloat16" else "no"
        self._accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision=mixed, kwargs_handlers=[unused]
        )
        self.weights = Weights()
        if sharding == "full" and self.world_size > 1:
            from ._sharding import ShardedWeights  # not part of every PyTorch

            self.weights = ShardedWeights(self.device, self.is_first)

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    @property
    def is_first(self) -> bool:
        return self._accelerator.is_main_process

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, shared by all processes if there are several; an optimiser of its parameters is made after it."""
        return self.weights.shard_(module) if self.weights.sharded else self._accelerator.prepare(module)

    def prepare_optimiser(self, optimiser: torch.optim.Optimizer) -> Any:
        """The optimiser of a prepared module."""
        self.weights.start_optimiser(optimiser)
        return self._accelerator.prepare(optimiser)

    def autocast(self) -> Any:
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[Tensor], options: OptimiserOptions) -> None:
        """Shorten gradients as the recipe has it."""
        if options.clip_mode == "norm":
            self._accelerator.clip_grad_norm_(parameters, options.clip_grad)
            return
        import_timm()
        from timm.utils.agc import adaptive_clip_grad

        adaptive_clip_grad(parameters, clip_factor=options.clip_grad)

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes, on the CPU."""
        return self._accelerator.reduce(value, reduction="mean").cpu()

    def any(self, value: bool) -> bool:
        """Whether it is so in any process; every one must ask."""
        if self.world_size == 1:
            return value
        asked = torch.tensor(int(value), device=self.device)
        return bool(self._accelerator.reduce(asked, reduction="sum").item())

    def gather(self, value: str) -> list[str]:
        """What every process says, by rank; every one must call."""
        if self.world_size == 1:
            return [value]
        said = [""] * self.world_size
        torch.distributed.all_gather_object(said, value)
        return said

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something; where it fails, all of them end instead of waiting for it.

        Raises:
            TrainError: in the others, where ``work`` raised in the first, which raises the same.
        """
        failed = None
        if self.is_first:
            try:
                work()
            except Exception as error:
                failed = error
        if self.any(failed is not None):
            raise failed or TrainError("the first process could not go on, and says why")
