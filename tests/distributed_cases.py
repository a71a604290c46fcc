"""Trainings that one process and two must agree on; run by ``torchrun`` as ``distributed_cases.py DATA OUT``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_cases import A_VIT, CLASSES, LEVIT, MICRO, make_recipe

from mtvit_ops.train import fit
from mtvit_ops.train.build import build_model
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.recipe import Recipe
from mtvit_ops.weights import ModelInfo, save_model

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

MIX = {"mix.mixup": 0.8, "mix.cutmix": 1.0}
NO_MIX = {"mix": {}, "loss.label_smoothing": 0.1}

CASES: dict[str, dict[str, Any]] = {
    "dense, mixed": {**MIX},
    "dense, paired by nothing": {**NO_MIX},
    "dense, taught": {**MIX, "teacher.share": 0.5},
    "dense, repeated views": {**MIX, "augment.repeats": 3, "augment.reprob": 0.5},
    # halted tokens are removed: each process has as many as its images keep
    "A-ViT, uneven": {**MIX, "model": A_VIT, "loss.distribution": 0.0, "loss.ponder": 0.05},
    # a term that is no mean over images
    "A-ViT, prior": {**NO_MIX, "model": A_VIT, "loss.distribution": 1.0},
    "Evo-ViT": {
        **NO_MIX,
        "model": {"name": "evovit_tiny_patch16_224", **MICRO, "depth": 3, "class_head": True},
        "plan.stage_from": 0.5,
    },
    "MT-ViT, tails": {
        **NO_MIX,
        "model": {"name": "mtvit_tiny_patch16_224", **MICRO, "predictor_size": 16},
        "loss.mode": "tails",
        "run.checkpointing": True,
    },
}

MT_VIT = {**NO_MIX, "model": {"name": "mtvit_tiny_patch16_224", **MICRO, "predictor_size": 16}, "loss.flops": 0.0}

# draws that every process makes for itself: they run, and end with the same weights everywhere
OWN_DRAWS: dict[str, dict[str, Any]] = {
    "MT-ViT, predictor alone": {**MT_VIT, "plan.predictor_only": 1.0},
    "MT-ViT, predictor first": {**MT_VIT, "plan.predictor_only": 0.5},
}
# batch norms of a process's own images
OWN_DRAWS["Evo-LeViT"] = {**NO_MIX, "model": {**LEVIT, "distillation": False}, "optimiser.clip_mode": "agc"}
if find_spec("kornia") is not None:
    OWN_DRAWS["views on the device"] = {**NO_MIX, "data.augment_on": "device"}


def launch_two(script: str, data: Path, out: Path) -> None:
    """Run a file of this folder in two processes."""
    command = [*LAUNCH, str(ROOT / "tests" / script), str(data), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def rounding(step: int) -> float:
    """What two processes may differ by from one: a mean over 4 images in two halves, of losses that each took some ten
    roundings, and weights that carry one more in every step before."""
    return (8 + 2 * step) * torch.finfo(torch.float32).eps


def assert_close(one: dict[str, Any], other: dict[str, Any], step: int) -> None:
    """Two records, to rounding."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):
            assert abs(value - other[name]) <= rounding(step) * max(1.0, abs(value)), (name, step, value, other[name])
        else:
            assert value == other[name], (name, step)


def run_case(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Train, evaluate what came out, and return that score."""
    recipe = make_recipe({**CASES, **OWN_DRAWS}[name])
    teacher = save_teacher(out / f"{name}, teacher.safetensors", recipe) if recipe.teacher.share else None
    train(recipe, data, out / name, teacher=teacher, device="cpu")
    found = evaluate(out / name / "last.safetensors", data, batch_size=2, workers=0, device="cpu")
    return found._asdict()


def save_teacher(path: Path, recipe: Recipe) -> Path:
    """Random weights, the same in every process."""
    torch.manual_seed(1)
    info = ModelInfo({**recipe.model, "num_classes": len(CLASSES)}, CLASSES, 0.875, {})
    save_model(path, build_model(recipe, len(CLASSES)).state_dict(), info)
    return path


def stop_evaluation(data: Path, out: Path) -> str:
    """Ask the second process, and nobody else, to stop at its second image to evaluate; then go on."""
    recipe = make_recipe({**MIX, "run.eval_batch": 1})
    load = fit.eval_batches

    def signalling(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(load(*args)):
            if torch.distributed.get_rank() == 1 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    fit.eval_batches = signalling
    try:
        train(recipe, data, out, device="cpu")
        said = ""
    except StoppedError as error:
        said = str(error)
    finally:
        fit.eval_batches = load
    torch.distributed.barrier()
    train(recipe, data, out, resume=True, device="cpu")
    return said


def resume_apart(data: Path, out: Path) -> str:
    """Go on in a folder that the second process does not see, as on a machine with a disk of its own."""
    own = out if torch.distributed.get_rank() == 0 else out.with_name("elsewhere")
    try:
        train(make_recipe({**MIX, "run.eval_batch": 1}), data, own, resume=True, device="cpu")
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = Path(sys.argv[1]), Path(sys.argv[2])
    scores = {name: run_case(name, *folders) for name in (*CASES, *OWN_DRAWS)}
    rank = torch.distributed.get_rank()
    (folders[1] / f"scores-{rank}.json").write_text(json.dumps(scores))
    (folders[1] / f"said-{rank}").write_text(stop_evaluation(folders[0], folders[1] / "stopped in evaluation"))
    (folders[1] / f"apart-{rank}").write_text(resume_apart(folders[0], folders[1] / "stopped in evaluation"))
    torch.distributed.destroy_process_group()
