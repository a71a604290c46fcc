"""What a wheel and a source archive hold, and that an installation survives without a compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")

LEFT_OVERS = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree, so that no build leaves anything in it."""
    copy = tmp_path_factory.mktemp("source") / "mtvit_ops"
    shutil.copytree(ROOT, copy, ignore=LEFT_OVERS)
    return copy


def build_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-deps", "--no-build-isolation", "-w", str(out)]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run = build_wheel(source, out, MTVIT_OPS_BUILD_EXT="0")
    assert run.returncode == 0, run.stdout + run.stderr
    return only(out, "*.whl")


def test_wheel_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mtvit_ops"}
    assert "mtvit_ops/kernels/__init__.py" in names
    assert "mtvit_ops/py.typed" in names or not (ROOT / "mtvit_ops" / "py.typed").exists()
    assert not [name for name in names if name.endswith((".cpp", ".h", ".so"))]
    for folder, prefix in (("mtvit_ops", "mtvit_ops"), ("kernels", "mtvit_ops/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{file.relative_to(ROOT / folder).as_posix()}" in names


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mtvit_ops" / "_version.py").read_text())[1]
    assert f"\nVersion: {version}\n" in text
    assert "\nName: mtvit_ops\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "mtvit-ops = mtvit_ops.cli:main" in archive.read(entry_points).decode()


def test_source_archive(source, tmp_path):
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with tarfile.open(only(tmp_path, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {file.relative_to(ROOT).as_posix() for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert native <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/")) or name.endswith(".so")]


NO_COMPILER = {"CXX": str(Path("no", "such", "compiler"))}


def test_no_compiler_is_a_warning(source, tmp_path):
    run = build_wheel(source, tmp_path, **NO_COMPILER, MTVIT_OPS_BUILD_EXT="auto")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "warning: mtvit_ops is installed without its native extension: `cmake` failed" in run.stdout + run.stderr
    names = zipfile.ZipFile(only(tmp_path, "*.whl")).namelist()
    assert "mtvit_ops/_extension.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_no_compiler_is_an_error_where_asked(source, tmp_path):
    assert build_wheel(source, tmp_path, **NO_COMPILER, MTVIT_OPS_BUILD_EXT="1").returncode != 0


def test_unreadable_switch(source, tmp_path):
    run = build_wheel(source, tmp_path, MTVIT_OPS_BUILD_EXT="maybe")
    assert run.returncode != 0
    assert "MTVIT_OPS_BUILD_EXT must be auto, 0 or 1, got 'maybe'" in run.stdout + run.stderr


def test_absent_extension_says_why(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = "from mtvit_ops import _extension as e; print(e.has_extension()); print(e.build_info()['reason'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[0] == "False"
    assert "was not built" in run.stdout


@pytest.mark.build
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_native_wheel(source, tmp_path):
    run = build_wheel(source, tmp_path, MTVIT_OPS_BUILD_EXT="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "mtvit_ops: building CPU operators (portable" in run.stdout + run.stderr
    assert "[-W" not in run.stdout + run.stderr  # how GCC and Clang end a warning
    with zipfile.ZipFile(only(tmp_path, "*.whl")) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "mtvit_ops"
    assert (installed / "_C.so").is_file()
    binary = (installed / "_C.so").read_bytes()
    assert str(source).encode() not in binary  # nothing of the machine that built it
    assert sys.prefix.encode() not in binary
    script = (
        "from mtvit_ops import _extension as e; i = e.build_info(); print(e.extension_error(), e.__file__, i['isa'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"None {installed}")


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory) -> str:
    """A CUDA compiler that also links: NVIDIA's Python packages lack a folder for that, which `make cuda` mends."""
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = tool.find_nvcc()
    if found is None:
        pytest.skip("no nvcc here: `make cuda` installs one")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "main.cu").write_text("int main() {}")
    run = subprocess.run([found, str(folder / "main.cu"), "-o", str(folder / "main")], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"{found} does not link: {run.stdout}{run.stderr}")
    return found


@pytest.mark.build
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")
def test_cuda_wheel(source, nvcc, tmp_path):
    """Built with CUDA, under whatever PyTorch this is: loads, serves the CPU, and says what the cuda backend lacks."""
    run = build_wheel(
        source, tmp_path, MTVIT_OPS_BUILD_EXT="1", MTVIT_OPS_WITH_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0", CUDACXX=nvcc
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with zipfile.ZipFile(only(tmp_path, "*.whl")) as archive:
        archive.extractall(tmp_path / "installed")
    binary = (tmp_path / "installed" / "mtvit_ops" / "_C.so").read_bytes()
    assert str(source).encode() not in binary
    script = (
        "import torch, mtvit_ops as m\n"
        "i = m.build_info()\n"
        "print(i['cuda'], i['cuda_archs'], hasattr(torch.ops.mtvit_ops_cuda, 'token_select'))\n"
        "print(m.ops.token_select(torch.ones(3), None, torch.tensor([0, 3]).int(), keep=2).rows.tolist())\n"
        "found = m.available_backends()['cuda']\n"
        "print(found.available == (torch.version.cuda is not None), found.reason)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert lines[:2] == ["True ['90-real'] True", "[0, 1]"]
    assert lines[2] in ("True this PyTorch is built without CUDA", "True native kernels for CUDA tensors")
