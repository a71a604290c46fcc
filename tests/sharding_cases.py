"""Trainings of two processes in shards, and some without; run by ``torchrun`` as ``sharding_cases.py DATA OUT``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from distributed_cases import MIX, MT_VIT, NO_MIX, save_teacher
from torch import Tensor, nn
from train_cases import A_VIT, MICRO, make_recipe

from mtvit_ops import create_model, pack_weights, use_backend
from mtvit_ops.train import fit
from mtvit_ops.train._sharding import ShardedWeights
from mtvit_ops.train.fit import StoppedError, TrainResult, train
from mtvit_ops.train.state import TrainError

ONE_EPOCH = {"optimiser.epochs": 1, "run.save_steps": 0}
# Adam would make a step of a gradient that is nothing but rounding
MOMENTUM = {"optimiser.name": "momentum", "optimiser.lr": 1e-2}
STOPS_AFTER = 7  # in the second epoch, where nothing is saved otherwise

# what one process does, to rounding
CASES: dict[str, dict[str, Any]] = {
    # clipping changes every step: a fraction of the gradients' norms here
    "dense": {**MIX, "optimiser.clip_grad": 0.05, "teacher.share": 0.5, "run.save_steps": 0},
    # halted tokens are removed: each process has as many as its images keep
    "A-ViT, uneven": {**MIX, **ONE_EPOCH, "model": A_VIT, "loss.distribution": 0.0, "loss.ponder": 0.05},
    # walks through the layers of every block by itself, and has a term that is no mean over images
    "A-ViT, prior": {
        **NO_MIX,
        **ONE_EPOCH,
        "optimiser.name": "adam",
        "model": A_VIT,
        "loss.distribution": 1.0,
        "run.checkpointing": True,
    },
    "Evo-ViT, no average": {
        **NO_MIX,
        **ONE_EPOCH,
        "optimiser.ema_decay": 0.0,
        "optimiser.name": "sgd",
        "model": {"name": "evovit_tiny_patch16_224", **MICRO, "depth": 3, "class_head": True},
        "plan.stage_from": 0.5,
    },
    # all but one block never learns
    "Life, frozen": {
        **NO_MIX,
        **ONE_EPOCH,
        "model": {"name": "lifevit_tiny_patch16_224", **MICRO, "depth": 3, "base_block": 2},
        "loss.stage": 2,
        "run.checkpointing": True,
    },
    # no process has a gradient of the predictor
    "MT-ViT, tails": {
        **NO_MIX,
        **ONE_EPOCH,
        "model": {"name": "mtvit_tiny_patch16_224", **MICRO, "predictor_size": 16},
        "loss.mode": "tails",
        "run.checkpointing": True,
    },
}
# every process draws for itself, or rounding is coarse: two processes in shards do what two without do
PAIRED: dict[str, dict[str, Any]] = {
    # frozen at first, then not; and the predictor has batch statistics
    "MT-ViT, predictor first": {**MT_VIT, **ONE_EPOCH, **MOMENTUM, "plan.predictor_only": 0.5},
    # with two images, a process may leave a tail out
    "MT-ViT, sparse": {**MT_VIT, **ONE_EPOCH, **MOMENTUM, "loss.mode": "sparse"},
    "drop-path, bfloat16": {
        **NO_MIX,
        **ONE_EPOCH,
        **MOMENTUM,
        "regularise.drop_path": 0.4,
        "run.checkpointing": True,
        "run.precision": "bfloat16",
    },
}


def run_case(name: str, data: Path, out: Path, *, sharded: bool, resume: bool = False) -> TrainResult:
    recipe = make_recipe({**{**CASES, **PAIRED}[name], "run.sharding": "full" if sharded else "none"})
    teacher = save_teacher(out.with_suffix(".teacher"), recipe) if recipe.teacher.share else None
    return train(recipe, data, out, teacher=teacher, resume=resume, device="cpu")


@contextmanager
def after_each_step(look: Callable[[Any], None]) -> Iterator[None]:
    """Look at a run once a step is done, before it is counted."""
    original = fit._Run._train_step

    def replaced(run: Any, images: Tensor, targets: Tensor) -> tuple[list[str], Tensor]:
        found = original(run, images, targets)
        look(run)
        return found

    fit._Run._train_step = replaced  # type: ignore[method-assign]
    try:
        yield
    finally:
        fit._Run._train_step = original  # type: ignore[method-assign]


def held(tensor: Any) -> Tensor:
    """What is in this process, without asking the code that is tested."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held_numbers(run: Any) -> dict[str, int]:
    """How many numbers this process holds between two steps, counted in the memory that stands behind them."""

    def numbers(tensors: list[Tensor]) -> int:
        return sum(held(tensor).untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)

    state = [value for values in run.optimiser.state_dict()["state"].values() for value in values.values()]
    parameters = list(run.model.parameters())
    return {
        "weights": numbers(parameters),
        "average": 0 if run.average is None else numbers(list(run.average.model.parameters())),
        "optimiser": numbers([value for value in state if isinstance(value, Tensor) and value.ndim]),
        "gradients": numbers([value.grad for value in parameters if value.grad is not None]),
    }


