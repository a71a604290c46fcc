"""Trainings that one process and two must agree on; run by ``torchrun`` as ``distributed_cases.py DATA OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from train_cases import A_VIT, MICRO, make_recipe

from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import train

MIX = {"mix.mixup": 0.8, "mix.cutmix": 1.0}
NO_MIX = {"mix": {}, "loss.label_smoothing": 0.1}

CASES: dict[str, dict[str, Any]] = {
    "dense, mixed": {**MIX},
    "dense, paired by nothing": {**NO_MIX},
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


def run_case(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Train, evaluate what came out, and return that score."""
    train(make_recipe(CASES[name]), data, out / name, device="cpu")
    found = evaluate(out / name / "last.safetensors", data, batch_size=2, workers=0, device="cpu")
    return found._asdict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = Path(sys.argv[1]), Path(sys.argv[2])
    scores = {name: run_case(name, *folders) for name in CASES}
    rank = torch.distributed.get_rank()
    (folders[1] / f"scores-{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()
