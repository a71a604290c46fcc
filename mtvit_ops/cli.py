"""The command line: ``mtvit-ops env``, ``compare``, ``train`` and ``evaluate``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli_train
from ._arguments import count, override, ratio, seed
from ._extension import build_info
from ._version import __version__
from .compare_options import DEFAULT_RATIO, DEFAULT_SIZE, DTYPES, SIZES, CompareError, CompareOptions
from .environment import describe_environment
from .lineup import BASELINE, METHODS, TITLES

_DEFAULTS = CompareOptions()

_COMPARE_TEXT = """\
Run the dense vision transformer and four adaptive ones on photographs.

Each adaptive method gets the dense model's weights and is calibrated to the
same share of its multiply-accumulates (--mac-ratio); with --trained each has
size, weights and cost of its own. Before anything is timed, each is checked:
removing tokens must give what masking them gives, and an image in a batch what
it gives alone. Then all models are timed in turn, and one table says what the
saving on paper is worth on the clock. With --out, pictures show which patches
lived how long.
"""

_COMPARE_EPILOG = """\
methods:
{methods}

examples:
  scikit-image's free photographs, table only:
    mtvit-ops compare
  the same, with pictures, chart and JSON:
    mtvit-ops compare --out demo-output
  two photographs, two methods, one image at a time:
    mtvit-ops compare cat.jpg dog.jpg --models avit,mtvit --size tiny --batch 1
  a folder, with trained weights:
    mtvit-ops compare photos/ --checkpoint all=deit_small_patch16_224.pth
  trained models on a folder of class folders, with top-1:
    mtvit-ops compare val/ --trained checkpoints/

top-1:
  shown if the folder has class sub-folders. Their sorted names are taken for
  the model's outputs if there are as many; or --labels says which folder
  belongs to which output.

