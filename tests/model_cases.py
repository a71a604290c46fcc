"""Tiny models whose decisions differ from image to image, shared by the model-level tests."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtvit_ops
from mtvit_ops import RaggedTokens
from mtvit_ops._backend import use_backend
from mtvit_ops.methods import AViT, MTViT
from mtvit_ops.nn import Trace, VisionTransformer
from mtvit_ops.testing import ULPS

# 16 patches of 16 pixels and the class token
TINY = {"img_size": 64, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 10}
NUM_TOKENS = 17

# name: first part of the model's name, overrides; the gates let tokens halt in every block
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "avit": ("avit", {"gate_scale": 1.0, "gate_center": 1.0}),
    "avit-stop_with_class": ("avit", {"gate_scale": 1.0, "gate_center": 1.0, "stop_with_class": True}),
    "evovit-stage": ("evovit", {"keep_ratios": 0.7, "tradeoffs": 0.9}),
    "evovit-layer": ("evovit", {"keep_ratios": 0.7, "tradeoffs": 0.9, "mode": "layer"}),
    "evovit-prune_cls": ("evovit", {"prune_cls": True}),
    "evovit-class-pool": ("evovit", {"pool": "class", "keep_ratios": 0.3}),
    "lifevit-budget": ("lifevit", {"base_block": 3}),
    "lifevit-threshold": ("lifevit", {"base_block": 3, "mode": "threshold"}),
    "mtvit": ("mtvit", {"predictor_size": 32}),
}
DENSE = {"vit": ("vit", {}), "vit-mean": ("vit", {"pool": "mean"})}
ALL = DENSE | METHODS

# the same methods set to drop nothing, and the dense readout they then equal
DROPS_NOTHING: dict[str, tuple[str, dict[str, Any], str]] = {
    "avit": ("avit", {"gate_center": 1e4}, "class"),
    "avit-stop_with_class": ("avit", {"gate_center": 1e4, "stop_with_class": True}, "class"),
    "evovit-stage": ("evovit", {"keep_ratios": 1.0}, "mean"),
    "evovit-layer": ("evovit", {"keep_ratios": 1.0, "mode": "layer"}, "mean"),
    "evovit-prune_cls": ("evovit", {"keep_ratios": 1.0, "prune_cls": True}, "mean"),
    "evovit-class-pool": ("evovit", {"keep_ratios": 1.0, "pool": "class"}, "class"),
    "lifevit-budget": ("lifevit", {"keep_ratio": 1.0, "base_block": 3}, "class"),
    "lifevit-budgets": ("lifevit", {"budgets": (NUM_TOKENS,) * 3, "base_block": 3}, "class"),
    "mtvit-last-tail": ("mtvit", {"force_tail": 2}, "class"),
    "mtvit-dear": ("mtvit", {"predictor_size": 32, "cost_weight": -1e6}, "class"),
}


def build(method: str, *, seed: int = 0, device: str = "cpu", **overrides: Any) -> VisionTransformer:
    """A tiny model in evaluation mode with lively weights; the caller's own."""
    return copy.deepcopy(_built(method, seed, tuple(overrides.items()))).to(device)


