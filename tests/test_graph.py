"""Captured models: the batch that is chosen, what is refused, the fallback; and on a GPU, real graphs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import ALL, assert_rounding, build, build_case, make_images
from torch import Tensor, nn

import mtvit_ops
from mtvit_ops import VisionTransformer, _backend
from mtvit_ops.engine import CapturedModel, graph
from mtvit_ops.testing import assert_equal

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")


class Replays:
    """In place of CUDA graphs: recordings that run the model, and remember what they ran on."""

    def __init__(self) -> None:
        self.ran: list[Tensor] = []

    def __call__(self, model: VisionTransformer, examples: Sequence[Tensor]) -> list[graph.Recording]:
        return [self._recording(model, torch.full_like(images, 7.0)) for images in examples]

    def _recording(self, model: VisionTransformer, images: Tensor) -> graph.Recording:
        logits = torch.empty(len(images), model.config.num_classes)

        def replay() -> None:
            self.ran.append(images.clone())
            logits.copy_(model(images))

        return graph.Recording(images, logits, replay)


def captured(model: VisionTransformer, *sizes: int) -> tuple[CapturedModel, Replays]:
    replays = Replays()
    return CapturedModel(model, [make_images(size) for size in sizes], None, replays), replays


# images asked for, and the batch that runs of 2, 4 and 7
CHOICES = {0: 2, 1: 2, 2: 2, 3: 4, 4: 4, 5: 7, 7: 7}


@pytest.mark.parametrize(("count", "size"), CHOICES.items())
def test_the_next_larger_batch_runs_with_black_images_behind(count: int, size: int) -> None:
    model, images = build_case("avit"), make_images(count)
    run, replays = captured(model, 2, 4, 7)
    logits = run(images)
    [ran] = replays.ran
    assert_equal("images", ran[:count], images)
    assert_equal("padding", ran[count:], torch.zeros(size - count, *images.shape[1:]))
    with torch.no_grad():
        assert_rounding(logits, model(images))


def test_results_are_the_callers_own() -> None:
    run, _ = captured(build_case("vit"), 4)
    images = make_images(8)
    first = run(images[:4])
    kept = first.clone()
    run(images[4:])
    assert_equal("the first call's logits", first, kept)
    assert not first.requires_grad


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_what_no_graph_holds_is_refused(graphs: bool) -> None:
    model = build_case("vit")
    run = captured(model, 2, 4)[0] if graphs else mtvit_ops.capture(model, [make_images(4), make_images(2)])
    with pytest.raises(ValueError, match="at most 4, the largest captured batch, got 5"):
        run(make_images(5))
    with pytest.raises(ValueError, match="images must have shape"):
        run(make_images(2)[:, :, :32])
    with pytest.raises(TypeError, match="images must have dtype float32, got float64"):
        run(make_images(2).double())
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        run(make_images(2))
    model.eval().double()
    with pytest.raises(RuntimeError, match="moved or cast: capture it again"):
        run(make_images(2).double())


def test_on_the_cpu_the_model_itself_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, images = build_case("evovit-stage"), make_images(3)
    _backend.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="mtvit_ops"):
        run = mtvit_ops.capture(model, images)
        mtvit_ops.capture(model, images)
    said = [record.message for record in caplog.records if "capture" in record.message]
    reason = "CUDA graphs need a CUDA device, and the model is on cpu"
    assert said == [f"capture: the model runs eagerly, since {reason}"]
    assert run.reason == reason
    assert run.batch_sizes == (3,)
    assert reason in repr(run)
    with torch.no_grad():
        assert_equal("logits", run(images[:2]), model(images[:2]))
    assert not run(images).requires_grad


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "other-model": (
        lambda: mtvit_ops.capture(nn.Linear(2, 2), make_images(1)),
        TypeError,
        "model must be a VisionTransformer of this package, got Linear",
    ),
    "training": (lambda: mtvit_ops.capture(build("vit").train(), make_images(1)), ValueError, "call .eval()"),
    "no-batch": (lambda: mtvit_ops.capture(build("vit"), []), ValueError, "at least one batch, got none"),
    "no-image": (lambda: mtvit_ops.capture(build("vit"), make_images(0)), ValueError, "at least one image a batch"),
    "twice": (
        lambda: mtvit_ops.capture(build("vit"), [make_images(2), make_images(1), make_images(2)]),
        ValueError,
        "different sizes, got 1, 2, 2",
    ),
    "no-tensor": (lambda: mtvit_ops.capture(build("vit"), [4]), TypeError, "images must be a tensor, got int"),
    "shape": (lambda: mtvit_ops.capture(build("vit"), make_images(2)[:, :1]), ValueError, "images must have shape"),
    "dtype": (lambda: mtvit_ops.capture(build("vit"), make_images(2).half()), TypeError, "images must have dtype"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast must be off"):
        mtvit_ops.capture(build("vit"), make_images(1))


def test_every_size_is_warmed_up_beside_the_stream_and_captured_into_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            said.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def recorded(*what: Any, **options: Any) -> Iterator[None]:
        said.append(("enter", getattr(what[0], "name", what[0]), options.get("pool")))
        yield

    fakes = {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: Stream("side"),
        "current_stream": lambda device: Stream("main"),
        "stream": recorded,
        "graph": recorded,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(name="graph", replay=lambda: said.append("replay")),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model, examples = build_case("vit"), [make_images(2), make_images(3)]
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    recordings = graph.record_graphs(model, examples)
    once = [("side", "waits for", "main"), ("enter", "side", None), ("main", "waits for", "side")]
    assert said == 2 * [*once, ("enter", "graph", "pool")]
    runs = graph.WARM_UP_RUNS + 1
    assert sizes == [3] * runs + [2] * runs  # the largest first
    for recording, example in zip(recordings, examples, strict=True):
        assert_equal("input", recording.images, example)
        assert recording.images.data_ptr() != example.data_ptr()
        assert not recording.logits.requires_grad
    recordings[0].replay()
    assert said[-1] == "replay"


@gpu
@pytest.mark.parametrize("name", ALL)
def test_a_graph_computes_what_the_model_does(name: str) -> None:
    model, images = build_case(name, device="cuda"), make_images(12, device="cuda")
    run = mtvit_ops.capture(model, [images[:6], images[:2]])
    assert run.reason is None
    for batch in (images[:6], images[6:], images[3:8], images[:1], images[:0]):
        with torch.no_grad():
            assert_rounding(run(batch), model(batch))
    assert_equal("the same batch again", run(images[:6]), run(images[:6]))


@gpu
@pytest.mark.parametrize("name", ALL)
def test_neither_model_nor_graph_waits_for_the_device(name: str) -> None:
    model, images = build_case(name, device="cuda"), make_images(6, device="cuda")
    run = mtvit_ops.capture(model, images)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model(images)
        run(images)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@gpu
def test_weights_changed_in_place_are_seen() -> None:
    model, images = build_case("vit", device="cuda"), make_images(2, device="cuda")
    run = mtvit_ops.capture(model, images)
    with torch.no_grad():
        model.head.bias.add_(1.0)
        assert_rounding(run(images), model(images))
