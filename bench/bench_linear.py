"""Linear layers of DeiT-S in inference: PyTorch's own, oneDNN's with packed weights, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import DTYPES

from mtvit_ops import _extension
from mtvit_ops._cpu_linear import onednn_dtypes

# name: in_features and out_features over the width, and whether a GELU follows
LAYERS = {"qkv": (1, 3, False), "fc1": (1, 4, True), "fc2": (4, 1, False)}
TOKENS = (5, 50, 99, 197, 8 * 197)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear(dtype: str, layer: str, tokens: int, compare: Callable[..., Any], smoke: bool) -> None:
    if not _extension.has_extension():
        pytest.skip(str(_extension.extension_error()))
    wide, (inputs, outputs, gelu) = 32 if smoke else 384, LAYERS[layer]
    a = torch.randn(tokens, inputs * wide).to(DTYPES[dtype])
    weight = (torch.randn(outputs * wide, inputs * wide) / (inputs * wide) ** 0.5).to(DTYPES[dtype])
    bias = torch.randn(outputs * wide).to(DTYPES[dtype])
    native = torch.ops.mtvit_ops_cpp
    panels = native.pack_panels(weight)

    def plain() -> torch.Tensor:
        y = F.linear(a, weight, bias)
        return F.gelu(y) if gelu else y

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "F.linear": plain,
        "ours": lambda: native.linear(a, weight, bias, gelu),
        "ours, packed": lambda: native.linear(a, panels, bias, gelu),
    }
    if a.dtype in onednn_dtypes():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        kind = ("gelu", [], "none") if gelu else ("none", [], "")
        runs["oneDNN, packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, bias, *kind)
    with torch.inference_mode():
        exact = F.linear(a.double(), weight.double(), bias.double())
        exact = F.gelu(exact) if gelu else exact
        off = {title: (run().double() - exact).abs().max() for title, run in runs.items()}
        for title, most in off.items():
            assert most <= 2 * off["F.linear"] + 4 * torch.finfo(a.dtype).eps * exact.abs().max(), title
    facts = {"table": "linear", "op": layer, "tokens": tokens, "batch": 1, "dtype": dtype}
    compare(runs, "ours, packed", short=tokens < 1000, **facts)
