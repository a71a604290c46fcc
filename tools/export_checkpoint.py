"""A trained model made ready to be shipped: half precision, its cost set, its score measured, a model card beside it.

    python tools/export_checkpoint.py runs/avit/best.safetensors --data imagenette.zip --mac-ratio 0.65 \\
        --chain "imagenette_micro_dense.toml, imagenette_micro_avit.toml" --out checkpoints/avit.safetensors

The method's cost field is calibrated on training images (never on those that score it), the weights are rounded to half
precision, and the file as written is what is scored on the validation images. Exit codes: 0 done, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mtvit_ops import calibrate
from mtvit_ops._arguments import add_changes
from mtvit_ops.files import write_atomically
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.methods import Dense
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.images import open_images
from mtvit_ops.train.views import EvalViews, eval_view, options_of
from mtvit_ops.weights import ModelInfo, load_vit, save_model

# WordNet's names of Imagenette's folders
CLASS_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
SAMPLE = 256  # training images to calibrate on
CARD = """\
# {title}

{method}, {millions:.2f} million parameters, half precision, {kib:.0f} KiB: `{file}`.

| | |
|---|---|
| task | ten classes of ImageNet-1K (Imagenette), {img_size} px in {patch} x {patch} patches |
| top-1 | {top1:.2%} on {images} validation photographs, centre crop, float32 |
| multiply-accumulates | {gmacs:.4f} G an image on {sample} validation photographs, {ratio:.3f} of the dense model's |
| configuration | {config} |
| trained with | {chain}, seed {seed} |

Use: `mtvit_ops.weights.load_model("{file}")`, `mtvit-ops evaluate {file} --data ...`, `mtvit-ops compare --trained
checkpoints`. The file's metadata holds the recipe and the class folders.

Meant for trying the package out and for its tests. Trained on some nine thousand photographs of ten things: on any
other picture its answer means nothing. The photographs are ImageNet's, for research use; none is in this repository.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="what mtvit-ops train wrote")
    parser.add_argument("--data", required=True, type=Path, help="folder or zip with train/ and val/")
    parser.add_argument("--out", required=True, type=Path, help="the file to write; its card gets the suffix .md")
    parser.add_argument("--mac-ratio", type=float, help="calibrate the cost to this share of the dense model's")
    add_changes(parser, "KEY=VALUE", "a field of the model's configuration")
    parser.add_argument("--chain", required=True, help="the recipes that led here, in order")
    options = parser.parse_args()
    try:
        changes = dict(options.changes)
        export(options.weights, options.data, options.out, options.mac_ratio, options.chain, changes)
    except (ValueError, TypeError, OSError) as error:
        print(f"export_checkpoint: error: {error}", file=sys.stderr)
        return 2
    return 0


def export(weights: Path, data: Path, out: Path, mac_ratio: float | None, chain: str, changes: dict[str, Any]) -> None:
    model, info = load_vit(weights, **changes)
    options = {**info.model, **changes}
    if hasattr(model.method, "head_cls"):  # inference has no use for Evo-ViT's second classifier
        del options["class_head"]
        model, _ = load_vit(weights, **{**changes, "class_head": False})
    if mac_ratio is not None:
        done = calibrate(model, sample(data, "train", model.config.img_size, info), mac_ratio)
        options[done.field] = done.value
        print(f"{done.field} = {done.value:g}: MAC ratio {done.mac_ratio:.4f} on {SAMPLE} training images")
    names = [CLASS_NAMES.get(folder, folder) for folder in info.classes]
    facts = {**info.facts, "class_names": names, "chain": chain, "training_seconds": seconds_of(weights.parent)}
    save_model(out, model.state_dict(), info._replace(model=options, facts=facts), dtype=torch.float16)
    score = evaluate(out, data, device="cpu")
    shipped, _ = load_vit(out)
    images = sample(data, "val", model.config.img_size, info)
    macs = mean_macs(shipped, images)
    ratio = macs / mean_macs(shipped.with_method(Dense(Dense.config_class())), images)
    recipe = facts["recipe"]
    config = {key: value for key, value in options.items() if key != "name"}
    card = CARD.format(
        title=f"{out.stem}: {recipe['title']}",
        method=options["name"],
        millions=sum(each.numel() for each in shipped.parameters()) / 1e6,
        kib=out.stat().st_size / 1024,
        file=f"{out.parent.name}/{out.name}",
        img_size=shipped.config.img_size,
        patch=shipped.config.patch_size,
        top1=score.top1,
        images=score.images,
        gmacs=macs / 1e9,
        ratio=ratio,
        sample=len(images),
        config=", ".join(f"`{key}={value}`" for key, value in config.items()),
        chain=chain,
        seed=recipe["run"]["seed"],
    )
    write_atomically(out.with_suffix(".md"), lambda file: file.write(card.encode()))
    print(f"{out}: top-1 {score.top1:.2%}, MAC ratio {ratio:.4f}")


def seconds_of(run: Path) -> float | None:
    """What the run took, of training and evaluation, by its journal."""
    journal = run / "metrics.jsonl"
    if not journal.is_file():
        return None
    return max(json.loads(line)["seconds"] for line in journal.read_text().splitlines())


def sample(data: Path, split: str, img_size: int, info: ModelInfo) -> torch.Tensor:
    """Images spread over a split, (SAMPLE, 3, img_size, img_size)."""
    images = open_images(data, split, cache=False)
    views = EvalViews(images, eval_view(img_size, options_of(info)))
    places = sorted({index * len(views) // SAMPLE for index in range(SAMPLE)})
    read = [views[place] for place in places]
    return torch.stack([pixels for pixels, target, _ in read if target >= 0])


def mean_macs(model: torch.nn.Module, images: torch.Tensor) -> float:
    batches = images.split(32)
    return sum(count_batch_macs(model, batch) * len(batch) for batch in batches) / len(images)


if __name__ == "__main__":
    sys.exit(main())
