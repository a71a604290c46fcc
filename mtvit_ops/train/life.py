"""Training of Life Regression: lives learn through soft weights, then the blocks adapt to hard truncation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_count, check_real
from ..methods import Life
from ..nn import VisionTransformer
from ._encoder import classify, run_blocks
from ._task import task_loss


@dataclass(frozen=True)
class LifeLoss:
    """
    Attributes:
        stage: 1: every token stays, weighed by how far its life exceeds the block, so that the lives learn;
            2: tokens are removed as in inference, and cost nothing, so that the slimmed blocks learn.
        label_smoothing: of the cross-entropy, [0, 1].
    """

    stage: int = 1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_count("stage", self.stage, 1, 2)
        check_real("label_smoothing", self.label_smoothing, 0.0, 1.0)


def loss(
    model: VisionTransformer, images: Tensor, target: Tensor, weights: LifeLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy, and nothing else: no budget, no target for the lives.

    Args:
        model: runs ``Life``. Call ``freeze`` first: what requires a gradient gets one here.
        images: as the model takes them, B >= 1.
        target: class indices, (B,), int64, in [0, num_classes), or soft targets, (B, num_classes), float.
        weights: stage and smoothing; the soft weights' temperature is the method's.

    Returns:
        The loss, and ``{"task": loss}``.

    Raises:
        TypeError, ValueError: a model of another method, images or targets that do not fit.

    Stage 2 computes what the model itself computes, in the mode that it is in (``"budget"`` is the authors'). The loss
    is float32 (float64 for float64). No device synchronisation.

    Source: Life Regression, arXiv 2304.04926.
    """
    if not isinstance(model.method, Life):
        raise TypeError(f"model must run Life, got {type(model.method).__name__}")
    logits = soft_logits(model, images) if weights.stage == 1 else model(images)
    task = task_loss(logits, target, weights.label_smoothing)
    return task, {"task": task}


def soft_logits(model: VisionTransformer, images: Tensor) -> Tensor:
    """Logits (B, C) of a pass in which every token stays; block t weighs it, as a key, with sigma(temp (life - t))."""
    method = model.method
    assert isinstance(method, Life)
    model.check_images(images)
    base, depth = method.config.base_block, model.config.depth
    tokens = run_blocks(model, model.embed(images), range(base))
    lives = method.lives(tokens.x.reshape(tokens.num_images, tokens.max_seqlen, tokens.x.shape[1]))
    # the class token is weighed too, and lives as long as the model is deep
    lives = F.pad(lives, (1, 0), value=float(depth)).reshape(-1)  # (R,)
    temperature = method.config.temperature
    tokens = run_blocks(
        model, tokens, range(base, depth), key_bias=lambda block: log_soft_weights(lives, block, temperature)
    )
    return classify(model, tokens)


def log_soft_weights(lives: Tensor, block: int, temperature: float) -> Tensor:
    """Logarithm of sigma(temperature * (life - block)), finite for every life; shape and dtype of ``lives``."""
    return F.logsigmoid(temperature * (lives - block))


def freeze(model: VisionTransformer, stage: int) -> list[nn.Parameter]:
    """Let only those parameters learn that the authors train in a stage, in place; returns them.

    Args:
        model: runs ``Life``.
        stage: 1: the lives' matrix; 2: the slimmed blocks. Patch embedding, positions, class token, the blocks before,
            the final norm and the classifier never learn.

    Raises:
        TypeError, ValueError: a model of another method, a stage that there is not.
    """
    method = model.method
    if not isinstance(method, Life):
        raise TypeError(f"model must run Life, got {type(method).__name__}")
    check_count("stage", stage, 1, 2)
    model.requires_grad_(False)
    learning = [method.weight] if stage == 1 else list(model.blocks[method.config.base_block :].parameters())
    for parameter in learning:
        parameter.requires_grad_(True)
    return learning
