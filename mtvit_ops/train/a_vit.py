"""A-ViT's training: the task, the price of pondering, and a prior on how scores spread over depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import check_choice, check_count, check_real
from ..nn import VisionTransformer
from ..nn.checkpointed import CHECKPOINT_OPTIONS, CheckpointedBlock
from ..nn.drop_path import DropPathBlock
from ..nn.masked import MaskedBlock
from ._process_mean import process_mean
from ._task import task_loss

# added to the logits of halted keys: their weight then rounds to 0, but an image that has halted as a whole still has
# a softmax row, whose part in the prior is the authors'
HALTED_KEY_BIAS = -1000.0
SCORE_AT_TARGET = 0.98  # what the scores of the prior sum to after the target depth
PRIOR_STD = 1.0  # layers
LEAST_SHARE, MOST_SHARE = 0.01, 0.99  # the model's distribution is clamped to


@dataclass(frozen=True)
class AViTLoss:
    """Defaults are those of the authors' published training commands (arXiv 2112.07658).

    Attributes:
        ponder: weight of the mean ponder (layers lived, plus the remainder), in [0, 1e9].
        distribution: weight of the divergence of the halting scores' spread over depth from the prior, in [0, 1e9].
            With 0 the term is left out, and halted tokens are really removed, which costs less.
        statistic: which scores make up that spread. ``"intended"``: the patch tokens' of all images. ``"official"``:
            what the authors' code averages, all tokens' of all images but each process's first; it needs two images a
            process.
        target_depth: layers after which the prior's scores sum to 0.98, its peak, >= 1; None: two thirds of the depth.
        label_smoothing: of the task, in [0, 1].
    """

    ponder: float = 5e-4
    distribution: float = 1e-3
    statistic: str = "intended"
    target_depth: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_real("ponder", self.ponder, 0.0, 1e9)
        check_real("distribution", self.distribution, 0.0, 1e9)
        check_choice("statistic", self.statistic, ("intended", "official"))
        if self.target_depth is not None:
            check_count("target_depth", self.target_depth, 1)
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)


class MaskedPass(NamedTuple):
    """What training reads off a forward pass."""

    logits: Tensor  # (B, C)
    ponder: Tensor  # (B, K), layers lived plus the remainder
    scores: Tensor  # (L, B, K), of every token after every layer, halted or not


def loss(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: AViTLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Task, ponder and distributional prior; the terms are ``task``, ``ponder`` and, where it has a weight,
    ``distribution``, which is of the mean scores over the batch of all processes. Arguments and promises as of
    ``compute_loss``.

    Raises:
        ValueError: a model that stops with its class token, which would leave other tokens' ponder unknown; a target
            depth beyond the model's; the official statistic of a single image.

    Source: A-ViT, arXiv 2112.07658; the statistic ``"official"`` is that of the authors' code, where however each of
    several processes takes the divergence of its own images.
    """
    if model.method.config.stop_with_class:
        raise ValueError("stop_with_class must be False in training, since ponder counts every token, got True")
    depth = model.config.depth
    if weights.target_depth is not None:
        check_count("target_depth", weights.target_depth, 1, depth)
    if weights.statistic == "official" and len(images) < 2:
        raise ValueError("images must hold two images for the official statistic, which leaves the first out, got 1")
    if weights.distribution == 0:
        # nothing reads the scores of halted tokens: they can go
        first_rows, tokens, state = model.encode(images)
        logits = model.classify(model.method.readout(first_rows, tokens, state).to(images.dtype))
        parts = {"task": task_loss(logits, target, weights.label_smoothing), "ponder": state.halting.ponder.mean()}
        return parts["task"] + weights.ponder * parts["ponder"], parts
    passed = masked_pass(model, images)
    target_depth = max(1, round(depth * 2 / 3)) if weights.target_depth is None else weights.target_depth
    parts = {
        "task": task_loss(passed.logits, target, weights.label_smoothing),
        "ponder": passed.ponder.mean(),
        "distribution": divergence(spread_over_depth(passed.scores, weights.statistic), target_depth),
    }
    total = parts["task"] + weights.ponder * parts["ponder"] + weights.distribution * parts["distribution"]
    return total, parts


