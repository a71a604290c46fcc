"""Recorded runs of the authors' own code, beside the repository; the folder's README gives the tolerances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
LOGITS, HALTING_SCORES, GRADIENTS, LIFE = 1e-4, 1e-6, 1e-4, 5e-5  # Life's is relative to the largest reference


class Case(NamedTuple):
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def numbered(self, name: str) -> dict[int, Tensor]:
        """``name/<i>`` by i."""
        return {int(key.rsplit("/", 1)[1]): value for key, value in self.tensors.items() if key.startswith(f"{name}/")}


def cases(family: str) -> list[Any]:
    """Every recorded case of a family, or one that will say that there is none."""
    return sorted(path.stem for path in FOLDER.glob(f"{family}_*.npz")) or ["none-recorded"]


def load(folder: Path, name: str) -> Case:
    if not (folder / f"{name}.npz").is_file():
        pytest.skip(f"no recorded run of this family in {folder}")
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    config = json.loads((folder / f"{name}.json").read_text())
    return Case(
        {key[2:]: value for key, value in arrays.items() if key.startswith("w/")},
        {key[2:]: value for key, value in arrays.items() if key.startswith("t/")},
        config.get("config", config),
    )


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}


def assert_close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.cpu().to(want.dtype), want, rtol=0, atol=atol)
