"""Drop-path written down a second time, as hooks on plain blocks, with draws that any device and dtype can share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtvit_ops.nn import VisionTransformer

# name: method, overrides, weights of its loss; what trains by a road of its own
TRAINED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit", {}, {}),
    "avit-masked": ("avit", {"gate_scale": 1.0, "gate_center": 1.0}, {"ponder": 0.1, "distribution": 0.5}),
    "avit-removed": ("avit", {"gate_scale": 1.0, "gate_center": 1.0}, {"ponder": 0.1, "distribution": 0.0}),
    "evovit-stage": ("evovit", {"keep_ratios": 0.7, "class_head": True}, {}),
    "evovit-layer": ("evovit", {"keep_ratios": 0.7, "class_head": True, "mode": "layer"}, {}),
    "lifevit-1": ("lifevit", {"base_block": 3}, {"stage": 1}),
    "lifevit-2": ("lifevit", {"base_block": 3}, {"stage": 2}),
    "lifevit-2-threshold": ("lifevit", {"base_block": 3, "mode": "threshold"}, {"stage": 2}),
    "mtvit-tails": ("mtvit", {"predictor_size": 32}, {"mode": "tails"}),
    "mtvit-dense": ("mtvit", {"predictor_size": 32}, {"mode": "dense"}),
    "mtvit-sparse": ("mtvit", {"predictor_size": 32}, {"mode": "sparse"}),
}


@contextmanager
def scripted_draws(seed: int) -> Iterator[None]:
    """Every ``bernoulli_`` takes the next numbers of one sequence, whatever its dtype and device."""
    generator = torch.Generator().manual_seed(seed)

    def bernoulli_(self: Tensor, p: float) -> Tensor:
        return self.copy_(torch.rand(self.shape, generator=generator, dtype=torch.float64) < p)

    with mock.patch.object(torch.Tensor, "bernoulli_", bernoulli_):
        yield


def drop_by_hooks(model: VisionTransformer, rate: float) -> VisionTransformer:
    """The same model, what its attention and MLP give multiplied by draws of their own; in place."""
    for index, block in enumerate(model.blocks):
        if index:
            _Hooks(rate * index / (len(model.blocks) - 1)).on(block)
    return model


class _Hooks:
    def __init__(self, rate: float) -> None:
        self.keep = 1 - rate

    def on(self, block: Any) -> None:
        block.attn.register_forward_hook(self._attention)
        block.mlp.register_forward_hook(self._feed_forward)

    def _attention(self, module: Any, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        self.lengths = args[1].diff().long()
        return self._scaled(output[0]), output[1]

    def _feed_forward(self, module: Any, args: Any, output: Tensor) -> Tensor:
        return self._scaled(output)

    def _scaled(self, y: Tensor) -> Tensor:
        factor = y.new_empty(len(self.lengths)).bernoulli_(self.keep) / self.keep
        return y * factor.repeat_interleave(self.lengths)[:, None]
