"""Builds the native extension with CMake and Ninja; the package works without it.

Environment:
  MTVIT_OPS_BUILD_EXT   auto (default): build, but install pure Python if that fails; 1: fail; 0: do not build
  MTVIT_OPS_DEBUG       1: assertions in the kernels, debug symbols, little optimisation; 0 (default)
  MTVIT_OPS_WITH_CUDA   auto (default): if PyTorch has CUDA and nvcc is there; 1: also under a CPU-only PyTorch; 0: no
  TORCH_CUDA_ARCH_LIST  such as "8.0;9.0a;10.0+PTX"; default: the GPUs of this machine, else a list
  CUDA_HOME, CUDACXX, MAX_JOBS, CMAKE_ARGS: as everywhere
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = {"auto": "auto", "": "auto", "0": "0", "off": "0", "false": "0", "1": "1", "on": "1", "true": "1"}

FIND_TORCH = """
import importlib.util, json, pathlib
spec = importlib.util.find_spec("torch")
if spec is None:
    raise SystemExit(3)
root = pathlib.Path(spec.origin).parent
v = {}
exec((root / "version.py").read_text(), v)
print(json.dumps({"root": str(root), "version": str(v["__version__"]), "cuda": v.get("cuda")}))
"""


def mode(variable: str, default: str = "auto") -> str:
    """The value of an auto/0/1 environment variable."""
    value = os.environ.get(variable, default).lower()
    if value not in MODES:
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return MODES[value]


def find_torch() -> dict:
    """Where PyTorch lies, without importing it.

    An isolated build runs the environment's own interpreter with a search path of its own; -I ignores that
    path, so the environment's PyTorch is found there too.
    """
    for flags in ([], ["-I"]):
        run = subprocess.run([sys.executable, *flags, "-c", FIND_TORCH], capture_output=True, text=True)
        if run.returncode == 0:
            return json.loads(run.stdout)
    raise RuntimeError("PyTorch was not found in this environment")


def cmake_archs(torch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX") as CMAKE_CUDA_ARCHITECTURES."""
    archs = []
    for item in re.split(r"[;, ]+", torch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: cannot read {item!r}")
        archs.append(match[1] + match[2] + match[3] + ("" if match[4] else "-real"))
    return ";".join(archs)


def local_archs() -> str | None:
    """Compute capabilities of the GPUs of this machine, as CMAKE_CUDA_ARCHITECTURES."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    caps = sorted(set(re.findall(r"^(\d+)\.(\d)\s*$", run.stdout, re.M))) if run.returncode == 0 else []
    return ";".join(major + minor + "-real" for major, minor in caps) or None


class CMakeBuild(build_ext):
    """All extensions come from one CMake run."""

    def run(self) -> None:
        build, cuda = mode("MTVIT_OPS_BUILD_EXT"), mode("MTVIT_OPS_WITH_CUDA")
        if build == "0":
            self.extensions = []
            print("mtvit_ops: native extension not built (MTVIT_OPS_BUILD_EXT=0)")
            return
        try:
            self.build_with_cmake(cuda)
        except (subprocess.CalledProcessError, OSError, RuntimeError, ImportError) as error:
            if build == "1":
                raise
            self.extensions = []
            why = f"`{Path(error.cmd[0]).name}` failed" if isinstance(error, subprocess.CalledProcessError) else error
            print(f"warning: mtvit_ops is installed without its native extension: {why}", file=sys.stderr)

    def build_with_cmake(self, cuda: str) -> None:
        torch = find_torch()
        import pybind11

        tools = [shutil.which(tool) for tool in ("cmake", "ninja")]
        if None in tools:
            raise RuntimeError("cmake and ninja are needed to build it")
        cmake, ninja = tools
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        temp = Path(self.build_temp).resolve() / "cmake"
        temp.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ)
        if env.get("CUDA_HOME") and "CUDACXX" not in env:
            env["CUDACXX"] = str(Path(env["CUDA_HOME"]) / "bin" / "nvcc")
        args = [
            *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug or mode('MTVIT_OPS_DEBUG', '0') == '1' else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DMTVIT_OPS_TORCH={torch['root']}",
            f"-DMTVIT_OPS_TORCH_VERSION={torch['version']}",
            f"-DWITH_CUDA={'0' if cuda == 'auto' and torch['cuda'] is None else cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        listed = env.get("TORCH_CUDA_ARCH_LIST")
        archs = cmake_archs(listed) if listed else local_archs()
        if archs:
            args.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        args += shlex.split(env.get("CMAKE_ARGS", ""))
        jobs = env.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(temp), *args], check=True, env=env)
        subprocess.run([cmake, "--build", str(temp), "--parallel", jobs], check=True, env=env)
        subprocess.run([cmake, "--install", str(temp)], check=True, env=env)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("._C"):  # holds no Python symbol, so one name serves every Python
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


setup(
    packages=[*find_packages(include=["mtvit_ops", "mtvit_ops.*"]), "mtvit_ops.kernels"],
    package_dir={"mtvit_ops.kernels": "kernels"},
    package_data={"mtvit_ops": ["py.typed"]},
    ext_modules=[Extension("mtvit_ops._C", []), Extension("mtvit_ops._build", [])],
    cmdclass={"build_ext": CMakeBuild},
)
