"""What launches take from PyTorch's settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from mtvit_ops.kernels._launch import dot_precision

MATMUL = torch.backends.cuda.matmul
SWITCHES: dict[str, tuple[Callable[[], None], str]] = {
    "new-on": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), "tf32"),
    "new-off": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), "ieee"),
    "new-for-all": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
    "old-on": (lambda: setattr(MATMUL, "allow_tf32", True), "tf32"),
    "old-off": (lambda: setattr(MATMUL, "allow_tf32", False), "ieee"),
    "oldest": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "none": (lambda: None, "ieee"),
}


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize(("switch", "wanted"), SWITCHES.values(), ids=SWITCHES)
def test_float32_products_follow_every_switch(switch: Callable[[], None], wanted: str) -> None:
    """PyTorch raises where the old switch is read after the new one was set."""
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    try:
        switch()
        assert dot_precision() == wanted
    finally:
        torch.set_float32_matmul_precision("highest")  # both generations agree again
        torch.backends.fp32_precision, MATMUL.fp32_precision = before