exit code:
  0  all well
  1  some photographs could not be read; the others were processed
  2  wrong use, or no photograph left
  3  a model failed its check, and nothing was timed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit code. Wrong use of an option ends in ``SystemExit(2)``, as argparse does it.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_environment()
        return options.run(options)
    except KeyboardInterrupt:
        print("mtvit-ops: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CompareError, ImportError, cli_train.UsageError) as error:
        print(f"mtvit-ops {options.command}: error: {error}", file=sys.stderr)
        return 2


def _check_environment() -> None:
    try:
        build_info()
    except RuntimeError as error:  # MTVIT_OPS_ISA names what this CPU does not have
        raise CompareError(str(error).splitlines()[0]) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtvit-ops",
        description="Adaptive vision transformers in which a removed token costs nothing on the clock.",
        epilog="'mtvit-ops COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"mtvit-ops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    env = commands.add_parser(
        "env",
        help="versions, devices, what was built, and which backends there are",
        description="Print versions, devices, what was built, and each backend: available, or why not.",
    )
    env.set_defaults(run=_run_env)
    _add_compare(commands)
    cli_train.add_commands(commands)
    return parser


def _run_env(options: argparse.Namespace) -> int:
    print(describe_environment())
    return 0


def _add_compare(commands: Any) -> None:
    methods = "\n".join(f"  {name:<8} {TITLES[name]}" for name in METHODS)
    compare = commands.add_parser(
        "compare",
        help="dense and adaptive models on your photographs: tokens, operations, milliseconds, pictures",
        description=_COMPARE_TEXT,
        epilog=_COMPARE_EPILOG.format(methods=methods),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.set_defaults(run=_run_compare)
    texts = {
        "photos": "files, or folders to search (default: free photographs that scikit-image installs)",
        "models": f"methods to compare, separated by commas (default: all); {BASELINE}, the dense one, always runs",
        "trained": "folder of model files that mtvit-ops train wrote, one a method, the dense ViT among them; each runs"
        " as it was trained, unless --mac-ratio asks for another cost",
        "size": f"of the backbone, as DeiT names them (default: {DEFAULT_SIZE}; with --trained: as the files have it)",
        "mac_ratio": "share of the dense model's multiply-accumulates to calibrate to, above 0 up to 1 (default:"
        f" {DEFAULT_RATIO}; with --trained: as the files have it)",
        "batch": "images run at once (default: %(default)s)",
        "dtype": "of weights and images (default: %(default)s)",
        "device": "auto, cpu, cuda, cuda:1 ... (default: auto: CUDA if there is one)",
        "checkpoint": "weights for one method, or for 'all' to share: .safetensors or PyTorch files in the layouts of"
        " timm, DeiT and the methods' authors; may be given again (default: seeded random weights)",
        "out": "write a picture for each photograph, speed-up.png and compare.json here",
        "json": "write everything measured to this file",
        "labels": "text file with the class folder of each output, one a line, in order",
        "rounds": "how often each model is timed (default: %(default)s)",
        "sample": "calibrate on and time at most this many photographs, spread over the list, but at least a batch"
        " (default: %(default)s)",
        "threads": "CPU threads (default: PyTorch's choice)",
        "seed": "of random weights (default: %(default)s)",
        "override": "any field of the backbone (num_classes=10, depth=6 ...) or of the methods (eps=0.05,"
        " evovit.mode=layer, 'grids=(4,8,14)' ...); may be given again",
    }

    def add(name: str, **settings: Any) -> None:
        flag = name if name == "photos" else "--" + name.replace("_", "-")
        default = [] if settings.get("action") == "append" else getattr(_DEFAULTS, name, None)
        compare.add_argument(flag, default=default, help=texts[name], **settings)

    add("photos", nargs="*", metavar="PHOTO|FOLDER")
    add("models", type=_models, metavar="NAME,NAME")
    add("trained", metavar="DIR")
    add("size", choices=SIZES)
    add("mac_ratio", type=ratio, metavar="R")
    add("batch", type=count, metavar="N")
    add("dtype", choices=tuple(DTYPES))
    add("device")
    add("checkpoint", type=_checkpoint, metavar="NAME=PATH", action="append")
    add("out", metavar="DIR")
    add("json", metavar="FILE")
    add("labels", metavar="FILE")
    add("rounds", type=count, metavar="N")
    add("sample", type=count, metavar="N")
    add("threads", type=count, metavar="N")
    add("seed", type=seed, metavar="N")
    add("override", type=override, metavar="KEY=VALUE", action="append")


def _run_compare(options: argparse.Namespace) -> int:
    from .chart import check_matplotlib, write_chart
    from .compare import run_compare
    from .equality import UnequalError
    from .progress import show_progress
    from .report import print_report, write_json
    from .viz import CHART_NAME

    labels = _read_labels(options.labels)
    out = _folder("--out", options.out)
    json_file = _file_place("--json", options.json)
    if out is not None:
        check_matplotlib()
    wanted = CompareOptions(
        photos=tuple(options.photos),
        models=options.models,
        size=options.size,
        trained=options.trained,
        mac_ratio=options.mac_ratio,
        batch=options.batch,
        dtype=options.dtype,
        device=options.device,
        checkpoints=dict(options.checkpoint),
        overrides=dict(options.override),
        labels=labels,
        out=options.out,
        rounds=options.rounds,
        threads=options.threads,
        seed=options.seed,
        sample=options.sample,
    )
    try:
        with show_progress() as progress:
            result = run_compare(wanted, progress)
    except UnequalError as error:
        print(f"mtvit-ops compare: error: {error}", file=sys.stderr)
        return 3
    print_report(result)
    try:
        if out is not None:
            write_chart(result, out / CHART_NAME)
            write_json(result, out / "compare.json")
            print(f"\n{len(result.pictures)} pictures, {CHART_NAME} and compare.json are in {out}")
        if json_file is not None:
            write_json(result, json_file)
    except OSError as error:
        raise CompareError(f"cannot write the results: {error}") from error
    if result.problems:
        print(f"mtvit-ops compare: {len(result.problems)} of the photographs could not be used:", file=sys.stderr)
        for problem in result.problems:
            print(f"  {problem.path}: {problem.reason}", file=sys.stderr)
        return 1
    return 0


def _models(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected names out of {', '.join(METHODS)}, got {(unknown or [text])[0]!r}")
    return names


def _checkpoint(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path or name not in (*METHODS, "all"):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH with NAME out of {', '.join(METHODS)}, all; got {text!r}")
    try:
        is_file = Path(path).is_file()
    except OSError as error:  # a name too long
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {path!r}: {error.strerror}") from error
    if not is_file:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, and there is no file {path!r}")
    return name, path


def _read_labels(file: str | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"argument --labels: expected a text file, got {file!r}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _folder(option: str, text: str | None) -> Path | None:
    """The folder, created: the work before the first file is long."""
    if text is None:
        return None
    if not text:
        raise CompareError(f"argument {option}: expected a folder or a place for one, got {text!r}")
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompareError(f"argument {option}: expected a folder or a place for one, got {text!r}: {error}") from error
    return Path(text)


def _file_place(option: str, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise CompareError(f"argument {option}: expected a file in an existing folder, got {text!r}")
    return path
