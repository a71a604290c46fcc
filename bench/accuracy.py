"""Trained models on labelled photographs: accuracy, cost and time in one table, with random choices as controls.

    python bench/accuracy.py --data imagenette.zip --trained checkpoints --out bench/results/accuracy/seed0.json

Runs ``mtvit-ops compare --trained`` on the whole validation split, then the same models with tokens or tails chosen at
random in the same numbers, and writes everything as JSON. A zip must have ``val/`` at its root, not in a folder above
it, which a training would pass over. Exit codes: 0 done, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from random_choice import right_at_random
from torch import Tensor

from mtvit_ops.compare import CompareResult, run_compare
from mtvit_ops.compare_options import CompareError, CompareOptions
from mtvit_ops.files import write_atomically
from mtvit_ops.lineup import BASELINE, TITLES
from mtvit_ops.lineup_trained import find_trained
from mtvit_ops.progress import show_progress
from mtvit_ops.report import print_report, to_json
from mtvit_ops.train.images import open_images
from mtvit_ops.train.loading import eval_batches
from mtvit_ops.train.views import options_of
from mtvit_ops.weights import ModelInfo, load_vit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder, or zip with val/ at its root")
    parser.add_argument("--trained", required=True, type=Path, help="folder of model files, one a method")
    parser.add_argument("--control", type=Path, help="model file of the dense ViT trained on, as the others were")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=8, help="of the timing (default: 8)")
    parser.add_argument("--sample", type=int, default=64, help="photographs timed (default: 64)")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each model (default: 15)")
    parser.add_argument("--draws", type=int, default=1, help="of every control (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        with validation_folder(options.data) as folder, show_progress() as progress:
            wanted = CompareOptions(
                photos=(str(folder),),
                trained=str(options.trained),
                batch=options.batch,
                sample=options.sample,
                rounds=options.rounds,
                threads=options.threads,
            )
            result = run_compare(wanted, progress)
    except (CompareError, ValueError, OSError) as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2
    print_report(result)
    torch.set_num_threads(options.threads)
    report = to_json(result)
    report["options"] |= {"photos": ["val"], "trained": options.trained.name}  # no paths of a machine
    report["accuracy"] = accuracies(options, result)
    text = json.dumps(report, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(text))
    return 0


def accuracies(options: argparse.Namespace, result: CompareResult) -> dict[str, Any]:
    """For each model its top-1, that of its control, and where its weights come from."""
    files = find_trained(options.trained)
    images = open_images(options.data, "val", cache=True)
    found: dict[str, Any] = {}
    for row in result.rows:
        model, info = load_vit(files[row.name])
        batches = Batches(images, model.config.img_size, info)
        facts = info.facts
        entry: dict[str, Any] = {
            "top1": row.top1,
            "images": len(images),
            "model": info.model,
            "chain": facts.get("chain"),
            "seed": facts["recipe"]["run"]["seed"],
            "recipe": facts["recipe"],
            "steps": facts["step"],
            "training_seconds": facts.get("training_seconds"),
        }
        if row.name != BASELINE:
            begin = time.monotonic()
            draws = [right_at_random(model, batches, seed) / len(images) for seed in range(options.draws)]
            entry["random_top1"] = sum(draws) / len(draws)
            entry["random_top1_draws"] = draws
            shown = f"{TITLES[row.name]}: top-1 {row.top1:.2%}, at random {entry['random_top1']:.2%}"
            print(f"{shown} ({time.monotonic() - begin:.0f} s)", flush=True)
        found[row.name] = entry
    if options.control is not None:
        model, info = load_vit(options.control)
        batches = Batches(images, model.config.img_size, info)
        with torch.inference_mode():
            right = sum(int((model(pixels).argmax(dim=1) == targets).sum()) for pixels, targets in batches)
        found["vit_trained_on"] = {"top1": right / len(images), "images": len(images), "recipe": info.facts["recipe"]}
        print(f"dense, trained on: top-1 {right / len(images):.2%}")
    return found


class Batches:
    """The validation images again and again."""

    def __init__(self, images: Any, img_size: int, info: ModelInfo) -> None:
        self.images, self.img_size, self.view = images, img_size, options_of(info)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return eval_batches(self.images, self.img_size, self.view, 128, 0)


@contextmanager
def validation_folder(data: Path) -> Iterator[Path]:
    """The validation split as a folder; a zip's is unpacked and removed again."""
    if data.is_dir():
        yield data / "val"
        return
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(data) as archive:
        names = [name for name in archive.namelist() if name.startswith("val/")]
        archive.extractall(place, names)
        yield Path(place) / "val"


if __name__ == "__main__":
    sys.exit(main())
