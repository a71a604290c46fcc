"""What every registered op owes PyTorch: a true schema, fake and gradient, one graph under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mtvit_ops import ops, use_backend
from mtvit_ops._register import CUDA_NAMESPACE, NAMESPACE, NATIVE_NAMESPACE
from mtvit_ops.testing import assert_equal, offsets, packed_qkv, random_tensor, value_and_gradients


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def registered(namespace: str) -> dict[str, Any]:
    """Schemas of a namespace by the op's name."""
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.split("::")[1]: schema for schema in schemas if schema.name.startswith(f"{namespace}::")}


def detached(value: Tensor) -> Tensor:
    return value.detach()


def samples() -> dict[str, list[tuple]]:
    """Arguments for each op; floats ask for gradients where the op has them."""

    def draw(*shape: int) -> Tensor:
        return random_tensor(*shape).requires_grad_()

    rows, cu_seqlens = int32(0, 2, 3, 5, -1), offsets((3, 1))
    q, k, v = packed_qkv(5, 2, 4)
    span = (cu_seqlens, cu_seqlens, 3, 3, 0.5)
    attention = (q, k, v, *span)
    out, lse, _ = torch.ops.mtvit_ops.varlen_attention(*attention, None, 0)
    probabilities = torch.ops.mtvit_ops.class_attention(q[:2], k, cu_seqlens, 3, 0.5, None)
    normed = torch.ops.mtvit_ops.gather_layer_norm(random_tensor(6, 8), rows, torch.ones(8), torch.ones(8), 1e-6)
    readout, sums = int32(0, 5), (torch.zeros(6), torch.ones(6), torch.zeros(6))
    gate = (1.0, 0.0, 0.01)
    tails = (
        int32(1, 0),
        draw(1, 3),
        [draw(3, 2, 2, 2), draw(3, 2, 4, 4)],
        [draw(3), draw(3)],
        [draw(5, 3), draw(2, 3)],
    )
    steps = ([2, 4], [0, 0])
    select = (random_tensor(5), rows, cu_seqlens)
    layer = (random_tensor(5, 8), random_tensor(6, 8), random_tensor(6), cu_seqlens)
    return {
        "varlen_attention": [
            (q.requires_grad_(), k, v.requires_grad_(), *span, draw(5, 2), 1),
            (q, k, v, *span, draw(5), 2),
            (*attention, None, 0),
        ],
        "varlen_attention_backward": [
            (random_tensor(5, 2, 4), *(value.detach() for value in (q, k, v, out, lse)), *span, None)
        ],
        "class_attention": [(draw(2, 2, 4), draw(5, 2, 4), cu_seqlens, 3, 0.5, draw(5))],
        "class_attention_backward": [
            (random_tensor(5, 2), probabilities, random_tensor(2, 2, 4), random_tensor(5, 2, 4), cu_seqlens, 3, 0.5)
        ],
        "gather_layer_norm": [(draw(6, 8), rows, draw(8), draw(8), 1e-6), (draw(6, 8), None, draw(8), draw(8), 1e-6)],
        "gather_layer_norm_backward": [(random_tensor(5, 8), random_tensor(6, 8), rows, torch.ones(8), *normed[1:])],
        "gather_rows": [(draw(6, 8), rows)],
        "gather_rows_backward": [(random_tensor(5, 8), rows, 6)],
        "scatter_residual": [(draw(6, 8), rows, draw(5, 8), draw(8)), (draw(6, 8), None, draw(6, 8), None)],
        "scatter_residual_": [(random_tensor(6, 8), rows, random_tensor(5, 8), torch.ones(5, 1))],
        "scatter_residual_backward": [
            (random_tensor(6, 8), rows, random_tensor(5, 8), random_tensor(8)),
            (random_tensor(6, 8), None, random_tensor(6, 8), None),
        ],
        "scatter_residual_layer_norm": [
            (draw(6, 8), rows, draw(5, 8), draw(8), draw(8), 1e-6, draw(8)),
            (draw(6, 8), None, draw(6, 8), draw(8), draw(8), 1e-6, None),
        ],
        "scatter_residual_layer_norm_": [
            (random_tensor(6, 8), rows, random_tensor(5, 8), torch.ones(8), torch.ones(8), 1e-6, torch.ones(5, 1))
        ],
        "slow_fast_merge": [
            (draw(6, 8), draw(5), rows, cu_seqlens, 3, True),
            (draw(6, 8), draw(6), None, cu_seqlens, 3, False),
        ],
        "slow_fast_merge_backward": [
            (random_tensor(2, 8), random_tensor(6, 8), torch.ones(5), rows, cu_seqlens, 3, True)
        ],
        "slow_fast_update": [(draw(6, 8), rows, cu_seqlens, 3, draw(2, 8))],
        "slow_fast_update_backward": [(random_tensor(6, 8), rows, cu_seqlens, 3)],
        "token_select": [
            (*select, None, None, 1, None, 1, False, 2, True, 3, 3),
            (*select, None, int32(2, 1), -1, None, 0, True, 5, False, 0, 5),
            (*select, None, None, -1, 0.5, 0, False, 5, False, 0, 5),
            (None, None, cu_seqlens, torch.ones(5, dtype=torch.bool), None, -1, None, 0, False, 5, True, 5, 5),
        ],
        "halting_step": [
            (draw(6, 4), rows, cu_seqlens, readout, *(s.clone().requires_grad_() for s in sums),
             torch.ones(6, dtype=torch.int32), draw(2, 4), *gate, False),
        ],
        "halting_step_backward": [
            (*(random_tensor(6) for _ in range(3)), random_tensor(2, 4), random_tensor(6), random_tensor(6),
             random_tensor(2, 4), rows, cu_seqlens, readout, *sums[:2], *gate, True),
        ],
        "ragged_linear": [
            (draw(5, 8), draw(6, 8), draw(6), cu_seqlens, True),
            (draw(5, 8), draw(6, 8), None, cu_seqlens, False),
        ],
        "ragged_linear_backward": [(random_tensor(5, 6), *layer, True), (random_tensor(5, 6), *layer, False)],
        "ragged_linear_residual": [
            (draw(6, 6), rows, draw(5, 8), draw(6, 8), draw(6), cu_seqlens, draw(6)),
            (draw(6, 6), None, draw(5, 8), draw(6, 8), None, cu_seqlens, None),
        ],
        "ragged_linear_residual_": [(random_tensor(6, 6), rows, *layer, torch.ones(5, 1))],
        "ragged_patch_embed": [(draw(2, 2, 4, 4), *tails, *steps)],
        "ragged_patch_embed_backward": [
            (random_tensor(10, 3), random_tensor(2, 2, 4, 4), *tree_map(detached, tails), *steps, wants_images)
            for wants_images in (True, False)
        ],
    }  # fmt: skip


