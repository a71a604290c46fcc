"""The commands ``mtvit-ops train`` and ``mtvit-ops evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ._arguments import add_changes, count

_TRAIN_TEXT = """\
Train a model by a recipe: a TOML file that says everything but where the data
is, where the results go, and which weights to begin with.

The data is a folder or a zip with train/CLASS/*.jpg and val/CLASS/*.jpg (any
format that Pillow reads). Images that cannot be read are named and skipped. The
folder of the run gets state.pt (what --resume goes on from, written as a whole
or not at all), best.safetensors and last.safetensors (weights with everything
needed to use them), recipe.json, metrics.jsonl and TensorBoard's events.
"""

_TRAIN_EPILOG = """\
examples:
  a model of 1.4 million parameters on Imagenette:
    mtvit-ops train recipes/imagenette_micro_dense.toml \\
        --data imagenette.zip --out runs/dense
  halting, from that model:
    mtvit-ops train recipes/imagenette_micro_avit.toml \\
        --data imagenette.zip --out runs/avit \\
        --from runs/dense/best.safetensors \\
        --teacher runs/dense/best.safetensors
  go on after an interruption:
    mtvit-ops train ... --out runs/avit --resume
  another seed, for two epochs only:
    mtvit-ops train ... --set run.seed=1 --set optimiser.epochs=2
  eight GPUs of one machine, then two machines:
    torchrun --nproc-per-node 8 -m mtvit_ops train ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:29500 -m mtvit_ops train ...

exit code:
  0    all well
  1    the training could not go on; the last saved state is intact
  2    wrong use; nothing was written
  130  Ctrl-C, and 143 SIGTERM: the state was saved first
"""

_EVALUATE_TEXT = """\
Score trained weights on the images of a folder or zip: top-1, top-5 and loss,
each image counted exactly once on any number of processes.
"""

_EVALUATE_EPILOG = """\
examples:
    mtvit-ops evaluate runs/avit/best.safetensors --data imagenette.zip
    mtvit-ops evaluate runs/mtvit/best.safetensors --data photos/ --split "" \\
        --set cost_weight=2.5

exit code:
  0  all well
  1  some images could not be read; the others were scored
  2  wrong use
"""


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why."""


def add_commands(commands: Any) -> None:
    """Add both commands to the parser's."""
    train = commands.add_parser(
        "train",
        help="train a model by a recipe, on one device or many",
        description=_TRAIN_TEXT,
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(run=_run_train)
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file")
    train.add_argument("--data", required=True, metavar="DIR|ZIP", help="the images, in the layout above")
    train.add_argument("--out", required=True, metavar="DIR", help="folder of the run, one for all machines")
    train.add_argument(
        "--from", dest="start", metavar="FILE", help="weights to begin with (default: seeded random ones)"
    )
    train.add_argument("--reset-head", action="store_true", help="with --from: take everything but the classifier")
    train.add_argument(
        "--teacher", metavar="FILE", help="weights of the model that teaches, for recipes with a [teacher]"
    )
    train.add_argument("--resume", action="store_true", help="go on from the state in --out, if there is one")
    train.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: what Accelerate finds (default: %(default)s)"
    )
    add_changes(train, "TABLE.KEY=VALUE", "a value of the recipe")
    evaluate = commands.add_parser(
        "evaluate",
        help="score trained weights: top-1, top-5, loss",
        description=_EVALUATE_TEXT,
        epilog=_EVALUATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.set_defaults(run=_run_evaluate)
    evaluate.add_argument("weights", metavar="FILE", help="what a training wrote")
    evaluate.add_argument("--data", required=True, metavar="DIR|ZIP", help="the images")
    evaluate.add_argument("--split", default="val", help="sub-folder with the class folders (default: %(default)s)")
    evaluate.add_argument("--batch", type=count, default=64, metavar="N", help="images at once (default: %(default)s)")
    evaluate.add_argument("--workers", type=int, default=1, metavar="N", help="processes that decode (default: 1)")
    evaluate.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    evaluate.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: what Accelerate finds (default: %(default)s)"
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the score to this file")
    add_changes(evaluate, "KEY=VALUE", "a field of the model's configuration")


def _run_train(options: argparse.Namespace) -> int:
    from .progress import show_progress
    from .train.fit import StoppedError, train
    from .train.processes import is_first_process
    from .train.recipe import load_recipe
    from .train.state import TrainError

    try:
        recipe = load_recipe(options.recipe, dict(options.changes))
        with show_progress() as progress:
            result = train(
                recipe,
                options.data,
                options.out,
                start=options.start,
                resume=options.resume,
                reset_head=options.reset_head,
                teacher=options.teacher,
                device=None if options.device == "auto" else options.device,
                progress=progress,
            )
    except StoppedError as stopped:
        return 128 + stopped.signal
    except TrainError as error:
        print(f"mtvit-ops train: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    if not is_first_process():  # the first one speaks for all
        return 0
    print(
        f"top-1 {100 * result.score.top1:.2f} % of {result.score.images} images (best {100 * result.best:.2f} %)"
        f" after {result.steps} steps, {result.seconds:.0f} s; weights in {options.out}"
    )
    return 0


def _run_evaluate(options: argparse.Namespace) -> int:
    from .files import check_writable, write_atomically
    from .progress import show_progress
    from .train.evaluation import evaluate
    from .train.processes import is_first_process

    if options.json is not None and is_first_process():
        try:
            check_writable(Path(options.json))
        except OSError as error:
            raise UsageError(f"cannot write {options.json}: {error}") from error
    try:
        with show_progress() as progress:
            found = evaluate(
                options.weights,
                options.data,
                split=options.split,
                batch_size=options.batch,
                workers=options.workers,
                precision=options.precision,
                device=None if options.device == "auto" else options.device,
                progress=progress,
                **dict(options.changes),
            )
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    if not is_first_process():
        return 0
    print(
        f"top-1 {100 * found.top1:.2f} %  top-5 {100 * found.top5:.2f} %  loss {found.loss:.4f}"
        f"  of {found.images} images"
    )
    if options.json is not None:
        text = json.dumps(found._asdict(), indent=1).encode()
        try:
            write_atomically(Path(options.json), lambda file: file.write(text))
        except OSError as error:
            raise UsageError(f"cannot write {options.json}: {error}") from error
    if found.skipped:
        print(f"mtvit-ops evaluate: {found.skipped} images could not be read", file=sys.stderr)
        return 1
    return 0