@cache  # drawing weights and resizing kernels takes longer than most tests
def _built(method: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> VisionTransformer:
    torch.manual_seed(seed)
    return lively(mtvit_ops.create_model(f"{method}_tiny_patch16_224", **(TINY | dict(overrides)))).eval()


def build_case(name: str, **more: Any) -> VisionTransformer:
    """A row of ``ALL``."""
    method, overrides = ALL[name]
    return build(method, **(overrides | more))


@torch.no_grad()
def lively(model: VisionTransformer) -> VisionTransformer:
    """Weights so large that images and tokens differ, as after training; near ties are then rare."""
    for name, value in model.named_parameters():
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name or "features" in name:
            continue
        if name.endswith("bias"):
            nn.init.normal_(value, std=0.1)
        elif name in ("cls_token", "pos_embed") or "pos_embeds" in name:
            nn.init.normal_(value)
        elif "predictor.head" in name:
            nn.init.normal_(value, std=3.0)
        else:
            nn.init.normal_(value, std=value[0].numel() ** -0.5)
    if isinstance(model.method, AViT):
        model.cls_token[0, 0, 0] = -4.0  # or every class token would halt in the first blocks
    if isinstance(model.method, MTViT):
        predictor, side = model.method.predictor.eval(), model.config.img_size
        # standardised on images like those of the tests, so that every tail is chosen by some
        with use_backend("reference"):  # the same weights whichever backend serves the test that builds first
            spread, mean = torch.std_mean(predictor(make_images(32, side, seed=2)), dim=0)
        predictor.head.weight /= spread[:, None]
        predictor.head.bias.copy_((predictor.head.bias - mean) / spread)
    return model


def make_images(batch: int, side: int = 64, *, seed: int = 1, device: str = "cpu") -> Tensor:
    """Noise of another brightness, contrast and grain in every image, (B, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, side, side, generator=generator)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator).repeat_interleave(side // 4, 2)
    coarse = coarse.repeat_interleave(side // 4, 3)
    shift = torch.randn(batch, 3, 1, 1, generator=generator)
    gain = 0.3 + 2 * torch.rand(batch, 1, 1, 1, generator=generator)
    return ((noise + coarse) * gain + shift).to(device)


def in_float64(model: VisionTransformer) -> VisionTransformer:
    """A copy that computes in float64: the truth that tolerances are earned against."""
    return copy.deepcopy(model).double()


def assert_rounding(got: Tensor, want: Tensor, depth: int = 6) -> None:
    """Two orders of the same float operations: each half of each block may round as differently as one op."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if want.numel():
        allowed = 2 * depth * ULPS[want.dtype] * torch.finfo(want.dtype).eps * want.abs().max().item()
        found = (got - want).abs().max().item()
        assert found <= allowed, f"differs by {found:.3e}, rounding explains {allowed:.3e}"


def permute_patches(model: VisionTransformer, images: Tensor, order: Tensor) -> tuple[VisionTransformer, Tensor]:
    """The same problem with patch i where patch ``order[i]`` was: in the images, and in the table of positions."""
    patch, grid = model.config.patch_size, model.config.grid_size
    pieces = images.unflatten(2, (grid, patch)).unflatten(4, (grid, patch)).transpose(3, 4)  # (B, C, g, g, p, p)
    pieces = pieces.flatten(2, 3)[:, :, order].unflatten(2, (grid, grid))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    return twin, pieces.transpose(3, 4).flatten(4, 5).flatten(2, 3)


class Run(NamedTuple):
    """One forward pass with what stood after each block."""

    logits: Tensor
    trace: Trace
    outputs: list[RaggedTokens]  # tokens of each block, before the method acts on them
    states: list[Any]  # of the method, after each block


def run_blocks(model: VisionTransformer, images: Tensor) -> Run:
    """Run the model and keep every block's output; gradients stay on, so that nothing is written in place."""
    method, outputs, states = model.method, [], []
    original = method.after_block

    def after_block(index: int, tokens: RaggedTokens, state: Any) -> tuple[RaggedTokens, Any]:
        outputs.append(tokens)
        result = original(index, tokens, state)
        states.append(result[1])
        return result

    method.after_block = after_block  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            logits, trace = model(images, return_trace=True)
    finally:
        del method.after_block
    return Run(logits.detach(), trace, [tokens._replace(x=tokens.x.detach()) for tokens in outputs], states)


class OpCounter(TorchDispatchMode):
    """How often each operator ran, by qualified name without overload, and the shapes of their first tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.calls[name] += 1
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is not None:
            self.shapes.setdefault(name, []).append(tuple(first.shape))
        return func(*args, **(kwargs or {}))
