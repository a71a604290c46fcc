"""A half block as one native operator: the same bits as its single operators, and only where nobody looks between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtvit_ops
from mtvit_ops import _backend, pack_weights
from mtvit_ops._cpu_linear import linear_dtypes, panel_dtypes
from mtvit_ops.methods import AViT, EvoViT, Life
from mtvit_ops.nn import Block, block_run, half_block
from mtvit_ops.nn.block_run import BlockRun
from mtvit_ops.nn.prepared import Prepared
from mtvit_ops.ops.varlen_attention import SCORES
from mtvit_ops.ragged import RaggedTokens
from mtvit_ops.testing import assert_equal, offsets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: rows of x; live rows, None for all; lengths of the images; dead entries behind the live rows
CASES = {
    "all-rows": (12, None, (7, 5), 0),
    "half": (12, (0, 2, 3, 7, 11), (3, 2), 0),
    "dead": (12, (0, 2, 3, 7, 11), (3, 2), 4),
    "empty-image": (12, (0, 2, 3), (0, 3, 0), 0),
    "slack": (12, None, (4, 5), 0),
    "one-token": (1, None, (1,), 0),
    "nobody-alive": (12, (), (0, 0), 3),
}


@pytest.fixture(autouse=True)
def _needs_the_operators() -> Iterator[None]:
    if not mtvit_ops.available_backends()["cpp"].available or half_block._native_halves() is None:
        pytest.skip("there are no native half blocks here")
    if _backend.preferred_backend() not in (None, "cpp"):
        pytest.skip(f"{_backend.preferred_backend()} is asked for")
    with torch.no_grad():
        yield


def make_block(dtype: torch.dtype = torch.float32, packed: bool = False, width: int = 24) -> Block:
    block = Block(width, width // 8).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    if packed:
        pack_weights(block)
    return block.eval()


def make_tokens(case: str = "half", dtype: torch.dtype = torch.float32, width: int = 24) -> RaggedTokens:
    num_rows, live, lengths, dead = CASES[case]
    rows = None if live is None else torch.tensor((*live, *[-1] * dead), dtype=torch.int32)
    return RaggedTokens(torch.randn(num_rows, width).to(dtype), rows, offsets(lengths), 12, 1)


def copied(tokens: RaggedTokens) -> RaggedTokens:
    return tokens._replace(x=tokens.x.clone())


def attends(block: Block, tokens: RaggedTokens) -> bool:
    return half_block.attention_half_(block, copied(tokens), 0) is not None


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_bits(case: str, scores: str | None, dtype: torch.dtype, packed: bool) -> None:
    block, tokens = make_block(dtype, packed), make_tokens(case, dtype)
    whole = copied(tokens)
    attended, expected, _ = block.attend(copied(tokens), scores=scores)
    received = half_block.attention_half_(block, whole, SCORES[scores])
    if dtype not in linear_dtypes():
        assert received is None
        return
    assert received is not None
    close = dict(rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(whole.x, attended.x, **close)  # without rows PyTorch's own LayerNorm serves there
    if tokens.rows is not None:
        assert_equal("x after attention", whole.x, attended.x)
    if scores is not None:
        torch.testing.assert_close(received, expected, rtol=1e-2 if dtype is not torch.float32 else 1e-5, atol=1e-5)
    before = copied(whole)
    fed = block.feed_forward(before)
    assert half_block.feed_forward_half_(block, whole)
    torch.testing.assert_close(whole.x, fed.x, **close)
    if tokens.rows is not None:
        assert_equal("x after the MLP", whole.x, fed.x)


def test_a_model_in_place_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = half_block._native_halves(torch.float32 in panel_dtypes())

    def counted(operators, name: str) -> Callable[..., object]:
        return lambda *args: (calls.append(name), getattr(operators, name)(*args))[1]

    def watched(operators):
        return type(operators)(*(counted(operators, name) for name in operators._fields))

    halves, runs_of_blocks = watched(real), watched(block_run._operators())
    monkeypatch.setattr(half_block, "_native_halves", lambda panels: halves)
    monkeypatch.setattr(block_run, "_operators", lambda: runs_of_blocks)
    images = torch.randn(2, 3, 64, 64)

    def run(name: str, trace: bool = False, **options: object) -> tuple[Tensor, list[str]]:
        torch.manual_seed(0)
        model = mtvit_ops.create_model(name, img_size=64, depth=6, **options).eval()
        calls.clear()
        logits = model(images, return_trace=True)[0] if trace else model(images)
        return logits, calls.copy()

    # runs of blocks between which nothing is asked of the method; blocks with scores alone
    runs = {
        "vit_tiny_patch16_224": ["blocks"],
        "avit_tiny_patch16_224": ["halting_blocks"],
        "evovit_tiny_patch16_224": ["scored_blocks"] * 3,
        "lifevit_tiny_patch16_224": ["blocks"] * 3,
    }
    options: dict[str, dict[str, int]] = {"lifevit_tiny_patch16_224": {"base_block": 2}}
    for name, expected in runs.items():
        logits, called = run(name, **options.get(name, {}))
        assert called == expected, name
        seen, called = run(name, trace=True, **options.get(name, {}))
        assert called == ["block"] * 6, name  # the trace looks at each
        assert_equal(f"logits of {name}", logits, seen)
    logits, _ = run("evovit_tiny_patch16_224")
    # as if it acted between the halves, and somewhere nobody knows
    monkeypatch.setattr(EvoViT, "reads_scores_only", False)
    monkeypatch.setattr(EvoViT, "runs_blocks", False)
    by_halves, called = run("evovit_tiny_patch16_224")
    assert called == ["attention", "feed_forward"] * 6
    assert_equal("logits", logits, by_halves)


@pytest.mark.parametrize("part", ["readout", "classify"])
def test_another_readout_or_classifier_is_called(part: str) -> None:
    model = mtvit_ops.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    holder = model.method if part == "readout" else model
    real = getattr(holder, part)
    setattr(holder, part, lambda *args: 2 * real(*args) if part == "classify" else real(*args).flip(0))
    expected = 2 * before if part == "classify" else before.flip(0)
    torch.testing.assert_close(model(images), expected)


def test_another_encoder_is_called() -> None:
    model = mtvit_ops.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    images, asked = torch.randn(2, 3, 64, 64), []
    before, real = model(images), model.encode
    model.encode = lambda *args: (asked.append(1), real(*args))[1]
    torch.testing.assert_close(model(images), before)
    assert asked == [1]


def test_a_subclass_with_points_of_its_own_is_asked_at_each_block() -> None:
    class Counting(AViT):
        def after_block(self, index, tokens, state):
            asked.append(index)
            return super().after_block(index, tokens, state)

    asked: list[int] = []
    assert AViT.runs_blocks
    assert Life.runs_blocks  # its quiet_until knows
    assert not Counting.runs_blocks
    model = mtvit_ops.create_model("avit_tiny_patch16_224", img_size=64, depth=3).eval()
    images = torch.randn(2, 3, 64, 64)
    other = model.with_method(Counting(model.method.config)).eval()
    assert_equal("logits", other(images), model(images))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_block_is_its_halves(case: str, dtype: torch.dtype, packed: bool) -> None:
    block, tokens = make_block(dtype, packed), make_tokens(case, dtype)
    whole, halves = copied(tokens), copied(tokens)
    assert (block.run_(whole) is not None) == (dtype in linear_dtypes())
    if dtype in linear_dtypes():
        assert half_block.attention_half_(block, halves, 0) is not None
        assert half_block.feed_forward_half_(block, halves)
    assert_equal("x", whole.x, halves.x)


def test_a_block_with_one_watched_half_does_nothing() -> None:
    block, tokens = make_block(), make_tokens()
    block.mlp.fc2.register_forward_hook(lambda *_: None)
    before = tokens.x.clone()
    assert block.run_(tokens) is None
    assert_equal("x", tokens.x, before)


def test_unlisted_rows_are_left_alone() -> None:
    tokens = make_tokens("half")
    before = tokens.x.clone()
    block = make_block()
    assert half_block.attention_half_(block, tokens, 0) is not None
    assert half_block.feed_forward_half_(block, tokens)
    unlisted = [row for row in range(12) if row not in CASES["half"][1]]
    assert_equal("unlisted rows", tokens.x[unlisted], before[unlisted])
    assert not torch.equal(tokens.x, before)


def run_all(blocks: list[Block], tokens: RaggedTokens, prepared: Prepared) -> bool:
    return block_run.blocks_(BlockRun(blocks, prepared), 0, len(blocks), tokens)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class OtherNorm(nn.LayerNorm):
    pass


def hooked(block: Block, layer: nn.Module) -> Block:
    layer.register_forward_hook(lambda *_: None)
    return block


def changed(change) -> Block:
    block = make_block()
    change(block)
    return block


REFUSED = {
    "hook on qkv": lambda: changed(lambda block: hooked(block, block.attn.qkv)),
    "hook on the attention": lambda: changed(lambda block: hooked(block, block.attn)),
    "hook on norm1": lambda: changed(lambda block: hooked(block, block.norm1)),
    "its own forward": lambda: changed(lambda block: setattr(block.attn, "forward", lambda *_: None)),
    "another norm": lambda: changed(lambda block: setattr(block, "norm1", OtherNorm(24))),
    "a norm without weights": lambda: changed(
        lambda block: setattr(block, "norm1", nn.LayerNorm(24, elementwise_affine=False))
    ),
    "another linear": lambda: changed(lambda block: setattr(block.attn, "qkv", nn.Sequential(block.attn.qkv))),
    "another dtype": lambda: changed(lambda block: block.attn.proj.to(torch.bfloat16)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_runs_itself(make) -> None:
    assert not attends(make(), make_tokens())


def test_whoever_watches_sees_single_operators() -> None:
    block, tokens = make_block(), make_tokens()
    assert attends(block, tokens)
    with Watch():
        assert not attends(block, tokens)
    with _backend.use_backend("reference"):
        assert not attends(block, tokens)
    with torch.autocast("cpu"):
        assert not attends(block, tokens)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not attends(block, tokens)
    finally:
        handle.remove()
    with torch.enable_grad():
        assert not attends(block, tokens)


def test_changed_weights_are_seen() -> None:
    block, tokens = make_block(packed=True), make_tokens()
    assert attends(block, tokens)  # has packed by now
    block.attn.qkv.weight.mul_(3)
    plain = copied(tokens)
    expected, *_ = copy.deepcopy(block).attend(plain)
    got, *_ = block.attend(copied(tokens), inplace=True)
    torch.testing.assert_close(got.x, expected.x)


def test_bad_offsets_are_refused_in_words() -> None:
    tokens = make_tokens("half")._replace(cu_seqlens=offsets((3, 9)))
    before = tokens.x.clone()
    with pytest.raises(ValueError, match="attention_half_: cu_seqlens must end at 5 or before, got 12"):
        half_block.attention_half_(make_block(), tokens, 0)
    assert_equal("x after the refusal", tokens.x, before)


# name: a layer of the MLP half that does not fit, and the words
MISFITS = {
    "norm2": (lambda block: setattr(block, "norm2", nn.LayerNorm(20)), r"weight must have shape \(24,\), got \(20,\)"),
    "fc1": (lambda block: setattr(block.mlp, "fc1", nn.Linear(20, 96)), r"\(out_features, 24\), got \(96, 20\)"),
    "fc2": (lambda block: setattr(block.mlp, "fc2", nn.Linear(95, 24)), r"\(out_features, 96\), got \(24, 95\)"),
    "fc2-width": (lambda block: setattr(block.mlp, "fc2", nn.Linear(96, 20)), r"shape \(24, 96\), got \(20, 96\)"),
    "bias": (
        lambda block: setattr(block.mlp.fc2, "bias", nn.Parameter(torch.zeros(20))),
        r"bias must have shape \(24,\), got \(20,\)",
    ),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS)
def test_a_block_refuses_before_it_writes(change, words: str) -> None:
    tokens, block = make_tokens(), changed(change)
    before = tokens.x.clone()
    with pytest.raises(RuntimeError, match=words):
        block.run_(tokens)
    assert_equal("x after the refusal", tokens.x, before)


@pytest.mark.parametrize("which", ["x", "weight of the norm"])
def test_only_weights_of_linear_layers_may_be_packed(which: str) -> None:
    """A packed tensor has no strides to find its rows by."""
    block, x = make_block(), torch.randn(12, 24)
    norm = block.norm2.weight.detach()
    given = (x.to_mkldnn(), norm) if which == "x" else (x, norm.to_mkldnn())
    with pytest.raises(RuntimeError, match="must be a strided tensor"):
        torch.ops.mtvit_ops_cpp.feed_forward_half_(
            *(given[0], None, given[1], block.norm2.bias, 1e-6),
            *(block.mlp.fc1.weight, block.mlp.fc1.bias, block.mlp.fc2.weight, block.mlp.fc2.bias),
        )


def test_a_run_of_blocks_refuses_before_it_writes() -> None:
    blocks, tokens = [make_block(), make_block(), changed(MISFITS["fc2"][0])], make_tokens()
    before = tokens.x.clone()
    with pytest.raises(RuntimeError, match=MISFITS["fc2"][1]):
        run_all(blocks, tokens, Prepared())
    assert_equal("x after the refusal", tokens.x, before)


# how weights lie: as they are; packed layer by layer, since their rows are no whole panels; packed together
LAYOUTS = {"plain": (24, False), "packed": (24, True), "together": (64, True)}


@pytest.mark.parametrize(("width", "packed"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_its_blocks(case: str, dtype: torch.dtype, width: int, packed: bool) -> None:
    blocks, tokens = [make_block(dtype, packed, width) for _ in range(3)], make_tokens(case, dtype, width)
    run, single = copied(tokens), copied(tokens)
    assert run_all(blocks, run, Prepared()) == (dtype in linear_dtypes())
    for block in blocks:
        block.run_(single)
    assert_equal("x", run.x, single.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_packed_together(dtype: torch.dtype) -> None:
    if dtype not in panel_dtypes():
        pytest.skip("our own linear layers do not serve this dtype here")
    blocks, prepared = [make_block(dtype, True, 64) for _ in range(4)], Prepared()
    tokens = make_tokens("half", dtype, 64)
    # some of them, as methods run them
    some, single = copied(tokens), copied(tokens)
    run = BlockRun(blocks, prepared)
    assert block_run.blocks_(run, 0, 1, some)
    assert block_run.blocks_(run, 1, 3, some)
    assert block_run.blocks_(run, 3, 3, some)
    for block in blocks[:3]:
        block.run_(single)
    assert_equal("x", some.x, single.x)
    # what a layer multiplies with lies in the same memory
    (panels, vectors), *_ = run.arguments(tokens.x, 0, 4)
    begin = panels.data_ptr()
    for block in blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.packed_weight(layer.weight).data_ptr() == begin
            begin += layer.weight.numel() * layer.weight.element_size()
    assert begin == panels.data_ptr() + panels.numel() * panels.element_size()
    assert vectors.dtype is torch.float32
    # a weight that changes is packed anew, alone where it is asked for, and with all in a run
    blocks[1].mlp.fc2.weight.mul_(2)
    changed, expected = copied(tokens), copied(tokens)
    for block in blocks:
        block.run_(expected)
    assert run_all(blocks, changed, prepared)
    assert_equal("x after a change", changed.x, expected.x)


@pytest.mark.parametrize("change", ["hook", "eps", "bias"])
def test_nothing_is_packed_for_a_run_that_cannot_be(change: str) -> None:
    blocks, tokens = [make_block(packed=True, width=64) for _ in range(2)], make_tokens(width=64)
    if change == "hook":
        blocks[1].norm2.register_forward_hook(lambda *_: None)
    elif change == "eps":
        blocks[1].norm2.eps = 0.1
    else:
        blocks[1].mlp.fc2.bias = None
    assert not run_all(blocks, tokens, Prepared())
    assert all(layer._packed is None for block in blocks for layer in (block.attn.qkv, block.mlp.fc2))


def test_a_norm_of_another_precision_is_handed_over_as_it_is() -> None:
    block, tokens = make_block(torch.bfloat16, True, 64), make_tokens("half", torch.bfloat16, 64)
    if torch.bfloat16 not in panel_dtypes():
        pytest.skip("our own linear layers do not serve this dtype here")
    block.norm1.double()
    with pytest.raises(RuntimeError, match="weight must be float32 or have x's dtype"):
        run_all([block], tokens, Prepared())


CHANGES = {
    "weight in place": lambda block: block.mlp.fc1.weight.mul_(2),
    "weight moved": lambda block: setattr(block.mlp.fc1.weight, "data", block.mlp.fc1.weight * 2),
    "weight replaced": lambda block: setattr(block.mlp.fc2, "weight", nn.Parameter(block.mlp.fc2.weight * 2)),
    "bias in place": lambda block: block.attn.proj.bias.add_(1),
    "bias replaced": lambda block: setattr(block.attn.qkv, "bias", nn.Parameter(block.attn.qkv.bias + 1)),
    "norm in place": lambda block: block.norm1.weight.mul_(3),
    "layer replaced": lambda block: setattr(block.attn, "qkv", make_block(width=width_of(block)).attn.qkv),
    "part replaced": lambda block: setattr(block, "mlp", make_block(width=width_of(block)).mlp),
    "eps": lambda block: (setattr(block.norm1, "eps", 0.5), setattr(block.norm2, "eps", 0.5)),
    "scale": lambda block: setattr(block.attn, "scale", 0.9),
    "heads": lambda block: setattr(block.attn, "num_heads", 2),
}


def width_of(block: Block) -> int:
    return len(block.norm1.weight)


@pytest.mark.parametrize(("width", "packed"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_kept_follows_changes(change, width: int, packed: bool) -> None:
    block, prepared = make_block(packed=packed, width=width), Prepared()
    assert run_all([block], make_tokens(width=width), prepared)  # is kept by now
    change(block)
    tokens = make_tokens(width=width)
    kept, anew = copied(tokens), copied(tokens)
    assert run_all([block], kept, prepared)
    assert run_all([block], anew, Prepared())
    assert_equal("x", kept.x, anew.x)


@pytest.mark.parametrize("change", ["hook", "forward", "dtype"])
def test_what_is_kept_steps_aside(change: str) -> None:
    block, prepared, tokens = make_block(packed=True), Prepared(), make_tokens()
    assert run_all([block], copied(tokens), prepared)
    if change == "hook":
        block.norm2.register_forward_pre_hook(lambda *_: None)
    elif change == "forward":
        block.attn.forward = lambda *_: None
    else:
        block.to(torch.bfloat16)
    assert not run_all([block], copied(tokens), prepared)


def test_a_model_with_kept_arguments_can_be_copied_and_stored(tmp_path) -> None:
    model = pack_weights(mtvit_ops.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval())
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    assert model._prepared._kept
    twin = copy.deepcopy(model)
    assert not twin._prepared._kept
    assert_equal("logits of the copy", twin(images), expected)
    model.blocks[0].mlp.fc1.weight.mul_(2)
    assert_equal("logits of the copy after a change", twin(images), expected)
    torch.save(twin, tmp_path / "model.pt")
    assert_equal("logits of the file", torch.load(tmp_path / "model.pt", weights_only=False)(images), expected)


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        block, prepared, tokens = make_block(), Prepared(), make_tokens()
        assert run_all([block], copied(tokens), prepared)
        block.mlp.fc1.weight.mul_(2)  # no version tells
        kept, anew = copied(tokens), copied(tokens)
        run_all([block], kept, prepared)
        run_all([block], anew, Prepared())
    assert_equal("x", kept.x, anew.x)
