"""Linear layers and their packed form against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F

import mtvit_ops
from mtvit_ops import _cpu_linear
from mtvit_ops.nn import Mlp, PackedLinear, pack_weights, unpack_weights
from mtvit_ops.nn.linear import linear
from mtvit_ops.testing import assert_close_to_float64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, inputs, outputs: one token, sizes that no vector divides, the widths of DeiT-T
SHAPES = [(1, 8, 8), (5, 7, 3), (99, 192, 576), (0, 4, 6)]


def layer_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, int, int], dtype: torch.dtype, gelu: bool, packed: bool) -> None:
    tokens, inputs, outputs = shape
    layer = layer_of(inputs, outputs, dtype)
    x = torch.randn(tokens, inputs).to(dtype)
    activation = F.gelu if gelu else (lambda y: y)
    exact = activation(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    with torch.inference_mode():
        plain = activation(layer(x))
        got = linear(x, PackedLinear(layer) if packed else layer, gelu=gelu)
    assert got.dtype == dtype
    assert_close_to_float64("linear", got, exact, plain)


def test_without_bias() -> None:
    layer = layer_of(6, 4, torch.float32, bias=False)
    x = torch.randn(3, 6)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, PackedLinear(layer)), layer(x))


def test_gradients_need_no_packing() -> None:
    mlp = Mlp(8, 16)
    twin = pack_weights(copy.deepcopy(mlp))
    x = torch.randn(5, 8)
    mlp(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, parameter), other in zip(mlp.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("change", ["in place", "load", "cast", "optimiser"])
def test_changed_weights_are_packed_anew(change: str) -> None:
    mlp = pack_weights(Mlp(8, 16))
    x = torch.randn(5, 8)
    with torch.inference_mode():
        before = mlp(x)
    if change == "in place":
        with torch.no_grad():
            mlp.fc1.weight.mul_(2)
    elif change == "load":
        mlp.load_state_dict(Mlp(8, 16).state_dict())
    elif change == "cast":
        mlp.to(torch.bfloat16)
        x = x.to(torch.bfloat16)
    else:
        optimiser = torch.optim.SGD(mlp.parameters(), lr=0.5)
        mlp(x).sum().backward()
        optimiser.step()
    with torch.inference_mode():
        after = mlp(x)
        plain = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
        wide = copy.deepcopy(mlp).double()
        exact = F.linear(F.gelu(F.linear(x.double(), wide.fc1.weight, wide.fc1.bias)), wide.fc2.weight, wide.fc2.bias)
    assert_close_to_float64("after", after, exact, plain)
    assert change == "cast" or not torch.allclose(before, after)


def test_state_dict_and_way_back() -> None:
    mlp = Mlp(8, 16).eval()
    names = list(mlp.state_dict())
    pack_weights(mlp)
    assert isinstance(mlp.fc1, PackedLinear)
    assert not mlp.fc1.training
    assert list(mlp.state_dict()) == names
    unpack_weights(mlp)
    assert type(mlp.fc1) is nn.Linear
    assert not mlp.fc1.training
    assert list(mlp.state_dict()) == names


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4))
    assert type(pack_weights(model)[0]) is Scaled
    x = torch.randn(2, 4)
    with torch.inference_mode():
        assert torch.equal(linear(x, model[0]), model[0](x))


def test_reference_backend_uses_plain_layers() -> None:
    layer = PackedLinear(layer_of(6, 4, torch.float32))
    with torch.inference_mode(), mtvit_ops.use_backend("reference"):
        linear(torch.randn(3, 6), layer)
        layer(torch.randn(3, 6))
    assert layer._packed is None


def test_packed_model_compiles_and_matches() -> None:
    model = mtvit_ops.create_model(
        "evovit_tiny_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2, num_classes=5
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(pack_weights(model)(images), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [48, 96, 128, 192, 384])
def test_round_trip_of_dtypes_is_packed_anew(size: int) -> None:
    """A weight cast and cast back may come to lie where the old one lay."""
    layer = PackedLinear(nn.Linear(size, size))
    x = torch.randn(4, size)
    with torch.inference_mode():
        layer(x)
        layer.bfloat16().float()
        plain = F.linear(x, layer.weight, layer.bias)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert_close_to_float64("after", layer(x), exact, plain)


def test_computed_weights_and_hooks_are_left_alone() -> None:
    pruned, hooked, seen = nn.Linear(6, 6), nn.Linear(6, 6), []
    torch.nn.utils.prune.l1_unstructured(pruned, "weight", 0.5)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(pruned, hooked)
    names = list(model.state_dict())
    pack_weights(model)
    assert list(model.state_dict()) == names
    with torch.inference_mode():
        linear(torch.randn(2, 6), model[1])
    assert seen == [1]


def test_a_layer_on_its_own_is_packed() -> None:
    layer = nn.Linear(4, 4)
    assert pack_weights(layer).weight is layer.weight
    with pytest.raises(TypeError, match="model must be a module, got str"):
        pack_weights("layer")  # type: ignore[arg-type]


# instruction set, matrix units, what oneDNN takes, what is ours
SHARES = {
    "no-vectors": ("portable", False, DTYPES[:1], []),
    "avx2": ("avx2", False, DTYPES[:1], DTYPES),
    "avx512": ("avx512", False, DTYPES[:2], DTYPES),
    "pairs": ("avx512bf16", False, DTYPES[:2], DTYPES),
    "matrix-units": ("avx512bf16", True, DTYPES[:2], [torch.float32, torch.float16]),
    "matrix-units-for-both": ("avx512bf16", True, DTYPES, [torch.float32]),
}


@pytest.mark.skipif(not mtvit_ops.available_backends()["cpp"].available, reason="needs the native operators")
@pytest.mark.parametrize("case", SHARES)
def test_matrix_units_stay_onednn_s(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    level, matrix_units, onednn, ours = SHARES[case]
    monkeypatch.setattr(torch.ops.mtvit_ops_cpp, "isa", lambda: level)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    monkeypatch.setattr(_cpu_linear, "onednn_dtypes", lambda: tuple(onednn))
    assert _cpu_linear.panel_dtypes.__wrapped__() == tuple(ours)