SAMPLED = tuple(samples())


def test_every_op_has_a_sample() -> None:
    assert set(SAMPLED) == set(registered(NAMESPACE))


@pytest.mark.parametrize("name", SAMPLED)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.mtvit_ops, name).default, arguments)


def turned(value: Any) -> Any:
    """The same tensor, its memory laid out the other way round."""
    if isinstance(value, list):
        return [turned(entry) for entry in value]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return value
    return value.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("name", [name for name in SAMPLED if not name.endswith("_")])
def test_strides_do_not_show(name: str) -> None:
    """What is promised about a result's layout holds for inputs of any layout."""
    op = getattr(torch.ops.mtvit_ops, name).default
    for arguments in samples()[name]:
        with use_backend("reference"):
            torch.library.opcheck(op, tuple(turned(value) for value in arguments), test_utils="test_faketensor")
            results = op(*(turned(value) for value in arguments))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            for tensor in result if isinstance(result, list) else [result]:
                assert tensor.is_contiguous()


@pytest.mark.parametrize("name", [name for name in SAMPLED if not name.endswith("_")])
def test_autocast_rounds_nothing_inside(name: str) -> None:
    """What an op keeps in float32 stays there, whatever its reference multiplies with."""
    op = getattr(torch.ops.mtvit_ops, name).default
    for arguments in samples()[name]:
        with use_backend("reference"):
            wanted = tree_leaves(op(*arguments))
            with torch.autocast("cpu", torch.bfloat16):
                results = tree_leaves(op(*arguments))
        for result, want in zip(results, wanted, strict=True):
            assert_equal(name, result, want)


NATIVE = {  # backend, namespace, some of its ops
    "cpp": (NATIVE_NAMESPACE, {"varlen_attention", "token_select", "gather_layer_norm", "scatter_residual_"}),
    "cuda": (CUDA_NAMESPACE, {"token_select", "halting_step", "gather_rows"}),
}


