"""A whole forward pass as one CUDA graph: one launch from the host, whatever the tokens do on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend
from ..nn import VisionTransformer

WARM_UP_RUNS = 3  # compile kernels, choose algorithms, fill the allocator: none of it may happen inside a capture


class Recording(NamedTuple):
    """A forward pass that can be run again on what stands in its input."""

    images: Tensor  # (B, C, H, W), to be written
    logits: Tensor  # (B, num_classes), to be read before the next run
    replay: Callable[[], None]


Record = Callable[[VisionTransformer, Sequence[Tensor]], list[Recording]]


class CapturedModel:
    """A model's forward pass for a few batch sizes, replayed; made by ``capture``.

    Attributes:
        batch_sizes: sizes that were captured, rising.
        reason: why batches run eagerly after all; None: graphs serve.
    """

    def __init__(
        self, model: VisionTransformer, examples: Sequence[Tensor], reason: str | None, record: Record
    ) -> None:
        self.batch_sizes = tuple(len(images) for images in examples)
        self.reason = reason
        self._model = model
        self._address = model.cls_token.data_ptr()
        self._recordings = {} if reason else dict(zip(self.batch_sizes, record(model, examples)))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Classify, as the model does.

        Args:
            images: (b, in_chans, img_size, img_size), dtype and device of the weights, b up to the largest captured
                size. A size between two captured ones runs as the next larger, with black images behind.

        Returns:
            Logits (b, num_classes), the caller's own.

        Raises:
            TypeError, ValueError: images of another rank, size, dtype or device, or more than were captured.
            RuntimeError: the model was put into training mode, or its weights were moved or cast.

        No gradient. No device synchronisation. One call at a time: all calls share buffers.
        """
        self._model.check_images(images)
        count = len(images)
        size = next((size for size in self.batch_sizes if size >= count), None)
        if size is None:
            raise ValueError(f"images must be at most {self.batch_sizes[-1]}, the largest captured batch, got {count}")
        if self._model.training:
            raise RuntimeError("the captured model was put into training mode: call .eval()")
        if self._model.cls_token.data_ptr() != self._address:
            raise RuntimeError("the captured model's weights have been moved or cast: capture it again")
        if self.reason is not None:
            return self._model(images)
        recording = self._recordings[size]
        recording.images[:count].copy_(images)
        recording.images[count:].zero_()
        recording.replay()
        return recording.logits[:count].clone()

    def __repr__(self) -> str:
        how = "CUDA graphs" if self.reason is None else f"eager: {self.reason}"
        return f"{type(self).__name__}(batch_sizes={self.batch_sizes}, {how})"


def capture(model: VisionTransformer, example_images: Tensor | Sequence[Tensor]) -> CapturedModel:
    """Record a model's inference as CUDA graphs, one a batch size.

    A graph takes a few microseconds to launch, however many kernels it holds: what small batches wait for. Counts that
    only the data decides stay on the device, so that every method can be captured, A-ViT's halting included. On a CPU
    the model runs as it is; the logger ``mtvit_ops`` and ``reason`` say so.

    Args:
        model: in evaluation mode, not to be moved or cast afterwards. Weights changed in place are seen.
        example_images: a batch, or several of different sizes, as the model takes them; their values do not matter.

    Returns:
        A callable, images to logits.

    Raises:
        TypeError, ValueError: no model of this package, one in training mode, images that it does not take, no images,
            or two batches of one size; autocast, which a graph could not follow.

    Results equal the model's to rounding. No gradient. The capture waits for the device, calls do not. What is in force
    at the capture (``use_backend``, TF32) stays so in the graphs. They share one pool of memory: as much as the
    largest batch needs, and what each keeps for itself.

    Equivalent PyTorch: ``torch.cuda.make_graphed_callables`` for one batch size, under ``torch.no_grad``.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a VisionTransformer of this package, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode: call .eval()")
    examples = [example_images] if isinstance(example_images, Tensor) else list(example_images)
    if not examples:
        raise ValueError("example_images must hold at least one batch, got none")
    for images in examples:
        model.check_images(images)
    sizes = sorted(len(images) for images in examples)
    if sizes[0] == 0:
        raise ValueError("example_images must hold at least one image a batch, got 0")
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"example_images must be batches of different sizes, got {', '.join(map(str, sizes))}")
    device = model.cls_token.device
    if torch.is_autocast_enabled(device.type):
        raise ValueError("autocast must be off around capture: cast the model instead")
    reason = None if device.type == "cuda" else f"CUDA graphs need a CUDA device, and the model is on {device}"
    if reason is not None:
        _backend.say_once(logging.INFO, f"capture: the model runs eagerly, since {reason}")
    return CapturedModel(model, sorted(examples, key=len), reason, record_graphs)


@torch.no_grad()
def record_graphs(model: VisionTransformer, examples: Sequence[Tensor]) -> list[Recording]:
    """A graph for each batch, all in one pool."""
    device = model.cls_token.device
    with torch.cuda.device(device):
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        recordings = []
        for example in reversed(examples):  # the largest first: the others find their memory in its
            images = example.clone(memory_format=torch.contiguous_format)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    model(images)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads (a data loader's, say) may go on allocating meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = model(images)
            recordings.append(Recording(images, logits, graph.replay))
    return recordings[::-1]
