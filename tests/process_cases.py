"""A training step in each of several processes, each of which runs this file."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss_cases import make_target
from model_cases import build, in_float64, make_images
from torch import Tensor, nn

import mtvit_ops
from mtvit_ops.nn import VisionTransformer
from mtvit_ops.train import compute_loss

WORLD, BATCH = 2, 6

# weights so large that a statistic of half the batch shows in the loss
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "avit-intended": ("avit", {"ponder": 0.3, "distribution": 5.0}),
    "avit-official": ("avit", {"ponder": 0.3, "distribution": 5.0, "statistic": "official"}),
    "mtvit-dense": ("mtvit", {"mode": "dense", "flops": 20.0, "entropy": 2.0, "cost_target": 0.5}),
    "mtvit-sparse": ("mtvit", {"mode": "sparse", "flops": 20.0, "entropy": 2.0, "cost_target": 0.5}),
}


class Problem(NamedTuple):
    """One loss to take."""

    model: VisionTransformer  # float64, in evaluation mode, where MT-ViT draws no noise
    images: Tensor
    target: Tensor
    weights: dict[str, Any]


class Step(NamedTuple):
    """What came out in one process."""

    loss: Tensor
    terms: dict[str, Tensor]
    grads: dict[str, Tensor]


def problem(name: str) -> Problem:
    """A row of ``CASES`` over the whole batch."""
    method, weights = CASES[name]
    model = in_float64(build(method, **({"predictor_size": 32} if method == "mtvit" else {"gate_center": 3.0})))
    return Problem(model, make_images(BATCH).double(), make_target(BATCH), weights)


class Objective(nn.Module):
    """The loss as the forward that ``DistributedDataParallel`` hooks into."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, target: Tensor, weights: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return compute_loss(self.model, images, target, **weights)


def run_all(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Each case in ``WORLD`` processes; the fields of each one's ``Step`` by case."""
    paths = [str(Path(mtvit_ops.__file__).parent.parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    for process in processes:
        errors = process.communicate()[1]  # one that lost the other ends, too
        assert process.returncode == 0, errors.decode()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def run_one(rank: int, folder: Path) -> None:
    """Each case with this process's share of the batch; writes ``<rank>.pt``."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", meeting, timedelta(minutes=2), WORLD, rank)
    steps = {}
    for name in CASES:
        model, images, target, weights = problem(name)
        shared = nn.parallel.DistributedDataParallel(Objective(model), find_unused_parameters=True).eval()
        loss, terms = shared(images.chunk(WORLD)[rank], target.chunk(WORLD)[rank], weights)
        loss.backward()
        grads = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        steps[name] = Step(loss.detach(), {key: term.detach() for key, term in terms.items()}, grads)._asdict()
    torch.save(steps, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_one(int(sys.argv[1]), Path(sys.argv[2]))