@pytest.mark.parametrize(("namespace", "some"), NATIVE.values(), ids=NATIVE)
def test_native_ops_take_the_same_arguments(namespace: str, some: set[str]) -> None:
    """As far as they were built: those for CUDA are there without a GPU, too."""
    ours, native = registered(NAMESPACE), registered(namespace)
    if not native:
        pytest.skip(f"the native extension holds no {namespace}")

    def signature(schema: Any) -> list[tuple]:
        writes = [value.alias_info is not None and value.alias_info.is_write for value in schema.arguments]
        return [(value.name, str(value.type), writes[place]) for place, value in enumerate(schema.arguments)]

    shared = set(ours) & set(native)
    assert shared >= some
    for name in shared:
        # of the public operator's arguments, all but a bound that only Triton needs
        wanted = [
            argument for argument in signature(ours[name]) if name != "token_select" or argument[0] != "max_seqlen"
        ]
        # of the native one's, all but the choice of who multiplies
        got = [argument for argument in signature(native[name]) if argument[0] != "panels"]
        assert got == wanted, name
        assert [str(value.type) for value in native[name].returns] == [str(value.type) for value in ours[name].returns]


def halting(x: Tensor, cumulative: Tensor, remainder: Tensor, ponder: Tensor, output: Tensor) -> tuple[Tensor, ...]:
    state = ops.HaltingState(cumulative, remainder, ponder, torch.ones(6, dtype=torch.int32), output)
    step = ops.halting_step(x, ROWS, OFFSETS, int32(0, 5), state, gate_scale=1.0, gate_center=0.0)
    return (*step.state, step.scores, step.rows, step.cu_seqlens)


def selection(scores: Tensor) -> tuple[Tensor, ...]:
    return tuple(ops.token_select(scores, ROWS, OFFSETS, keep=1, order="score", return_dropped=True))


