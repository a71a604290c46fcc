"""The house rules that a machine can hold: import direction, file budgets, lean import, the public ops."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtvit_ops
from mtvit_ops import ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(mtvit_ops.__file__).parent

# cli -> train, engine -> patch -> methods -> nn -> ops -> {reference, kernels, _C}: a module imports from its own level
# or from later ones. What is not named (models, checkpoints, flops, ...) stands beside train and engine.
LEVELS = (
    ("cli", "__main__", "cli_train"),
    ("train", "engine"),
    ("patch",),
    ("methods",),
    ("nn",),
    ("ragged",),
    ("ops",),
    ("_register",),
    ("reference", "kernels", "_extension", "_backend", "_checks", "_cpu_linear", "_version", "_timm"),
)
BESIDE_ENGINE = 1
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# these two import nothing of ours but themselves
CLOSED = ("reference", "kernels")


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names of everything of ours that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            # `from . import x` and `from .. import x` may name modules: the longer name says which
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name == "mtvit_ops" or name.startswith("mtvit_ops."))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a module that go against the stream."""
    parts = module.split(".")
    part = parts[1] if len(parts) > 1 else ""
    level = LEVEL_OF.get(part, BESIDE_ENGINE)
    found = []
    for name in imports_of(source, module, is_package):
        target = name.split(".")[1] if "." in name else ""
        if target == part:
            continue
        if part in CLOSED or LEVEL_OF.get(target, BESIDE_ENGINE) < level:
            found.append(f"{module} imports {name}")
    return found


def modules() -> dict[str, Path]:
    files = {
        f"mtvit_ops.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in PACKAGE.rglob("*.py")
    }
    kernels = next(folder for folder in (PACKAGE / "kernels", ROOT / "kernels") if folder.is_dir())
    files |= {f"mtvit_ops.kernels.{path.stem}": path for path in kernels.glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_imports_flow_one_way(name: str) -> None:
    path = MODULES[name]
    assert violations(path.read_text(encoding="utf-8"), name, path.name == "__init__.py") == []


FAKES = {  # module, its source, how many violations
    "ops-import-nn": ("mtvit_ops.ops.fake", "from ..nn import block", 1),
    "ops-import-nn-by-name": ("mtvit_ops.ops.fake", "import mtvit_ops.nn.block", 1),
    "ops-import-nn-from-root": ("mtvit_ops.ops.fake", "from .. import nn", 1),
    "ops-import-the-root": ("mtvit_ops.ops.fake", "import mtvit_ops", 1),
    "ops-import-an-unnamed-module": ("mtvit_ops.ops.fake", "from ..flops import count_macs", 1),
    "inside-a-function": ("mtvit_ops.nn.fake", "def f():\n    from ..methods.a_vit import AViT", 1),
    "two-at-once": ("mtvit_ops.nn.fake", "from .. import methods, patch", 2),
    "package-init": ("mtvit_ops.ops", "from ..nn import block", 1),
    "reference-imports-checks": ("mtvit_ops.reference.fake", "from .._checks import check_tensor", 1),
    "kernels-import-ops": ("mtvit_ops.kernels.fake", "from ..ops import token_select", 1),
    "checks-import-register": ("mtvit_ops._checks", "from ._register import register_op", 1),
    "downwards": ("mtvit_ops.methods.fake", "from ..nn import block\nfrom ..ops import token_select\nimport torch", 0),
    "beside": ("mtvit_ops.ops.fake", "from .token_select import token_select\nfrom . import slow_fast", 0),
    "own-package-by-name": ("mtvit_ops.reference.fake", "from mtvit_ops.reference import _segments", 0),
    "patch-imports-models": ("mtvit_ops.patch.fake", "from ..models import create_model", 1),
    "models-import-cli": ("mtvit_ops.models", "from .cli import main", 1),
    "cli-imports-models": ("mtvit_ops.cli", "from . import __version__\nfrom .models import create_model", 0),
    "from-the-top": ("mtvit_ops.models", "from .methods import AViT\nfrom .checkpoints import load_checkpoint", 0),
    "another-package": ("mtvit_ops.ops.fake", "import mtvit_ops_cpp\nfrom nn import x", 0),
}


@pytest.mark.parametrize(("module", "source", "count"), FAKES.values(), ids=FAKES)
def test_the_import_rule_bites(module: str, source: str, count: int) -> None:
    assert len(violations(source, module, is_package=module == "mtvit_ops.ops")) == count


def test_files_stay_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.cu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    sizes = {
        name: len((ROOT / name).read_bytes().splitlines()) for name in listed.stdout.split() if (ROOT / name).exists()
    }
    assert sizes
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def logic(source: str, cure: bool) -> list[str]:
    """What an ``__init__.py`` holds beyond docstring, imports and ``__all__``; ``cure`` allows one ``if``."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            continue
        if cure and isinstance(node, ast.If) and ast.unparse(node.body[0]).startswith("__path__.append("):
            cure = False
            continue
        found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_logic_in_packages(name: str) -> None:
    assert logic(MODULES[name].read_text(encoding="utf-8"), cure=name == "mtvit_ops") == []


def test_the_logic_rule_bites() -> None:
    cure = "if not there:\n    __path__.append(here)"
    assert logic(f'"""Doc."""\nfrom .a import b\n__all__ = ["b"]\n{cure}', cure=True) == []
    assert logic(cure, cure=False) == [cure]
    assert len(logic(f"{cure}\n{cure}\nx = 1\ndef f(): ...", cure=True)) == 3


def test_import_is_lean() -> None:
    code = (
        "import sys, mtvit_ops, mtvit_ops.ops, mtvit_ops.testing, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'timm', 'transformers', 'torchvision', 'pytest', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert found.returncode == 0, found.stderr


def test_kernels_hide_no_other_package() -> None:
    spec = importlib.util.find_spec("kernels")
    # without origin: tests/kernels as a namespace, which gives way to any real package
    assert spec is None or spec.origin is None or Path(spec.origin).parent != ROOT / "kernels"
    assert importlib.util.find_spec("mtvit_ops.kernels") is not None


def test_public_ops_are_sorted() -> None:
    assert list(ops.__all__) == sorted(ops.__all__)


@pytest.mark.parametrize("name", sorted(name for name in ops.__all__ if name.islower()))
def test_public_ops_say_what_they_take(name: str) -> None:
    function = getattr(ops, name)
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), parameter
        assert parameter.annotation is not parameter.empty, parameter
    assert signature.return_annotation is not signature.empty
    # a constructor, and twins that point to their others
    twins = "ragged_linear_residual_", "scatter_residual_", "scatter_residual_layer_norm_"
    if name not in ("initial_halting_state", *twins):
        places = [function.__doc__.find(f"{word}:") for word in ("Args", "Returns", "Raises")]
        assert places[0] > 0
        assert places == sorted(places)
        assert "Equivalent PyTorch" in function.__doc__
