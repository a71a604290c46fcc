"""Whole models: timm's dense ViT, ours, and ours with tokens removed, in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import (
    BATCHES,
    DTYPES,
    MAC_RATIO,
    SIZES,
    FixedCounts,
    FixedCountsConfig,
    counts_between,
)
from torch import Tensor

from mtvit_ops import VisionTransformer, calibrate, create_method, create_model, pack_weights
from mtvit_ops.equality import check_equality, rounding_tolerance
from mtvit_ops.flops import count_batch_macs
from mtvit_ops.nn import masked_twin

METHODS = {"A-ViT": "avit", "Evo-ViT": "evovit", "Life": "lifevit", "MT-ViT": "mtvit"}


def adaptive_models(dense: VisionTransformer, images: Tensor) -> dict[str, VisionTransformer]:
    """The dense model's weights, run with tokens removed."""
    tokens, batch = 1 + dense.config.num_patches, len(images)
    share = tokens / 197
    # half of the tokens in every image; and a number of its own for each
    equal = [round(99 * share)] * batch
    ragged = counts_between(batch, round(60 * share), round(140 * share))
    models = {
        "equal counts": dense.with_method(FixedCounts(FixedCountsConfig(tuple(equal)))),
        "counts per image": dense.with_method(FixedCounts(FixedCountsConfig(tuple(ragged)))),
    }
    for title, name in METHODS.items():
        options: dict[str, Any] = {}
        if name == "mtvit":
            grid = dense.config.grid_size
            options["grids"] = (grid // 2, round(grid * 10 / 14), grid)
        models[title] = dense.with_method(create_method(name, **options))
        if name == "mtvit":
            # an untrained predictor sends every image to one tail
            torch.nn.init.normal_(models[title].method.predictor.head.weight)
        calibrate(models[title], images, MAC_RATIO)
    return {title: model.eval() for title, model in models.items()}


@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["small", "tiny"])
def bench_models(size: str, dtype: str, batch: int, compare: Callable[..., Any], smoke: bool, timm: Any) -> None:
    sizes = SIZES["smoke" if smoke else size]
    dense = create_model("vit_small_patch16_224", **sizes).eval()
    images = torch.randn(batch, 3, dense.config.img_size, dense.config.img_size)
    baseline = timm.create_model("vit_small_patch16_224", **sizes).eval()
    baseline.load_state_dict(dense.state_dict(), strict=True)
    models = {"dense": dense, **adaptive_models(dense, images)}
    inputs = images.to(DTYPES[dtype])
    for model in (baseline, *models.values()):
        model.to(DTYPES[dtype])
    for model in models.values():
        pack_weights(model)
    # what is timed is what is checked: removal against masking, the batch against its images, dense against timm
    tolerance = rounding_tolerance(dense, inputs)
    pairs = {"dense": baseline}
    for title, model in models.items():
        if isinstance(model.method, FixedCounts):  # its choice depends on the place in the batch
            pairs[title] = masked_twin(model)
        else:
            check_equality(title, model, inputs, tolerance)
    with torch.inference_mode():
        for title, other in pairs.items():
            ours, theirs = models[title](inputs).double(), other(inputs).double()
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), title
    macs = {title: count_batch_macs(model, inputs) for title, model in models.items()}
    runs = {title: (lambda model=model: model(inputs)) for title, model in models.items()}
    compare(
        {"timm": lambda: baseline(inputs), **runs},
        "dense",
        table="models",
        size=size,
        dtype=dtype,
        batch=batch,
        mac_ratio={title: value / macs["dense"] for title, value in macs.items()},
        gigamacs={title: value / 1e9 for title, value in macs.items()},
    )