def masked_pass(model: VisionTransformer, images: Tensor) -> MaskedPass:
    """The forward pass with halted tokens masked instead of removed.

    A halted token's value is set to 0 before each block while its gradient goes straight through, so that the scores
    which it still gets take part in the prior, as in the authors' training.

    Args:
        model: runs A-ViT.
        images: (B, in_chans, img_size, img_size).

    Returns:
        MaskedPass(logits, ponder, scores); logits and ponder equal those of ``model`` to float rounding.

    No device synchronisation.
    """
    config = model.method.config
    tokens = model.embed(images)
    x, offsets, length = tokens.x, tokens.cu_seqlens, tokens.max_seqlen
    first_rows = offsets[:-1].long()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    cumulative = torch.zeros(len(x), dtype=wide, device=x.device)
    remainder, ponder = torch.ones_like(cumulative), cumulative
    output = x.new_zeros(len(first_rows), x.shape[1], dtype=wide)
    scores = []
    for index, block in enumerate(model.blocks):
        x = _masked_block(block, x, alive, offsets, length)
        score = torch.sigmoid(x[:, 0].to(wide) * config.gate_scale - config.gate_center)
        scores.append(score)
        # in the last layer every token that is left halts
        step = torch.ones_like(score) if index == len(model.blocks) - 1 else score
        cumulative = cumulative + step.detach()
        reached = alive & (cumulative > 1 - config.eps)
        going = alive & (cumulative < 1 - config.eps)
        share = remainder * reached + step * going
        output = output + share[first_rows, None] * x[first_rows].to(wide)
        ponder = ponder + alive + remainder * reached
        remainder = remainder - step * going
        alive = going
    logits = model.classify(output.to(images.dtype))
    return MaskedPass(logits, ponder.unflatten(0, (-1, length)), torch.stack(scores).unflatten(1, (-1, length)))


def spread_over_depth(scores: Tensor, statistic: str) -> Tensor:
    """The mean score of each layer over the batch of all processes, (L, B, K) to (L,); see ``AViTLoss.statistic``."""
    return process_mean((scores[:, :, 1:] if statistic == "intended" else scores[:, 1:]).mean(dim=(1, 2)))


def divergence(spread: Tensor, target_depth: int) -> Tensor:
    """Kullback-Leibler divergence of the prior from the spread of scores, over the number of layers.

    Args:
        spread: mean scores, (L,), float32 or float64, >= 0; clamped to [0.01, 0.99] once they sum to 1.
        target_depth: of the prior.

    The prior is not normalised: the least value at 12 layers and depth 8 is 0.319.
    """
    prior = halting_prior(len(spread), target_depth, spread)
    # scores that are all 0 have no share to take, rather than NaN
    share = (spread / spread.sum().clamp_min(torch.finfo(spread.dtype).tiny)).clamp(LEAST_SHARE, MOST_SHARE)
    return (torch.xlogy(prior, prior) - prior * share.log()).mean()


def halting_prior(depth: int, target_depth: int, like: Tensor) -> Tensor:
    """A Gaussian over layers 0 to depth - 1 that peaks at ``target_depth`` and sums to 0.98 before it, (depth,)."""
    layers = torch.arange(depth, device=like.device, dtype=like.dtype)
    density = torch.exp(-0.5 * ((layers - target_depth) / PRIOR_STD).square())
    return density * (SCORE_AT_TARGET / density[:target_depth].sum())


def _masked_block(
    block: Any,
    x: Tensor,
    alive: Tensor,
    offsets: Tensor,
    length: int,
    image_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A block on all rows (R, D), of which those not alive (R,) count as 0, give nothing and gain what they may;
    ``image_scales``, (B,) each, multiply what the images gain by attention and by the MLP."""
    if isinstance(block, DropPathBlock):
        batch = len(offsets) - 1
        scales = (block.draw(x, batch), block.draw(x, batch)) if block.training else None
        return _masked_block(block.block, x, alive, offsets, length, scales)
    if isinstance(block, CheckpointedBlock):
        return checkpoint(_masked_block, block.block, x, alive, offsets, length, image_scales, **CHECKPOINT_OPTIONS)
    if isinstance(block, MaskedBlock):  # this masks by itself
        return _masked_block(block.block, x, alive, offsets, length, image_scales)
    mask = alive[:, None]
    bias = HALTED_KEY_BIAS * (~alive).float()
    x = x + (x.where(mask, 0.0) - x).detach()
    # no gradient reaches a halted token from behind a norm: only the residual goes straight through
    z = block.norm1(x).where(mask, 0.0)
    y = block.attn(z, offsets, length, bias)[0]
    x = x + _scaled(y, length, image_scales and image_scales[0]).to(x.dtype)
    z = block.norm2(x).where(mask, 0.0)
    return x + _scaled(block.mlp(z), length, image_scales and image_scales[1]).to(x.dtype)


def _scaled(y: Tensor, length: int, image_scale: Tensor | None) -> Tensor:
    """``y`` (R, D), ``length`` rows an image, times its image's factor (B,)."""
    if image_scale is None:
        return y
    return (y.unflatten(0, (-1, length)) * image_scale[:, None, None]).flatten(0, 1)