def stop_second(run: Any) -> None:
    """Ask the second process to stop, and nobody else."""
    if torch.distributed.get_rank() == 1 and run.step + 1 == STOPS_AFTER:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_and_go_on(data: Path, out: Path, *, sharded: bool) -> str:
    """Stop a run and go on in shards, leaving a copy of its folder as it was; returns what was said."""
    said = ""
    with after_each_step(stop_second):
        try:
            run_case("dense", data, out, sharded=sharded)
        except StoppedError as error:
            said = str(error)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(out, out.with_name(f"{out.name}, left"))
    torch.distributed.barrier()
    run_case("dense", data, out, sharded=True, resume=True)
    return said


def spoil_second(run: Any) -> None:
    """Make what the second process alone holds no number, after the first epoch's last step."""
    if torch.distributed.get_rank() == 1 and run.step + 1 == run.order.steps:
        held(run.model.head.weight.detach()).fill_(float("nan"))


def spoil(data: Path, out: Path) -> str:
    with after_each_step(spoil_second):
        try:
            run_case("dense", data, out, sharded=True)
        except TrainError as error:
            return str(error)
    return ""


def errors_of_moving_weights() -> list[float]:
    """How far the logits of whole weights are from those without kernels, while the shards change between two looks."""
    torch.manual_seed(0)
    model = pack_weights(create_model("vit_tiny_patch16_224", img_size=32, embed_dim=384, depth=2, num_heads=6).eval())
    images, errors = torch.randn(2, 3, 32, 32), []
    weights = ShardedWeights(torch.device("cpu"), torch.distributed.get_rank() == 0)
    module = weights.shard_(model)
    for _ in range(5):
        with torch.no_grad():
            with weights.whole(module):
                found = model(images)
                with use_backend("reference"):
                    wanted = model(images)
            errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
            for parameter in module.parameters():
                held(parameter).mul_(-1.1)
    return errors


def main(data: Path, out: Path) -> None:
    rank = int(os.environ["RANK"])  # no process group stands yet
    numbers: dict[str, dict[str, int]] = {}
    scores: dict[str, Any] = {}
    for name in (*CASES, *PAIRED):
        for sharded in (True, False) if name in PAIRED or name == "dense" else (True,):
            folder = out / (name if sharded else f"{name}, whole")

            def look(run: Any, key: str = folder.name) -> None:
                numbers[key] = held_numbers(run)

            with after_each_step(look):
                result = run_case(name, data, folder, sharded=sharded)
            scores[folder.name] = result.score._asdict()
            assert all(type(value) is nn.Parameter for value in result.model.parameters())
            torch.save(result.model.state_dict(), out / f"{folder.name}, {rank}.pt")
    said = [
        stop_and_go_on(data, out / "stopped", sharded=True),
        stop_and_go_on(data, out / "stopped whole", sharded=False),
        spoil(data, out / "spoilt"),
    ]
    # a training has ended its process group
    torch.distributed.is_initialized() or torch.distributed.init_process_group("gloo")
    found = {"held": numbers, "scores": scores, "said": said, "errors": errors_of_moving_weights()}
    (out / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
