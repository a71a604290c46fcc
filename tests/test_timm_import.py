"""timm can be imported, however often its way was made clear before."""

from __future__ import annotations

import subprocess
import sys


def test_twice_allowed_is_allowed() -> None:
    code = """
from mtvit_ops._timm import allow_other_torchvision, import_timm
allow_other_torchvision()
allow_other_torchvision()
print(import_timm().__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "timm", done.stderr
