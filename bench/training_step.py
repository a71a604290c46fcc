"""A training step of each method against the dense ViT's: forward, loss, backward, in turn, by median and ratio.

    python bench/training_step.py --out bench/results/cpu/training.json

Realised fraction: (dense / method's time) / (dense / method's multiply-accumulates); 1: removed tokens cost no training
time. Exit code 0.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtvit_ops import create_model
from mtvit_ops.environment import environment
from mtvit_ops.files import write_atomically
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.nn import VisionTransformer
from mtvit_ops.progress import PlainProgress
from mtvit_ops.timing import spread, time_interleaved
from mtvit_ops.train import compute_loss

# method, its options, its loss; those whose training removes tokens
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": ({}, {}),
    "evovit": ({"keep_ratios": 0.55, "class_head": True}, {}),
    "lifevit": ({"base_block": 2, "keep_ratio": 0.69}, {"stage": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"img_size": 112, "patch_size": 8, "embed_dim": 128, "depth": 7, "num_heads": 2, "num_classes": 10}
    images, target = torch.randn(options.batch, 3, 112, 112), torch.randint(0, 10, (options.batch,))
    runs, macs = {}, {}
    for name, (own, loss) in CASES.items():
        model = create_model(f"{name}_tiny_patch16_224", **sizes, **own)
        macs[name] = count_batch_macs(model.eval(), images)
        runs[name] = partial(step, model.train(), images, target, loss)
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
        "sizes": sizes,
        "batch": options.batch,
        "threads": options.threads,
        "precision": "bfloat16 autocast",
        "environment": environment(),
        "models": rows,
    }
    text = json.dumps(report, indent=1, default=str).encode()
    write_atomically(options.out, lambda file: file.write(text))


def step(model: VisionTransformer, images: Tensor, target: Tensor, loss: dict[str, Any]) -> None:
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        total, _ = compute_loss(model, images, target, **loss)
    total.backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
