"""Controls: the same model with its tokens, or its tails, chosen at random in the same numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtvit_ops.methods import AViT, EvoViT, Life, MTViT
from mtvit_ops.methods.evo_vit import EvoViTState
from mtvit_ops.nn import Method, VisionTransformer
from mtvit_ops.ragged import RaggedTokens
from mtvit_ops.train.a_vit import HALTED_KEY_BIAS


class RandomEvoViT(EvoViT):
    """Evo-ViT whose selections all rank patches by the same drawn numbers: nobody comes back."""

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, EvoViTState]:
        tokens, state = super().embed(model, images)
        return tokens, state._replace(score=torch.rand_like(state.score))

    def _evolved(self, received: Tensor, score: Tensor, rows: Tensor | None, weight: float) -> Tensor:
        return score


class RandomLife(Life):
    """Life Regression whose lives are drawn."""

    def lives(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape[0], x.shape[1] - 1, device=x.device)


def right_at_random(model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> int:
    """Right answers of the control on all images; as many tokens of every image live in every block as in the model.

    Args:
        model: in evaluation mode; runs A-ViT, Evo-ViT, Life Regression or MT-ViT.
        batches: images and targets.
        seed: of the draws; PyTorch's global generator is put back.
    """
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        if isinstance(model.method, MTViT):
            return _right_by_random_tails(model, batches)
        if isinstance(model.method, AViT):
            return sum(_right(_avit_at_random(model, images), targets) for images, targets in batches)
        kind: type[Method] = RandomEvoViT if isinstance(model.method, EvoViT) else RandomLife
        twin = model.with_method(kind(model.method.config))
        twin.method.load_state_dict(model.method.state_dict())
        return sum(_right(twin(images), targets) for images, targets in batches)


def _right(logits: Tensor, targets: Tensor) -> int:
    return int((logits.argmax(dim=1) == targets).sum())


def _avit_at_random(model: VisionTransformer, images: Tensor) -> Tensor:
    """Logits where each image's patches halt at the depths of its own patches, dealt anew; the class token halts by
    its own score, as ever."""
    _, trace = model(images, return_trace=True)
    depths = trace.extras["counters"].clone()  # (B, K)
    for image in depths:
        image[1:] = image[1:][torch.randperm(len(image) - 1)]
    config = model.method.config
    tokens = model.embed(images)
    x, offsets, length = tokens.x, tokens.cu_seqlens, tokens.max_seqlen
    first = offsets[:-1].long()
    going = torch.ones(len(first), dtype=torch.bool)
    cumulative, remainder = torch.zeros(len(first)), torch.ones(len(first))
    output = torch.zeros(len(first), x.shape[1])
    for index, block in enumerate(model.blocks):
        alive = depths > index
        alive[:, 0] = going
        alive = alive.flatten()
        mask, bias = alive[:, None], HALTED_KEY_BIAS * (~alive).float()
        y = block.attn(block.norm1(x).where(mask, 0.0), offsets, length, bias)[0]
        x = (x + y).where(mask, 0.0)
        x = (x + block.mlp(block.norm2(x))).where(mask, 0.0)
        score = torch.sigmoid(x[first, 0] * config.gate_scale - config.gate_center)
        step = torch.ones_like(score) if index == len(model.blocks) - 1 else score
        cumulative = cumulative + step
        reached = going & (cumulative > 1 - config.eps)
        share = remainder * reached + step * (going & ~reached)
        output = output + share[:, None] * x[first]
        going = going & ~reached
        remainder = remainder - step * going
    return model.classify(output)


def _right_by_random_tails(model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Every image through a tail that another image chose."""
    method = model.method
    assert isinstance(method, MTViT)
    tails, hits = [], []
    for images, targets in batches:
        tails.append(model(images, return_trace=True)[1].extras["tail"])
        hits.append(torch.stack([_forced(model, images, tail) == targets for tail in range(len(method.lengths))]))
    chosen, right = torch.cat(tails).long(), torch.cat(hits, dim=1)  # (N,), (K, N)
    dealt = chosen[torch.randperm(len(chosen))]
    return int(right.gather(0, dealt[None]).sum())


def _forced(model: VisionTransformer, images: Tensor, tail: int) -> Tensor:
    """The answers of one tail, (B,)."""
    import dataclasses

    twin = model.with_method(MTViT(dataclasses.replace(model.method.config, force_tail=tail)))
    twin.method.load_state_dict(model.method.state_dict(), strict=False)
    return twin(images).argmax(dim=1)