def step_in_place(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return ops.scatter_residual_(x.clone(), ROWS, y)


def normed_in_place(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x = x.clone()
        return x, ops.scatter_residual_layer_norm_(x, ROWS, y, weight, bias)


def layer_in_place(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return ops.ragged_linear_residual_(x.clone(), ROWS, a, weight, None, OFFSETS)


ROWS, OFFSETS = int32(0, 2, 3, 5, -1), offsets((3, 1))
CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {  # a call, and its tensors' shapes
    "varlen_attention": (
        lambda q, k, v, bias: ops.varlen_attention(q, k, v, OFFSETS, 3, key_bias=bias, scores="mean"),
        {"q": (5, 2, 4), "k": (5, 2, 4), "v": (5, 2, 3), "bias": (5,)},
    ),
    "class_attention": (lambda q, k: ops.class_attention(q, k, OFFSETS, 3), {"q": (2, 2, 4), "k": (5, 2, 4)}),
    "gather_layer_norm": (
        lambda x, weight, bias: ops.gather_layer_norm(x, ROWS, weight, bias),
        {"x": (6, 8), "weight": (8,), "bias": (8,)},
    ),
    "scatter_residual": (
        lambda x, y, scale: ops.scatter_residual(x, ROWS, y, scale),
        {"x": (6, 8), "y": (5, 8), "scale": (8,)},
    ),
    "scatter_residual_": (step_in_place, {"x": (6, 8), "y": (5, 8)}),
    "scatter_residual_layer_norm": (
        lambda x, y, weight, bias, scale: ops.scatter_residual_layer_norm(x, ROWS, y, weight, bias, scale=scale),
        {"x": (6, 8), "y": (5, 8), "weight": (8,), "bias": (8,), "scale": (8,)},
    ),
    "scatter_residual_layer_norm_": (normed_in_place, {"x": (6, 8), "y": (5, 8), "weight": (8,), "bias": (8,)}),
    "slow_fast_merge": (
        lambda x, weights: ops.slow_fast_merge(x, weights, ROWS, OFFSETS, 3),
        {"x": (6, 8), "weights": (5,)},
    ),
    "slow_fast_update": (
        lambda x, increment: ops.slow_fast_update(x, ROWS, OFFSETS, 3, increment),
        {"x": (6, 8), "increment": (2, 8)},
    ),
    "token_select": (selection, {"scores": (5,)}),
    "halting_step": (
        halting,
        {"x": (6, 4), "cumulative": (6,), "remainder": (6,), "ponder": (6,), "output": (2, 4)},
    ),
    "ragged_linear": (
        lambda a, weight, bias: ops.ragged_linear(a, weight, bias, OFFSETS, activation="gelu"),
        {"a": (5, 8), "weight": (6, 8), "bias": (6,)},
    ),
    "ragged_linear_residual": (
        lambda x, a, weight, bias, scale: ops.ragged_linear_residual(x, ROWS, a, weight, bias, OFFSETS, scale),
        {"x": (6, 6), "a": (5, 8), "weight": (6, 8), "bias": (6,), "scale": (6,)},
    ),
    "ragged_linear_residual_": (layer_in_place, {"x": (6, 6), "a": (5, 8), "weight": (6, 8)}),
    "ragged_patch_embed": (
        lambda images, prefix, w0, w1, b0, b1, p0, p1: ops.ragged_patch_embed(
            images, int32(1, 0), prefix, [w0, w1], [b0, b1], [p0, p1], [2, 4], [0, 0]
        ),
        {
            "images": (2, 2, 4, 4),
            "prefix": (1, 3),
            "w0": (3, 2, 2, 2),
            "w1": (3, 2, 4, 4),
            "b0": (3,),
            "b1": (3,),
            "p0": (5, 3),
            "p1": (2, 3),
        },
    ),
}


def block(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Select, read, attend, write: the ops as a model uses them."""
    chosen = ops.token_select(scores, None, offsets((3, 3)), keep=2, num_prefix_tokens=1)
    packed = ops.gather_layer_norm(x, chosen.rows, weight, bias)
    q, k, v = packed.reshape(-1, 1, 2, 4).expand(-1, 3, -1, -1).unbind(1)
    out, seen = ops.varlen_attention(q, k, v, chosen.cu_seqlens, 2, scores="class")
    return ops.scatter_residual(x, chosen.rows, out.flatten(1)), seen


def assert_compiles(
    function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], compiler: str, **close: float
) -> None:
    torch._dynamo.reset()
    inputs = {name: random_tensor(*shape) for name, shape in shapes.items()}
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    outputs, grads = value_and_gradients(compiled, inputs)
    wanted, wanted_grads = value_and_gradients(function, inputs)
    for place, (value, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert value.dtype == want.dtype, place
        torch.testing.assert_close(value, want, **close)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], **close)


def test_every_public_op_is_compiled() -> None:
    assert set(CALLS) == {name for name in ops.__all__ if name.islower()} - {"initial_halting_state"}


@pytest.mark.parametrize(("function", "shapes"), CALLS.values(), ids=CALLS)
def test_compiles_to_one_graph(function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> None:
    assert_compiles(function, shapes, "aot_eager", atol=0.0, rtol=0.0)  # the same kernels


@pytest.mark.parametrize(("function", "shapes"), CALLS.values(), ids=CALLS)
def test_exports(function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """``torch.export`` holds every op as one node of its graph."""

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    tensors = tuple(random_tensor(*shape) for shape in shapes.values())
    program = torch.export.export(Call(), tensors)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    # what runs without gradients is a graph of its own, what writes in place an argument of another node
    assert any(f"{NAMESPACE}." in f"{node.target} {node.args}" for part in parts for node in part.graph.nodes)
    for got, want in zip(tree_leaves(program.module()(*tensors)), tree_leaves(function(*tensors)), strict=True):
        assert_equal("exported", got, want)


def test_inductor_compiles_a_block() -> None:
    shapes = {"x": (6, 8), "scores": (6,), "weight": (8,), "bias": (8,)}
    assert_compiles(block, shapes, "inductor", atol=1e-6, rtol=1e-5)  # the code between the ops is fused anew


def test_changing_counts_do_not_recompile_forever() -> None:
    """Token counts become symbols: five lengths, at most a static and a dynamic graph."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ops.varlen_attention(q, q, q, cu_seqlens, 16)

    compiled = torch.compile(attend, fullgraph=True, backend=graphs)
    for tokens in (5, 7, 8, 11, 16):
        q, cu_seqlens = random_tensor(tokens, 2, 4), offsets((2, tokens - 2))
        assert_equal(f"{tokens} tokens", compiled(q, cu_seqlens), attend(q, cu_seqlens))
    assert graphs.frame_count <= 2
