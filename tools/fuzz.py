"""Fuzz the native operators under AddressSanitizer and UndefinedBehaviorSanitizer: ``make fuzz``.

Builds the extension with sanitizers into build/sanitized, then calls every operator with drawn shapes, strides, dtypes,
offsets and row lists, good and bad. Each call must either raise in words or agree with the reference; a report of a
sanitizer ends the run. Exit codes: 0 nothing found, 1 a finding (its seed is printed; --seed repeats it), 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
LAST = ROOT / "build" / "fuzz-seed"
INSIDE = "MTVIT_OPS_FUZZ_INSIDE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long to draw cases (default %(default)s)")
    parser.add_argument("--seed", type=int, help="run this one case and print it")
    parser.add_argument("--only", metavar="OPERATOR", help="draw cases of this native operator alone")
    parser.add_argument("--plain", action="store_true", help="use the installed extension, without sanitizers")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, help="run pytest with these arguments instead")
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error(f"--seconds must be > 0, got {options.seconds:g}")
    if options.pytest is not None:
        # -P: the checkout, with its own extension, must not come before the sanitized build
        command = [sys.executable, "-P", "-m", "pytest", *options.pytest]
        return subprocess.run(command, env=sanitized(), check=False).returncode
    if os.environ.get(INSIDE) != "1":
        environment = {**(os.environ if options.plain else sanitized()), INSIDE: "1"}
        code = subprocess.run([sys.executable, "-P", *sys.argv], env=environment, check=False).returncode
        if code != 0 and options.seed is None and LAST.is_file():
            # a sanitizer or a crash ends the process at once: the file names the case
            only = f" --only {options.only}" if options.only else ""
            print(f"finding: repeat it with --seed {LAST.read_text()}{only}", file=sys.stderr)
        return 1 if code else 0
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzz_cases

    if options.only not in (None, *fuzz_cases.CASES):
        parser.error(f"--only must be one of {', '.join(fuzz_cases.CASES)}, got {options.only}")
    if options.seed is not None:
        print(fuzz_cases.run(options.seed, options.only, say=print))
        return 0
    first = int.from_bytes(os.urandom(4), "big") << 24
    LAST.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    end, number = time.monotonic() + options.seconds, 0
    with LAST.open("w") as last:
        while time.monotonic() < end:
            last.seek(0)
            last.write(str(first + number))
            last.flush()
            outcome = fuzz_cases.run(first + number, options.only)
            counts[outcome] = counts.get(outcome, 0) + 1
            number += 1
    print(f"{number} cases, nothing found: {json.dumps(dict(sorted(counts.items())))}")
    return 0


def sanitized() -> dict[str, str]:
    """The environment of a process that loads the sanitized build, after making it."""
    package = BUILD / "mtvit_ops"
    cmake = BUILD / "cmake"
    cmake.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        ROOT / "mtvit_ops", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "kernels", package / "kernels", dirs_exist_ok=True)
    import pybind11
    import torch

    tools = {
        name: shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        for name in ("cmake", "ninja")
    }
    if None in tools.values():
        raise SystemExit("cmake and ninja are needed")
    subprocess.run(
        [
            *(tools["cmake"], "-S", ROOT, "-B", cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"),
            *("-DCMAKE_BUILD_TYPE=Debug", "-DMTVIT_OPS_SANITIZE=ON", "-DWITH_CUDA=0"),
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DMTVIT_OPS_TORCH={Path(torch.__file__).parent}",
            f"-DMTVIT_OPS_TORCH_VERSION={torch.__version__}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run([tools["cmake"], "--build", cmake], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tools["cmake"], "--install", cmake], check=True, stdout=subprocess.DEVNULL)
    libraries = [
        subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "PYTHONPATH": str(BUILD),
        "LD_PRELOAD": " ".join(run.stdout.strip() for run in libraries),
        # Python and PyTorch keep what they allocate until the end
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


if __name__ == "__main__":
    raise SystemExit(main())
