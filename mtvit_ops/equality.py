"""The checks before any timing: removing equals masking, and an image in a batch equals the image alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .methods import Dense, MTViT
from .nn import Trace, VisionTransformer
from .nn.masked import masked_twin

# Where rounding makes a near-tie fall the other way, a run keeps other tokens and its logits may differ: the share of
# (token, block) pairs and of the largest logit up to which that is still rounding.
_NEAR_TIES = {torch.float64: 0.0, torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
_ROUNDING_FACTOR = 4.0  # times what the dense model loses in this dtype: two runs round, each a little differently


class UnequalError(RuntimeError):
    """A model does not compute what it should; it must not be timed."""


class Equality(NamedTuple):
    """How well a model agrees with its slow twins on some images; errors are shares of the largest logit."""

    masking_error: float  # removed against masked (MT-ViT: packed against each image alone with its tail forced)
    alone_error: float  # in the batch against alone
    tolerance: float  # allowed where both runs keep the same tokens
    changed_decisions: float  # largest share of an image's (token, block) pairs that a near-tie decided otherwise
    images: int


def rounding_tolerance(dense: VisionTransformer, images: Tensor) -> float:
    """Allowed difference of two runs of one model, as a share of the largest logit.

    Four times what the dense model loses in its dtype against float64, on these images.
    """
    exact = copy.deepcopy(dense).double()
    with torch.inference_mode():
        wanted = exact(images.double())
        got = dense(images)
    return _ROUNDING_FACTOR * max(float(_error(got, wanted).max()), torch.finfo(images.dtype).eps)


def check_batches(name: str, model: VisionTransformer, batches: Sequence[Tensor], tolerance: float) -> Equality:
    """``check_equality`` on each batch; the largest errors of all."""
    found = [check_equality(name, model, batch, tolerance) for batch in batches]
    return Equality(
        max(one.masking_error for one in found),
        max(one.alone_error for one in found),
        tolerance,
        max(one.changed_decisions for one in found),
        sum(one.images for one in found),
    )


def check_equality(name: str, model: VisionTransformer, images: Tensor, tolerance: float) -> Equality:
    """Hold a model to its masked twin, and the batch to its images one by one.

    Args:
        name: what messages call the model.
        model: in evaluation mode.
        images: (B, in_chans, img_size, img_size), B >= 1.
        tolerance: from ``rounding_tolerance``.

    Raises:
        UnequalError: logits or decisions differ by more than rounding explains; the message says where.
    """
    ties = _NEAR_TIES[images.dtype]
    masking, alone, changed = 0.0, 0.0, 0.0
    with torch.inference_mode():
        logits = model(images)  # as it will be timed: without a trace
        if not bool(torch.isfinite(logits).all()):
            raise UnequalError(f"{name} gives logits that are not finite: it was not timed")
        _, trace = model(images, return_trace=True)
        alive = alive_tokens(trace, model.config.num_patches)
        if not isinstance(model.method, (Dense, MTViT)):
            masked, masked_trace = masked_twin(model)(images, return_trace=True)
            masking, changed = _compare(
                f"{name}: removing tokens differs from masking them",
                (logits, alive),
                (masked, alive_tokens(masked_trace, model.config.num_patches)),
                tolerance,
                ties,
            )
        for index in range(len(images)):
            image = images[index : index + 1]
            what = f"{name}: photograph {index} in a batch of {len(images)} differs from the same photograph alone"
            one = (logits[index : index + 1], alive[:, index : index + 1])
            single, single_trace = model(image, return_trace=True)
            single_alive = alive_tokens(single_trace, model.config.num_patches)
            error, share = _compare(what, one, (single, single_alive), tolerance, ties)
            alone, changed = max(alone, error), max(changed, share)
            if isinstance(model.method, MTViT):
                forced = _with_tail(model, int(trace.extras["tail"][index]))(image)
                error, _ = _compare(f"{what} with its tail forced", one, (forced, one[1]), tolerance, ties)
                masking = max(masking, error)
    return Equality(masking, alone, tolerance, changed, len(images))


def alive_tokens(trace: Trace, num_patches: int) -> Tensor:
    """Which tokens enter which block, (depth, B, 1 + num_patches), bool, on the CPU."""
    depth, batch = trace.tokens_per_block.shape
    alive = torch.zeros(depth, batch, 1 + num_patches, dtype=torch.bool)
    for block in range(depth):
        for image in range(batch):
            alive[block, image, trace.kept(block, image).cpu()] = True
    return alive


def _compare(
    what: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float, ties: float
) -> tuple[float, float]:
    """Largest logit error, and largest share of decisions that differ, over the images."""
    errors = _error(got[0], wanted[0])
    differ = (got[1] != wanted[1]).sum(dim=(0, 2))
    shares = differ / got[1].sum(dim=(0, 2)).clamp_min(1)
    for error, share in zip(errors.tolist(), shares.tolist(), strict=True):
        if share > ties:
            raise UnequalError(
                f"{what}: {share:.1%} of its (token, block) pairs differ, and near-ties explain at most {ties:.1%}:"
                f" nothing was timed"
            )
        allowed = tolerance if share == 0 else max(tolerance, ties)
        if not error <= allowed:
            raise UnequalError(
                f"{what}: logits by {error:.2e} of the largest, and rounding explains at most {allowed:.2e}:"
                f" nothing was timed"
            )
    return float(errors.max()), float(shares.max())


def _error(got: Tensor, wanted: Tensor) -> Tensor:
    """Largest difference of each image's logits over the largest logit of all, (B,)."""
    wanted = wanted.double().cpu()
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return (got.double().cpu() - wanted).abs().amax(dim=1) / scale


def _with_tail(model: VisionTransformer, tail: int) -> VisionTransformer:
    """The same MT-ViT, forced to one tail."""
    method = copy.copy(model.method)
    method.config = dataclasses.replace(method.config, force_tail=tail)
    return model.with_method(method)
