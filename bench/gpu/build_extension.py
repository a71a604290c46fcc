"""Stage: compile the native extension in place, and say what serves on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from stage import ROOT, Stage

if __name__ == "__main__":
    stage = Stage(__doc__)
    if not stage.smoke:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=ROOT,
            env={**os.environ, "MTVIT_OPS_BUILD_EXT": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        tail = (done.stdout + done.stderr).strip().splitlines()[-5:]
        stage.emit(table="build", what="extension", ok=done.returncode == 0, note=" | ".join(tail)[:500])
    import mtvit_ops

    for name, found in mtvit_ops.available_backends().items():
        stage.emit(table="build", what=f"backend {name}", ok=found.available, note=found.reason)
