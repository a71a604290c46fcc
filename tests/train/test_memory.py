"""What training keeps for the gradient: per live token no more than timm's dense ViT, and nothing for removed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import create_model
from mtvit_ops._timm import import_timm
from mtvit_ops.train import compute_loss

SIZES: dict[str, Any] = {"img_size": 56, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
BATCH, TOKENS = 3, 50


def kept_bytes(model: torch.nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of everything that autograd keeps, but the weights, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    held = []  # or a storage's address might come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def timm_bytes(depth: int, images: Tensor, target: Tensor) -> int:
    timm = import_timm()
    model = timm.models.vision_transformer.VisionTransformer(depth=depth, **SIZES).train()
    return kept_bytes(model, lambda: F.cross_entropy(model(images).float(), target))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "options", "loss"),
    [
        ("vit", {}, {}),
        ("evovit", {"keep_ratios": 0.5}, {"task": 1.0, "class_task": 0.0}),
        ("lifevit", {"base_block": 2, "keep_ratio": 0.6}, {"stage": 2}),
        ("mtvit", {"force_tail": 0, "grids": (4, 7)}, {"mode": "tails"}),
        ("mtvit", {"grids": (4, 7)}, {"mode": "sparse"}),
    ],
)
def test_a_block_keeps_no_more_for_a_live_token_than_timm(
    method: str, options: dict[str, Any], loss: dict[str, Any], autocast: bool
) -> None:
    images, target = torch.rand(BATCH, 3, 56, 56), torch.randint(0, 10, (BATCH,))

    def run(depth: int) -> tuple[int, int]:
        """Bytes kept, and tokens that live in the last block."""
        model = create_model(f"{method}_tiny_patch16_224", depth=depth, **SIZES, **options).train()
        with torch.no_grad():
            _, trace = model.eval()(images, return_trace=True)
        live = int(trace.tokens_per_block[-1].sum())
        if loss.get("mode") != "sparse":  # there a choice would be drawn, another for each depth
            model.train()
        if loss.get("mode") == "tails":
            live = BATCH * (1 + 16 + 1 + 49)
        return kept_bytes(model, lambda: compute_loss(model, images, target, **loss)[0]), live

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # a block more: what does not grow with the depth drops out
        (shallow, _), (deep, live) = run(6), run(7)
        dense = timm_bytes(7, images, target) - timm_bytes(6, images, target)
    if autocast:  # copies of a block's weights in bfloat16 are kept once, whatever lives
        weights = 2 * 12 * 64 * 64
        deep, dense = deep - weights, dense - weights
    if loss.get("mode") != "tails" and method != "vit":
        assert live < 0.7 * BATCH * TOKENS
    # ours keeps the row list of each block, as int32 and int64, and its offsets
    lists = 12 * live + 8 * (BATCH + 1)
    assert (deep - shallow - lists) / live <= dense / (BATCH * TOKENS)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_halted_tokens_keep_their_gate_alone(autocast: bool) -> None:
    """A-ViT without its prior: beside the live tokens, a few numbers of each token and layer, and what is read out."""
    torch.manual_seed(0)
    images, target = torch.rand(BATCH, 3, 56, 56), torch.randint(0, 10, (BATCH,))
    model = create_model("avit_tiny_patch16_224", depth=7, **SIZES, gate_scale=1.0, gate_center=0.7)
    torch.nn.init.normal_(model.pos_embed, std=2.0)  # tokens that halt in different layers
    with torch.no_grad():
        _, trace = model.eval()(images, return_trace=True)
    model.train()
    live = trace.tokens_per_block.sum(dim=1).tolist()
    assert live[0] == BATCH * TOKENS > live[2] > live[-1] > 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_bytes(model, lambda: compute_loss(model, images, target, distribution=0.0)[0])
        whole = timm_bytes(7, images, target)
        dense = whole - timm_bytes(6, images, target)
    weights = 2 * 12 * 64 * 64 if autocast else 0
    # the gate's channel, two sums, and the readout; lists as above
    state = 7 * (12 * BATCH * TOKENS + 8 * BATCH * 64)
    blocks = sum((dense - weights) / (BATCH * TOKENS) * n + 12 * n for n in live)
    assert kept <= whole - 7 * dense + 7 * weights + state + blocks
