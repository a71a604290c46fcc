"""Weights of an MT-ViT with some of its tails only, to begin another training with.

Its encoder and the tails named stay as they are; the predictor, which chose among all of them, is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from safetensors.torch import save_file

from mtvit_ops.methods import MTViT
from mtvit_ops.weights import load_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="file of an MT-ViT, as mtvit_ops.weights writes them")
    parser.add_argument("--grids", type=int, nargs="+", required=True, help="tails to keep; the dearest is always kept")
    parser.add_argument("--out", type=Path, required=True, help="state dict for mtvit-ops train --from")
    options = parser.parse_args()
    model, _ = load_model(options.weights)
    if not isinstance(model.method, MTViT):
        parser.error(f"weights must be an MT-ViT's, got a {type(model.method).__name__} model's")
    grids = model.method.config.grids
    kept = [grid for grid in grids[:-1] if grid in options.grids]
    strangers = sorted({*options.grids} - {*grids})
    if strangers or not kept:
        parser.error(f"--grids must name cheaper tails among {grids[:-1]}, got {options.grids}")
    state = {}
    for name, value in model.state_dict().items():
        part = re.fullmatch(r"method\.(projections|pos_embeds)\.(\d+)(.*)", name)
        if part is None:
            if not name.startswith("method.predictor."):
                state[name] = value.contiguous()
        elif grids[int(part[2])] in kept:
            state[f"method.{part[1]}.{kept.index(grids[int(part[2])])}{part[3]}"] = value.contiguous()
    save_file(state, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
