"""Weights from files: every layout that is read, and every file that is refused."""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import TINY, assert_rounding, build, lively, make_images
from torch import Tensor
from torch.nn import functional as F

from mtvit_ops import VisionTransformer, create_model, load_checkpoint
from mtvit_ops.methods._tail_init import resize_kernel, resize_pos_embed
from mtvit_ops.testing import assert_equal

DEPTH = TINY["depth"]
State = dict[str, Tensor]
OPTIONS: dict[str, dict[str, Any]] = {"lifevit": {"base_block": 3}, "mtvit": {"predictor_size": 32}}


def target(method: str, seed: int = 9) -> VisionTransformer:
    """A model to load into, with other weights than those of the file."""
    return build(method, seed=seed, **OPTIONS.get(method, {}))


def dense_state() -> State:
    return build("vit").state_dict()


# the authors' layouts, written from ours


def evo_layout(state: State) -> State:
    """A DeiT trunk taken apart: q and k, v, the first norm and the projection in lists of their own."""
    out: State = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            out[name] = value
        elif name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            out[f"qks.{parts[1]}.qk.{parts[-1]}"] = value[: 2 * len(value) // 3]
            out[f"vs.{parts[1]}.v.{parts[-1]}"] = value[2 * len(value) // 3 :]
        elif parts[2] == "norm1":
            out[f"norms.{parts[1]}.{parts[-1]}"] = value
        elif name.endswith(("attn.proj.weight", "attn.proj.bias")):
            out[f"projs.{parts[1]}.{parts[-1]}"] = value
        else:
            out[name] = value
    return out


EVO_TRAINING_HEAD = {"head_cls.weight", "head_cls.bias", "norm_cls.weight", "norm_cls.bias"}


def evo_training_layout(state: State) -> State:
    """With the class token's head, which only training uses."""
    extra = {"head_cls": (10, 32), "norm_cls": (32,)}
    out = evo_layout(state)
    for name, shape in extra.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return out


def life_layout(state: State, base: int = 3) -> State:
    """The backbone under ``model.``, its blocks again as head and tail, the matrix with a leading dimension."""
    weight = state["method.weight"]
    out = {f"model.{name}": value for name, value in state.items() if name != "method.weight"}
    for name, value in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            place = f"head_blocks.{number}" if int(number) < base else f"tail_blocks.{int(number) - base}"
            out[f"blocks.{place}.{rest}"] = value
    out["blocks.patch_life_predictor.W"] = weight[None]
    out["blocks.plugin_norm_layer.weight"], out["blocks.plugin_norm_layer.bias"] = torch.ones(32), torch.zeros(32)
    return out


# how a state dict may be wrapped in a file
WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "authors": lambda state: {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 99,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=5e-4, model="deit_tiny", output_dir=None, gates=[10, 30]),
    },
    "data-parallel": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("method", ["vit", "avit", "evovit"])
def test_timms_layout(method: str, wrapping: str, tmp_path: Path) -> None:
    state, model = dense_state(), target(method)
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pth")
    report = load_checkpoint(model, tmp_path / "weights.pth")
    assert report == ("timm", (), (), {})
    for name, value in model.state_dict().items():
        assert_equal(name, value, state[name])


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state, model = dense_state(), target("vit")
    safetensors.save_file(state, tmp_path / "weights.safetensors")
    assert load_checkpoint(model, str(tmp_path / "weights.safetensors")).layout == "timm"
    assert_equal("logits", model(make_images(2)), build("vit")(make_images(2)))
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a checkpoint"):
        load_checkpoint(model, tmp_path / "broken.safetensors")


def test_a_state_dict_and_create_model() -> None:
    state = dense_state()
    model = create_model("vit_tiny_patch16_224", checkpoint=state, **TINY).eval()
    assert_equal("logits", model(make_images(2)), build("vit")(make_images(2)))
    with torch.no_grad():
        model.head.weight.zero_()
    assert bool((state["head.weight"] != 0).any()), "the model must not share memory with the caller's tensors"


@pytest.mark.parametrize("layout", [evo_layout, evo_training_layout])
@pytest.mark.parametrize("method", ["evovit", "vit"])
def test_evo_vits_layout(method: str, layout: Callable[[State], State], tmp_path: Path) -> None:
    state, model = dense_state(), target(method)
    torch.save({"model": layout(state), "args": argparse.Namespace()}, tmp_path / "evo.pth")
    report = load_checkpoint(model, tmp_path / "evo.pth")
    assert report.layout == "Evo-ViT"
    training = layout is evo_training_layout
    assert set(report.ignored) == (EVO_TRAINING_HEAD if training else set())
    for name, value in model.state_dict().items():
        assert_equal(name, value, state[name])


@pytest.mark.parametrize("aliases", ["both", "head-and-tail-only", "flat-matrix"])
def test_life_regressions_layout(aliases: str, tmp_path: Path) -> None:
    source, model = build("lifevit", **OPTIONS["lifevit"]), target("lifevit")
    state = life_layout(source.state_dict())
    if aliases == "head-and-tail-only":
        state = {name: value for name, value in state.items() if not name.startswith("model.blocks.")}
    if aliases == "flat-matrix":
        state["blocks.patch_life_predictor.W"] = state["blocks.patch_life_predictor.W"][0]
    torch.save({"state_dict": state}, tmp_path / "life.ckpt")
    report = load_checkpoint(model, tmp_path / "life.ckpt")
    assert report.layout == "Life Regression"
    assert sorted(report.ignored) == ["blocks.plugin_norm_layer.bias", "blocks.plugin_norm_layer.weight"]
    for name, value in model.state_dict().items():
        assert_equal(name, value, source.state_dict()[name])


def test_life_regression_with_a_trained_norm_is_refused() -> None:
    state = life_layout(build("lifevit", **OPTIONS["lifevit"]).state_dict())
    state["blocks.plugin_norm_layer.weight"][3] = 1.5
    with pytest.raises(ValueError, match=r"plugin_norm_layer\.weight must be all 1"):
        load_checkpoint(target("lifevit"), state)


# file name, arguments, gates: names are read only where no argument says otherwise
GATES = {
    "tiny": ("tiny-10-30.pth", {}, (10.0, 30.0)),
    "small": ("small-10-75.pth", {}, (10.0, 75.0)),
    "fractional": ("avit-2.5-7.25.pth", {}, (2.5, 7.25)),
    "arguments": ("weights.pth", {"gate_scale": 5, "gate_center": 50.0}, (5.0, 50.0)),
    "arguments-win": ("tiny-10-30.pth", {"gate_scale": 5.0, "gate_center": 10.0}, (5.0, 10.0)),
    "one-argument": ("tiny-10-30.pth", {"gate_center": 12.0}, (10.0, 12.0)),
    "none": ("visualization-tiny.pth", {}, (4.0, 9.0)),
    "one-number": ("tiny-10.pth", {}, (4.0, 9.0)),
}


@pytest.mark.parametrize("case", GATES)
def test_a_vits_gates(case: str, tmp_path: Path) -> None:
    name, arguments, gates = GATES[case]
    torch.save({"model": dense_state()}, tmp_path / name)
    model = build("avit", gate_scale=4.0, gate_center=9.0)
    report = load_checkpoint(model, tmp_path / name, **arguments)
    config = model.method.config
    assert (config.gate_scale, config.gate_center) == gates
    assert report.settings == ({} if gates == (4.0, 9.0) else {"gate_scale": gates[0], "gate_center": gates[1]})
    assert config.eps == 0.01


def test_a_name_like_a_gate_means_nothing_to_other_models(tmp_path: Path) -> None:
    torch.save(dense_state(), tmp_path / "tiny-10-30.pth")
    assert load_checkpoint(target("vit"), tmp_path / "tiny-10-30.pth").settings == {}
    with pytest.raises(TypeError, match="gate_scale and gate_center are for A-ViT, got a EvoViT model"):
        load_checkpoint(target("evovit"), tmp_path / "tiny-10-30.pth", gate_scale=10.0)


class Bomb:
    """Unpickled with code allowed, this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def save_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def whole_file(path: Path) -> bytes:
    torch.save(dense_state(), path)
    return path.read_bytes()


# how to write a file that is no checkpoint, and what is said of it
NO_CHECKPOINT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: save_bytes(path, whole_file(path)[:2000]), "is not a checkpoint"),
    "half": (lambda path: save_bytes(path, whole_file(path)[:-500]), "is not a checkpoint"),
    "empty": (lambda path: save_bytes(path, b""), "is not a checkpoint"),
    "text": (lambda path: save_bytes(path, b"these are no weights\n" * 30), "is not a checkpoint"),
    "image": (
        lambda path: save_bytes(path, b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))),
        "is not a checkpoint",
    ),
    "plain-pickle": (lambda path: save_bytes(path, pickle.dumps({"a": [1, 2]})), "is not a checkpoint"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "it holds Tensor, not a state dict"),
    "list": (lambda path: torch.save([torch.ones(3)], path), "it holds list, not a state dict"),
    "empty-dict": (lambda path: torch.save({}, path), "is not a checkpoint"),
    "no-tensors": (lambda path: torch.save({"epoch": 3}, path), "its entry 'epoch' is a int, not a tensor"),
    "code": (lambda path: torch.save({"model": Bomb(path.with_suffix(".bang"))}, path), "is not a checkpoint"),
    "code-in-plain-pickle": (
        lambda path: save_bytes(path, pickle.dumps(Bomb(path.with_suffix(".bang")))),
        "is not a checkpoint",
    ),
}


def bits(model: VisionTransformer) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: VisionTransformer, before: State) -> None:
    for name, value in model.state_dict().items():
        assert_equal(name, value, before[name])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # the loader's word on files that it did not write
@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_files_that_are_no_checkpoint(case: str, tmp_path: Path) -> None:
    write, match = NO_CHECKPOINT[case]
    path, model = tmp_path / "file-10-30.pth", target("avit")
    write(path)
    before, config = bits(model), model.method.config
    with pytest.raises(ValueError, match=match) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)
    assert model.method.config == config
    assert not path.with_suffix(".bang").exists(), "code from the file has run"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(target("vit"), tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(target("vit"), tmp_path / "nowhere.safetensors")


def changed(**changes: Tensor | None) -> State:
    """The dense state with entries replaced, added or (None) removed; ``__`` stands for a dot."""
    state = dense_state()
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


# a state dict that does not fit, and all that must be named
UNFIT: dict[str, tuple[Callable[[], State], list[str]]] = {
    "missing": (lambda: changed(norm__weight=None, head__bias=None), [r"missing norm.weight \(and 1 more\)"]),
    "unexpected": (lambda: changed(dist_token=torch.zeros(1)), [r"unexpected dist_token \(and 0 more\)"]),
    "mis-shaped": (
        lambda: changed(head__weight=torch.zeros(1000, 32), head__bias=torch.zeros(1000)),
        [r"mis-shaped head.weight, expected \(10, 32\), got \(1000, 32\) \(and 1 more\)"],
    ),
    "everything": (
        lambda: changed(cls_token=None, extra=torch.zeros(2), norm__bias=torch.zeros(5)),
        ["missing cls_token", "unexpected extra", r"mis-shaped norm.bias, expected \(32,\), got \(5,\)"],
    ),
    "position-grid": (
        lambda: changed(pos_embed=torch.zeros(1, 26, 32)),
        [r"mis-shaped pos_embed, expected \(1, 17, 32\), got \(1, 26, 32\)"],
    ),
    "another-depth": (
        lambda: build("vit", depth=DEPTH + 1).state_dict(),
        [rf"unexpected blocks.{DEPTH}.norm1.weight \(and 11 more\)"],
    ),
    "half-of-evo": (
        lambda: {name: value for name, value in evo_layout(dense_state()).items() if name != "vs.2.v.weight"},
        ["missing blocks.2.attn.qkv.weight"],
    ),
}


@pytest.mark.parametrize("method", ["vit", "avit", "mtvit"])
@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_does_not_fit(case: str, method: str) -> None:
    make, matches = UNFIT[case]
    model, state = target(method), make()
    before = bits(model)
    for match in matches:
        with pytest.raises(ValueError, match=match):
            load_checkpoint(model, state)
    assert_untouched(model, before)


def test_bad_entries_of_a_state_dict() -> None:
    hollow, sparse = torch.ones(2, device="meta"), torch.ones(2).to_sparse()
    odd = [{"head.weight": value} for value in ([1.0], hollow, sparse, torch.ones(2) + 0j)]
    for state in ({3: torch.ones(2)}, {}, *odd):
        with pytest.raises(ValueError, match="source is not a checkpoint"):
            load_checkpoint(target("vit"), state)


@pytest.mark.parametrize("gate", [math.nan, 1e10, "30"])
def test_a_gate_that_is_none_leaves_the_model(gate: Any) -> None:
    model = target("avit")
    before = bits(model)
    with pytest.raises((ValueError, TypeError), match="gate_center must be"):
        load_checkpoint(model, dense_state(), gate_center=gate)
    assert_untouched(model, before)


@pytest.mark.parametrize("shape", [(1, 8, 32), (2, 17, 32)], ids=["no-square", "two"])
def test_positions_that_cannot_be_resized(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pos_embed must have shape"):
        load_checkpoint(target("vit"), dense_state() | {"pos_embed": torch.ones(shape)}, resize_positions=True)


# dense weights into the methods


def test_dense_weights_into_a_life_model() -> None:
    model = target("lifevit")
    own = model.method.weight.detach().clone()
    report = load_checkpoint(model, dense_state())
    assert report.untrained == ("method.weight",)
    assert_equal("its own matrix stays", model.method.weight.detach(), own)
    assert_equal("backbone", model.head.weight.detach(), dense_state()["head.weight"])


def test_dense_weights_into_a_mt_vit_give_its_tails() -> None:
    model, state = target("mtvit"), dense_state()
    report = load_checkpoint(model, state)
    assert all(name.startswith("method.") for name in report.untrained)
    assert {"method.projections.0.weight", "method.pos_embeds.1"} <= set(report.untrained)
    method, proj = model.method, state["patch_embed.proj.weight"]
    for tail, (grid, (kernel, _)) in enumerate(zip(method.config.grids[:-1], method.geometry, strict=False)):
        assert_rounding(method.projections[tail].weight.detach(), resize_kernel(proj, kernel))
        assert_equal("bias", method.projections[tail].bias.detach(), state["patch_embed.proj.bias"])
        assert_rounding(method.pos_embeds[tail].detach(), resize_pos_embed(state["pos_embed"], grid))
        assert_equal("class row", method.pos_embeds[tail].detach()[:, 0], state["pos_embed"][:, 0])


def test_a_mt_vits_own_file_keeps_its_tails(tmp_path: Path) -> None:
    source, model = build("mtvit", **OPTIONS["mtvit"]), target("mtvit")
    torch.save({"model": source.state_dict()}, tmp_path / "mtvit.pth")
    assert load_checkpoint(model, tmp_path / "mtvit.pth") == ("timm", (), (), {})
    for name, value in source.state_dict().items():
        assert_equal(name, model.state_dict()[name], value)


@pytest.mark.parametrize("size", [16, 20, 23, 32])
def test_a_resized_kernel_answers_an_enlarged_patch_as_the_kernel_the_patch(size: int) -> None:
    weight, patch = torch.randn(7, 3, 16, 16), torch.randn(5, 3, 16, 16)
    large = F.interpolate(patch.double(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    want = torch.einsum("bchw,dchw->bd", patch.double(), weight.double())
    got = torch.einsum("bchw,dchw->bd", large, resize_kernel(weight, size).double())
    # the kernel is rounded to float32: 768 products of size 1, and the inverse enlarges them less than tenfold
    allowed = 10 * 768**0.5 * torch.finfo(torch.float32).eps * weight.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=allowed)


def test_resized_positions() -> None:
    table = torch.randn(1, 1 + 16, 8)
    assert_equal("same grid", resize_pos_embed(table, 4), table)
    for grid in (2, 3, 7):
        resized = resize_pos_embed(table, grid)
        assert resized.shape == (1, 1 + grid**2, 8)
        assert_equal("prefix", resized[:, 0], table[:, 0])
    # weights of a bicubic filter add up to 1
    flat = torch.cat((torch.zeros(1, 1, 8), torch.full((1, 16, 8), 0.7)), dim=1)
    torch.testing.assert_close(resize_pos_embed(flat, 7)[:, 1:], torch.full((1, 49, 8), 0.7))


def test_positions_of_another_grid_are_resized_on_request() -> None:
    state = lively(create_model("vit_tiny_patch16_224", **(TINY | {"img_size": 80}))).state_dict()
    model = target("vit")
    load_checkpoint(model, state, resize_positions=True)
    assert_rounding(model.pos_embed.detach(), resize_pos_embed(state["pos_embed"], 4))
    assert state["pos_embed"].shape == (1, 26, 32), "the caller's table must stay"


def test_gates_asked_for_win_over_those_in_the_name(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
    file = tmp_path / "deit-16-224.pth"
    torch.save(create_model("avit_tiny_patch16_224", **sizes).state_dict(), file)
    asked = create_model("avit_tiny_patch16_224", **sizes, gate_scale=5.0, gate_center=75.0, checkpoint=file)
    assert (asked.method.config.gate_scale, asked.method.config.gate_center) == (5.0, 75.0)
    named = create_model("avit_tiny_patch16_224", **sizes, checkpoint=file)
    assert (named.method.config.gate_scale, named.method.config.gate_center) == (16.0, 224.0)


def test_trained_tails_survive_a_file_without_predictor() -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3, "grids": (2, 3, 4)}
    source, model = (create_model("mtvit_tiny_patch16_224", **sizes) for _ in range(2))
    with torch.no_grad():
        source.method.projections[0].weight.fill_(7.0)
    state = {name: value for name, value in source.state_dict().items() if "predictor" not in name}
    report = load_checkpoint(model, state)
    assert all("predictor" in name for name in report.untrained)
    assert bool((model.method.projections[0].weight == 7.0).all())


@pytest.mark.parametrize(
    ("grids", "same"),
    [((3, 4), {0: 1}), ((2, 4), {0: 0}), ((1, 3, 4), {1: 1}), ((1, 2, 3, 4), {1: 0, 2: 1})],
    ids=str,
)
def test_tails_of_a_mt_vit_with_other_grids_are_taken_by_grid(grids: tuple[int, ...], same: dict[int, int]) -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
    source = lively(create_model("mtvit_tiny_patch16_224", **sizes, grids=(2, 3, 4)))
    model = create_model("mtvit_tiny_patch16_224", **sizes, grids=grids)
    predictor = {name: value.clone() for name, value in model.method.predictor.state_dict().items()}
    state = source.state_dict()
    report = load_checkpoint(model, state)
    for place, index in same.items():
        for name in ("projections.{}.weight", "projections.{}.bias", "pos_embeds.{}"):
            got, want = (f"method.{name}".format(tail) for tail in (place, index))
            assert_equal(name, model.state_dict()[got], state[want])
    for tail in set(range(len(grids) - 1)) - set(same):  # derived, as from a plain backbone
        want = resize_kernel(state["patch_embed.proj.weight"], model.method.geometry[tail][0])
        assert_rounding(model.method.projections[tail].weight.detach(), want)
        assert f"method.pos_embeds.{tail}" in report.untrained
    for name, value in predictor.items():  # the file's chose among others
        assert_equal(name, model.method.predictor.state_dict()[name], value)
        assert f"method.predictor.{name}" in report.ignored
    left = {f"method.pos_embeds.{index}" for index in {0, 1} - set(same.values())}
    assert left <= set(report.ignored)
    assert_equal("backbone", model.blocks[1].mlp.fc1.weight.detach(), state["blocks.1.mlp.fc1.weight"])


def test_a_mt_vit_without_a_common_grid_is_refused() -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
    source = create_model("mtvit_tiny_patch16_224", **sizes, grids=(2, 4))
    with pytest.raises(ValueError, match=r"does not fit the model: mis-shaped method\.projections\.0\.weight"):
        load_checkpoint(create_model("mtvit_tiny_patch16_224", **sizes, grids=(3, 4)), source.state_dict())


@pytest.mark.parametrize(("width", "head"), [(2, False), (2, True), (1, False)])
def test_another_predictor_begins_anew(width: int, head: bool) -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3, "grids": (2, 4)}
    source = lively(create_model("mtvit_tiny_patch16_224", **sizes, class_head=True))
    model = create_model("mtvit_tiny_patch16_224", **sizes, predictor_width=width, class_head=head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_checkpoint(model, source.state_dict())
    for name, value in model.state_dict().items():
        other = name.startswith("method.predictor.")
        assert_equal(name, value, before[name] if other else source.state_dict()[name])
        assert (name in report.untrained) == other
    theirs = {name for name in source.state_dict() if name.startswith("method.predictor.")}
    assert {"method.predictor.head_cls.weight", "method.predictor.head.weight"} < theirs
    assert set(report.ignored) == theirs
