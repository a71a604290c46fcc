"""A training step of each method against the dense ViT's: forward, loss, backward, in turn, by median and ratio.

    python bench/training_step.py --data imagenette.zip --trained checkpoints --out bench/results/cpu/training.json

Trained models, where the image decides how many tokens live, on photographs of the training split. Realised fraction:
(dense / method's time) / (dense / method's multiply-accumulates); 1: removed tokens cost no training time. A-ViT trains
without its prior, which reads halted tokens. MT-ViT is not here: its training weighs no cost, so it chooses other tails
than the inference whose multiply-accumulates are counted. Exit code 0.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtvit_ops.environment import environment
from mtvit_ops.files import write_atomically
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.lineup_trained import find_trained
from mtvit_ops.nn import VisionTransformer
from mtvit_ops.progress import PlainProgress
from mtvit_ops.timing import spread, time_interleaved
from mtvit_ops.train import compute_loss
from mtvit_ops.train.images import open_images
from mtvit_ops.train.recipe import PRECISIONS
from mtvit_ops.train.views import EvalViews, eval_view, options_of
from mtvit_ops.weights import load_vit

# each method's loss where its training removes tokens
LOSSES: dict[str, dict[str, Any]] = {
    "vit": {},
    "avit": {"distribution": 0.0},
    "evovit": {"task": 1.0, "class_task": 0.0},
    "lifevit": {"stage": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder, or zip, with train/ at its root")
    parser.add_argument("--trained", required=True, type=Path, help="folder of model files, one a method")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    autocast = options.precision == "bfloat16"
    files = find_trained(options.trained)
    images, target = photographs(options.data, options.batch, files["vit"])
    runs, macs = {}, {}
    for name, loss in LOSSES.items():
        model, _ = load_vit(files[name])  # evaluation mode: nothing is drawn, and no weight has another gradient
        macs[name] = count_batch_macs(model, images)
        runs[name] = partial(step, model, images, target, loss, autocast)
    seconds = time_interleaved(runs, options.rounds, torch.device("cpu"), PlainProgress())
    rows = {}
    for name, values in seconds.items():
        time, dense = spread(values).median, spread(seconds["vit"]).median
        ratio = macs[name] / macs["vit"]
        rows[name] = {"seconds": values, "mac_ratio": ratio, "speed_up": dense / time, "realised": dense / time * ratio}
        print(
            f"{name:8} {1e3 * time:7.1f} ms  MAC ratio {ratio:.3f}  speed-up {dense / time:.2f}  realised"
            f" {dense / time * ratio:.2f}"
        )
    report = {
        "batch": options.batch,
        "threads": options.threads,
        "precision": options.precision,
        "environment": environment(),
        "models": rows,
    }
    text = json.dumps(report, indent=1, default=str).encode()
    write_atomically(options.out, lambda file: file.write(text))


def photographs(data: Path, count: int, weights: Path) -> tuple[Tensor, Tensor]:
    """As many of the training split, spread over its classes, as the model evaluates them."""
    model, info = load_vit(weights)
    images = open_images(data, "train", cache=False)
    views = EvalViews(images, eval_view(model.config.img_size, options_of(info)))
    chosen = [views[index * len(images) // count] for index in range(count)]
    return torch.stack([pixels for pixels, *_ in chosen]), torch.tensor([target for _, target, *_ in chosen])


def step(model: VisionTransformer, images: Tensor, target: Tensor, loss: dict[str, Any], autocast: bool) -> None:
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        total, _ = compute_loss(model, images, target, **loss)
    total.backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
