"""MT-ViT's predictor as one native operator: what PyTorch's layers compute, wherever it may serve, and no further."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtvit_ops import _backend, _extension, create_model, pack_weights
from mtvit_ops.methods import _tail_predictor
from mtvit_ops.methods._tail_predictor import TailPredictor
from mtvit_ops.testing import assert_close_to_float64

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason=str(_extension.extension_error()))

native = torch.ops.mtvit_ops_cpp
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = {  # (batch, channels, height, width, predictor_size)
    "usual": (2, 3, 224, 224, 96),
    "as-it-is": (3, 3, 96, 96, 96),
    "enlarged": (2, 1, 20, 24, 96),
    "one-side-smaller": (2, 3, 40, 150, 64),
    "odd": (3, 2, 37, 53, 17),
    "window-at-the-edge": (2, 3, 64, 64, 18),
    "smallest": (1, 3, 16, 16, 16),
    "one-pixel": (2, 3, 1, 1, 16),
    "long": (1, 1, 7, 700, 33),
    "no-images": (0, 3, 32, 32, 16),
}


def make_predictor(
    channels: int, size: int, dtype: torch.dtype, tails: int = 3, width: int = 1, classes: int = 0
) -> TailPredictor:
    """One that has learned: no number is where it began."""
    torch.manual_seed(0)
    predictor = TailPredictor(channels, tails, size, width, classes)
    for part in predictor.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.normal_(1.0, 0.3)
            part.bias.data.normal_(0.0, 0.3)
            part.running_mean.normal_(0.0, 0.3)
            part.running_var.uniform_(0.3, 2.0)
    nn.init.normal_(predictor.head.weight)
    nn.init.normal_(predictor.head.bias)
    if classes:
        nn.init.normal_(predictor.head_cls.weight)
        nn.init.normal_(predictor.head_cls.bias)
    return predictor.eval().to(dtype)


def in_pytorch(predictor: TailPredictor, images: Tensor) -> Tensor:
    small = F.interpolate(images, (predictor.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)
    features = predictor.features(small).mean(dim=(2, 3))
    if hasattr(predictor, "head_cls"):
        shares = predictor.head_cls(features).softmax(dim=1)
        features = torch.cat([features, torch.special.entr(shares).sum(dim=1, keepdim=True)], dim=1)
    return predictor.head(features)


def arguments(predictor: TailPredictor, images: Tensor) -> tuple:
    given = predictor._native_arguments(images)
    assert given is not None
    return images, predictor.image_size, *given


def assert_as_in_float64(predictor: TailPredictor, images: Tensor) -> None:
    with torch.inference_mode():
        got = native.tail_predictor(*arguments(predictor, images))
        exact = in_pytorch(copy.deepcopy(predictor).double(), images.double())
        with _backend.use_backend("reference"):
            plain = predictor(images)
        assert torch.equal(predictor(images), got)
    assert got.shape == (len(images), 3)
    assert_close_to_float64("logits", got, exact, plain)


@DTYPES
@pytest.mark.parametrize("case", SIZES)
def test_against_float64(case: str, dtype: torch.dtype) -> None:
    batch, channels, height, width, size = SIZES[case]
    images = torch.randn(batch, channels, height, width).to(dtype)
    assert_as_in_float64(make_predictor(channels, size, dtype), images)


@DTYPES
@pytest.mark.parametrize("width", [2, 3])
def test_wider_ones(width: int, dtype: torch.dtype) -> None:
    predictor = make_predictor(3, 96, dtype, width=width)
    assert_as_in_float64(predictor, torch.randn(2, 3, 112, 112).to(dtype))
    assert predictor.features[-3].out_channels == 96 * width


@DTYPES
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_with_a_classifier(classes: int, dtype: torch.dtype) -> None:
    predictor = make_predictor(3, 64, dtype, classes=classes)
    images = torch.randn(5, 3, 80, 80).to(dtype)
    assert_as_in_float64(predictor, images)
    with torch.inference_mode():
        scores = predictor(images)
        predictor.head.weight[:, -1] = 0
        assert torch.equal(scores, predictor(images)) == (classes == 1)  # one class has no entropy


def test_a_sure_classifier() -> None:
    predictor = make_predictor(3, 32, torch.float32, classes=3).train()
    nn.init.constant_(predictor.head_cls.weight, 0.0)
    predictor.head_cls.bias.data = torch.tensor([300.0, 0.0, -300.0])  # probabilities of 0 in float32
    images = torch.randn(4, 3, 32, 32)
    predictor(images).square().sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in predictor.parameters())
    predictor.eval()
    with torch.inference_mode():
        assert_as_in_float64(predictor, images)


def test_operations_are_counted() -> None:
    for classes in (0, 10):
        predictor = make_predictor(3, 32, torch.float32, classes=classes)
        counted = 0

        def count(layer: nn.Module, _: object, out: Tensor) -> None:
            nonlocal counted
            counted += layer.weight.numel() * (out.shape[2] * out.shape[3] if out.dim() == 4 else 1)

        for part in predictor.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.register_forward_hook(count)
        predictor(torch.randn(1, 3, 32, 32))
        assert predictor.macs() == counted


def test_strides_threads_and_repetition_change_no_bit() -> None:
    predictor = make_predictor(3, 96, torch.float32)
    images = torch.randn(5, 3, 60, 70)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        wanted = predictor(images)
        wide = torch.full((5, 70, 60, 9), torch.nan)
        wide[..., 2:8:2] = images.permute(0, 3, 2, 1)
        assert torch.equal(predictor(wide[..., 2:8:2].permute(0, 3, 2, 1)), wanted)
        assert torch.equal(torch.cat([predictor(image[None]) for image in images]), wanted)
        try:
            torch.set_num_threads(3 - min(threads, 2))
            assert torch.equal(predictor(images), wanted)
        finally:
            torch.set_num_threads(threads)


def test_an_untrained_head_prefers_nothing() -> None:
    with torch.inference_mode():
        assert torch.equal(TailPredictor(3, 3, 96).eval()(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))


def test_nan_is_not_hidden() -> None:
    predictor = make_predictor(3, 16, torch.float32)
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0, 4, 4] = torch.nan
    with torch.inference_mode():
        got = predictor(images)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_serves_in_inference_and_steps_aside_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = _tail_predictor.native_kernel
    monkeypatch.setattr(
        _tail_predictor,
        "native_kernel",
        lambda name: lambda *args: (calls.append(name), real(name)(*args))[1],
    )
    predictor, images = make_predictor(3, 32, torch.float32), torch.randn(2, 3, 40, 40)

    def served() -> bool:
        calls.clear()
        predictor(images)
        return "predict_tails" in calls

    assert not served()  # gradients
    with torch.no_grad():
        assert served()
        with _backend.use_backend("reference"):
            assert not served()
        with torch.autocast("cpu", torch.bfloat16):
            assert not served()
        handle = predictor.features[3].register_forward_hook(lambda *_: None)
        assert not served()
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not served()
        handle.remove()
        predictor.train()
        assert not served()
        predictor.eval()
        relu, predictor.features[2] = predictor.features[2], Counted()
        assert not served()
        predictor.features[2] = relu
        predictor.features[1].eps = 1e-3
        assert not served()
        predictor.features[1].eps = 1e-5
        assert served()
        pack_weights(predictor)
        assert served()


CHANGED = {  # place among the features, and what stands there now
    "bias": (0, lambda: nn.Conv2d(3, 16, 3, 4, 1)),
    "stride": (0, lambda: nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
    "padding": (0, lambda: nn.Conv2d(3, 16, 3, 4, 0, bias=False)),
    "padding mode": (0, lambda: nn.Conv2d(3, 16, 3, 4, 1, bias=False, padding_mode="reflect")),
    "dilation": (3, lambda: nn.Conv2d(16, 16, 3, 2, 1, 2, groups=16, bias=False)),
    "pointwise stride": (6, lambda: nn.Conv2d(16, 32, 1, 2, bias=False)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_layer_runs_itself(case: str) -> None:
    place, make = CHANGED[case]
    predictor, images = make_predictor(3, 64, torch.float32), torch.randn(2, 3, 80, 80)
    predictor.features[place] = make()
    with torch.inference_mode():
        assert torch.equal(predictor(images), in_pytorch(predictor, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_chooses_as_with_pytorch_s_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = create_model("mtvit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, grids=(1, 2, 4))
    model.method.predictor = make_predictor(3, 96, torch.float32)
    model = model.eval().to(dtype)
    images = torch.randn(16, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        _, trace = model(images, return_trace=True)
        with _backend.use_backend("reference"):
            _, wanted = model(images, return_trace=True)
    logits = wanted.extras["predictor_logits"].float().sort(dim=1).values
    clear = logits[:, -1] - logits[:, -2] > 0.1  # closer ones are a matter of rounding
    assert clear.any()
    assert torch.equal(trace.extras["tail"][clear], wanted.extras["tail"][clear])


@DTYPES
@pytest.mark.parametrize("classes", [0, 10])
def test_the_choice_is_that_of_the_scores(classes: int, dtype: torch.dtype) -> None:
    predictor, images = make_predictor(3, 32, dtype, classes=classes), torch.randn(40, 3, 40, 40).to(dtype)
    costs, seen = (0.25, 0.5, 1.0), set()
    images[3, 0, 4, 4] = torch.nan
    with torch.inference_mode():
        for weight in (0.0, 0.7, -2.0, 1e9):
            found = predictor.choose(images, costs, weight)
            assert found is not None
            scores, tails = found
            assert torch.equal(scores.nan_to_num(), predictor(images).nan_to_num())
            # by hand: numpy takes the first of equals, and the first where there is no number
            value = scores.float().numpy() - np.float32(weight) * np.array(costs, dtype=np.float32)
            best = value == value.max(axis=1, keepdims=True)
            assert tails.tolist() == best.argmax(axis=1).tolist()
            assert tails.dtype is torch.int32
            seen |= set(tails.tolist())
        assert len(seen) > 1
        predictor.head.weight.zero_()
        predictor.head.bias.zero_()
        found = predictor.choose(images[:2], costs, 0.0)
        assert found is not None
        assert found[1].tolist() == [0, 0]  # equals go to the cheaper tail
        assert predictor.choose(images[:0], costs, 0.0)[1].shape == (0,)
        predictor.register_forward_hook(lambda *_: None)
        assert predictor.choose(images, costs, 0.0) is None


CHANGES = {
    "weight in place": lambda predictor: predictor.features[3].weight.mul_(2),
    "statistics in place": lambda predictor: predictor.features[1].running_mean.add_(1),
    "statistics replaced": lambda predictor: setattr(
        predictor.features[4], "running_var", predictor.features[4].running_var * 2
    ),
    "head": lambda predictor: setattr(predictor, "head", nn.Linear(96, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_folded_follows_changes(change) -> None:
    predictor, images = make_predictor(3, 32, torch.float32), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = predictor(images)
        change(predictor)
        after = predictor(images)
        assert not torch.allclose(before, after)
        assert_as_in_float64(predictor, images)


FOLDED_BAD = {
    "channels": (lambda a: (a[0][:, :2], *a[1:]), "images must have 3 channels"),
    "folded": (lambda a: (*a[:2], a[2][:-1], *a[3:]), r"folded must have shape \(\d+,\), got"),
    "folded dtype": (lambda a: (*a[:2], a[2].half(), *a[3:]), "folded must be contiguous float32"),
    "few numbers": (lambda a: (*a[:3], a[3][:3], *a[4:]), "shape must be .*, got 3 numbers"),
    "a width": (lambda a: (*a[:3], [0, *a[3][1:]], *a[4:]), r"numbers in \[1, 65536\], got 0"),
    "a large one": (lambda a: (*a[:3], [*a[3][:-1], 2**40], *a[4:]), r"numbers in \[0, 65536\], got 1099511627776"),
    "costs": (lambda a: (*a[:4], [1.0], a[5]), "costs must be one a tail, got 1 for 3"),
}


@pytest.mark.parametrize("case", FOLDED_BAD)
def test_what_is_folded_must_fit(case: str) -> None:
    spoil, message = FOLDED_BAD[case]
    predictor, images = make_predictor(3, 16, torch.float32), torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        given = (images, 16, *predictor._folded(images), [0.0, 0.0, 0.0], 0.0)
        native.predict_tails(*given)
        with pytest.raises(RuntimeError, match=message):
            native.predict_tails(*spoil(given))


BAD = {
    "images": (lambda a: (a[0][0], *a[1:]), r"images must have shape \(B, C, H, W\), got \(3, 16, 16\)"),
    "dtype": (lambda a: (a[0].double(), *a[1:]), "images must be float32, bfloat16 or float16"),
    "pixels": (lambda a: (a[0][:, :, :0], *a[1:]), "images must have channels and pixels"),
    "size": (lambda a: (a[0], 0, *a[2:]), r"size must be in \[1, 4096\], got 0"),
    "layers": (lambda a: (*a[:2], a[2][:10], *a[3:]), "layers must be 5, 15, 25 ... tensors, got 10"),
    "weight": (
        lambda a: (*a[:2], [a[2][0][:, :1], *a[2][1:]], *a[3:]),
        r"images must have 1 channels, got \(1, 3, 16, 16\)",
    ),
    "another weight": (
        lambda a: (*a[:2], [*a[2][:5], a[2][5][:, :, :2], *a[2][6:]], *a[3:]),
        r"layers\[5\] must have shape \(16, 1, 3, 3\), got \(16, 1, 2, 3\)",
    ),
    "norm": (
        lambda a: (*a[:2], [a[2][0], a[2][1][:5], *a[2][2:]], *a[3:]),
        r"layers must have shape \(16,\), got \(5,\)",
    ),
    "head": (lambda a: (*a[:4], a[4][:, :5], *a[5:]), r"head_weight must have shape \(K, 96\), got \(3, 5\)"),
    "head_bias": (lambda a: (*a[:5], a[5][:2], *a[6:]), r"head_bias must have shape \(3,\), got \(2,\)"),
    "class_weight": (
        lambda a: (*a[:4], torch.zeros(3, 97), a[5], torch.zeros(4, 95), torch.zeros(4)),
        r"class_weight must have shape \(N, 96\), got \(4, 95\)",
    ),
    "class_bias": (
        lambda a: (*a[:4], torch.zeros(3, 97), a[5], torch.zeros(4, 96), torch.zeros(5)),
        r"class_bias must have shape \(4,\), got \(5,\)",
    ),
    "no classes": (
        lambda a: (*a[:4], torch.zeros(3, 97), a[5], torch.zeros(0, 96), torch.zeros(0)),
        r"class_weight must have classes, got \(0, 96\)",
    ),
    "head before a classifier": (
        lambda a: (*a[:6], torch.zeros(4, 96), torch.zeros(4)),
        r"head_weight must have shape \(K, 97\), got \(3, 96\)",
    ),
    "one of the two": (lambda a: (*a[:6], torch.zeros(4, 96)), "class_weight and class_bias must be given together"),
}


@pytest.mark.parametrize("case", BAD)
def test_misfits_are_told(case: str) -> None:
    spoil, message = BAD[case]
    predictor = make_predictor(3, 16, torch.float32)
    given = arguments(predictor, torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError, match=message):
        native.tail_predictor(*spoil(given))
