"""Whole models on Triton's kernels against the same models on the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mtvit_ops import VisionTransformer, _backend, create_model, use_backend
from mtvit_ops.nn import block as block_file
from mtvit_ops.nn import ragged_block

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
MODELS = {  # name, its options, the fused operator that its blocks run on
    "dense": ("vit_tiny_patch16_224", {}, "_added_and_normed"),
    # halts at every layer, and only the device knows whom
    "avit": ("avit_tiny_patch16_224", {"gate_scale": 5.0, "gate_center": 1.0}, "attend"),
    "evovit": ("evovit_tiny_patch16_224", {"keep_ratios": 0.5}, "_added_and_normed"),
    "lifevit": ("lifevit_tiny_patch16_224", {"base_block": 1}, "_added_and_normed"),
    "lifevit-threshold": ("lifevit_tiny_patch16_224", {"base_block": 1, "mode": "threshold"}, "attend"),
    "mtvit": ("mtvit_tiny_patch16_224", {"grids": (2, 4), "predictor_size": 32}, "attend"),
}


@pytest.fixture(params=[("triton", "cpu"), ("triton", "cuda")], ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    backend, device = request.param
    if not _backend.available_backends()[backend].available:
        pytest.skip(_backend.available_backends()[backend].reason)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if (device == "cpu") != _backend.triton_is_interpreted():
        pytest.skip("Triton runs on the CPU with TRITON_INTERPRET=1, and on GPUs without it")
    return request.param


def make_model(name: str, options: dict, device: str) -> VisionTransformer:
    torch.manual_seed(1)  # the same weights at every call
    model = create_model(name, **SIZES, **options)
    for parameter in model.parameters():  # choices that are no ties
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval().to(device)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two fused ways blocks took."""
    calls: list[str] = []

    def noted(function: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.append(function.__name__), function(*args, **kwargs))[1]

    monkeypatch.setattr(ragged_block, "attend", noted(ragged_block.attend))
    monkeypatch.setattr(block_file, "_added_and_normed", noted(block_file._added_and_normed))
    return calls


@pytest.mark.parametrize("case", MODELS)
def test_inference_equals_the_reference(case: str, place: tuple[str, str], served: list[str]) -> None:
    name, options, way = MODELS[case]
    model = make_model(name, options, place[1])
    images = torch.randn(3, 3, 32, 32).to(place[1])
    with torch.inference_mode():
        with use_backend("reference"):
            expected, trace = model(images, return_trace=True)
        assert not served
        with use_backend(place[0]):
            logits, found = model(images, return_trace=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.tokens_per_block, trace.tokens_per_block)
    assert set(served) == {way}
    if case != "dense":
        assert trace.tokens_per_block.min() < 17  # somebody was dropped


@pytest.mark.parametrize("case", ["dense", "avit", "evovit"])
def test_gradients_equal_the_reference(case: str, place: tuple[str, str]) -> None:
    name, options, _ = MODELS[case]
    images = torch.randn(2, 3, 32, 32).to(place[1])
    gradients = []
    for backend in ("reference", place[0]):
        model = make_model(name, options, place[1])
        with use_backend(backend):
            model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4 * max(size, 1e-3), msg=name)
