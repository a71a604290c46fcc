"""Evo-ViT on LeViT: recorded runs, the method as the paper tells it, and what the specification promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases, load
from levit_cases import SIZES, build_levit, by_sorting, from_case
from torch import Tensor, nn

from mtvit_ops import calibrate, capture, count_macs, create_model, list_models, load_checkpoint, pack_weights
from mtvit_ops.methods import EvoLeViT, EvoLeViTConfig
from mtvit_ops.models import create_vit
from mtvit_ops.nn import (
    LeViT,
    LeViTConfig,
    VisionTransformer,
    ViTConfig,
    checkpointed_twin,
    drop_path_twin,
    fold_norms,
    masked_twin,
)
from mtvit_ops.testing import assert_close_to_float64, assert_equal

RECORDED = 5e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "stage": {},
    "layer": {"mode": "layer"},
    "stage, fixed": {"learn_tradeoff": False},
    "layer, learned": {"mode": "layer", "learn_tradeoff": True},
    "ratios of stages": {"stage_keep_ratios": (0.9, 0.3, 0.2)},
    "ratios of layers": {"mode": "layer", "keep_ratios": (1.0, 0.9, 0.4, 1.0, 0.25, 0.5, 1.0)},
    "one waits": {"stage_keep_ratios": (0.99, 0.95, 0.8)},
    "no patch goes on": {"stage_keep_ratios": (0.01, 0.01, 0.01)},
    "nothing waits": {"keep_ratios": 1.0},
    "two stages, one head": {"embed_dim": (16, 24), "num_heads": (2, 3), "depth": (2, 3), "distillation": False},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def images(batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 112, 112, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", cases("evo_levit_eval"))
def test_recorded_runs(name: str, golden: Path, backend: str, device: str) -> None:
    # E16
    case = load(golden, name)
    model = from_case(case, distillation="head_dist.l.weight" in case.weights)
    report = load_checkpoint(model, case.weights)
    assert (report.layout, report.untrained) == ("Evo-LeViT", ())
    assert report.ignored
    assert all(key.startswith(("head_cls.", "head_cls_dist.")) for key in report.ignored)
    model, want = model.eval().to(device), case.tensors
    with torch.no_grad():
        logits, trace = model(want["image"].to(device), return_trace=True)
    torch.testing.assert_close(logits.cpu(), want["logits"], rtol=0, atol=RECORDED)
    assert trace.tokens_per_block[:, 0].tolist() == want["attention_token_counts"].abs().tolist()
    # their states lie in the order of the last selection, ours on the grid
    scores = trace.extras["score"].T.cpu().split([49] * 3 + [16] * 3 + [4] * 3, dim=1)
    for theirs, (ours, selected) in {4: (2, 24), 5: (3, None), 7: (5, 8), 8: (6, None), 10: (8, 2)}.items():
        order = want[f"stage{theirs}/ori_indices"]
        recorded = want[f"stage{theirs}/global_attn"].gather(1, order.argsort(dim=1))
        if theirs < 9:  # they score no more behind the last selection
            torch.testing.assert_close(scores[ours], recorded, rtol=0, atol=1e-5)
        for image, kept in enumerate(order[:, :selected].sort(dim=1).values.long()):
            if selected is not None:
                assert trace.kept(ours, image).tolist() == [0, *(1 + kept).tolist()]


@EVERY_VARIANT
def test_as_the_paper_tells_it(variant: str, backend: str) -> None:
    model = build_levit(**VARIANTS[variant]).double()
    x = images().double()
    with torch.no_grad():
        tokens, _ = by_sorting(model, x)
        logits, trace = model(x, return_trace=True)
        assert_equal("logits", model(x), logits)
    torch.testing.assert_close(logits, model.classify(tokens), rtol=1e-9, atol=1e-9)
    assert trace.tokens_per_block.shape == (len(model.blocks), 3)


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(variant: str, dtype: torch.dtype) -> None:
    # rounding to half dtypes turns choices, and then it is another model: there nothing is selected
    model = build_levit(
        **VARIANTS[variant] | ({} if dtype == torch.float32 else {"keep_ratios": 1.0, "stage_keep_ratios": None})
    )
    x = images()
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        got = model.to(dtype)(x.to(dtype))
        plain = model.classify(by_sorting(model, x.to(dtype))[0])
    assert got.dtype == dtype
    assert_close_to_float64("logits", got, exact, plain)


def test_parameters_and_operations() -> None:
    # E14, E15
    sizes = {
        "128s": (7_835_115, 8_606_651, 0.256, 7_956_715, 0.825),
        "128": (9_269_486, 10_041_022, 0.305, 9_391_086, 0.984),
        "192": (11_031_990, 11_803_526, 0.510, 11_205_270, 1.654),
        "256": (19_007_230, 20_035_278, 0.880, 19_238_270, 2.763),
        "384": (39_295_758, 40_836_830, 1.849, 39_636_238, 5.622),
    }
    with torch.device("meta"):
        for size, (small, training, _, large, _) in sizes.items():
            for name, options, wanted in (
                (f"evolevit_{size}_224", {}, small),
                (f"evolevit_{size}_224", {"class_head": True}, training),
                (f"evolevit_{size}_384", {}, large),
            ):
                assert name in list_models()
                model = create_model(name, **options)
                assert sum(parameter.numel() for parameter in model.parameters()) == wanted, name
    for size, side, place in (("128s", 224, 2), ("192", 224, 2), ("128s", 384, 4)):
        model = create_model(f"evolevit_{size}_{side}").eval()
        macs = count_macs(model, torch.zeros(1, 3, side, side))
        assert round(macs.per_image / 1e9, 3) == sizes[size][place]
        stem = sum(part.c.weight.numel() * (side >> 1 + i) ** 2 for i, part in enumerate(model.patch_embed[::2]))
        heads = 2 * 1000 * model.config.embed_dim[-1]
        assert macs.per_image == pytest.approx(stem + heads + sum(macs.per_block))


def test_token_counts() -> None:
    # E1
    model = create_model("evolevit_256_224").eval()
    with torch.inference_mode():
        _, trace = model(torch.zeros(1, 3, 224, 224), return_trace=True)
    assert trace.tokens_per_block[:, 0].tolist() == [197, 197, 100, 100, 197, 26, 26, 26, 26, 50, 10, 10, 10, 10]


def test_who_waits_gains_what_its_representative_gains() -> None:
    # E9
    model, seen = build_levit(), {}
    method = model.method
    run = method._slow_fast

    def spy(model: LeViT, group: Any, x: Tensor, score: Tensor, record: Any) -> tuple[Tensor, Tensor]:
        after, evolved = run(model, group, x, score, record)
        seen[group.blocks] = (x, score, after, group.keep)
        return after, evolved

    method._slow_fast = spy
    with torch.no_grad():
        _, trace = model(images(), return_trace=True)
    assert len(seen) == 3
    for blocks, (before, score, after, keep) in seen.items():
        gained = (after - before)[:, 1:]
        for image in range(3):
            wait = score[image, 1:].argsort(descending=True, stable=True)[keep:]
            waiting = gained[image, wait]
            torch.testing.assert_close(waiting, waiting[:1].expand_as(waiting), rtol=0, atol=2e-5)
            assert waiting.abs().max() > 0.01
        if blocks[0] == 2:  # the first stage's places are the trace's
            kept = set(trace.kept(2, 0).tolist())
            best = score[0, 1:].topk(keep).indices + 1
            assert kept == {0, *best.tolist()}


def test_scores_keep_their_sum_where_patches_are_subsampled() -> None:
    # E10
    model, sums = build_levit(), []
    run = model.method._subsample

    def spy(*args: Any) -> tuple[Tensor, Tensor | None]:
        x, score = run(*args)
        sums.append((args[3][:, 1:].sum(dim=1), score[:, 1:].sum(dim=1), score.shape[1]))
        return x, score

    model.method._subsample = spy
    with torch.no_grad():
        _, trace = model(images(), return_trace=True)
    for before, after, _ in sums:
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    assert [length for _, _, length in sums] == [17, 5]
    # patches keep the numbers of the first grid, 7 x 7
    every = [7 * row + column for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)]
    assert trace.kept(6, 1).tolist() == [0, *(1 + place for place in every)]
    assert set(trace.kept(4, 2).tolist()) <= {0, *(1 + place for place in every)}
    assert set(trace.kept(8, 0).tolist()) <= {0, 1, 5, 29, 33}


def test_without_waiting_tokens_trade_offs_do_not_matter() -> None:
    # E11
    model = build_levit(keep_ratios=1.0)
    with torch.no_grad():
        logits, trace = model(images(), return_trace=True)
        model.method.tradeoffs.normal_()
        assert_equal("logits", model(images()), logits)
    assert trace.tokens_per_block[:, 0].tolist() == [50, 50, 50, 50, 17, 17, 17, 5, 5]


def test_norms_go_into_their_neighbours() -> None:
    # E13
    model, x = build_levit(), images()
    with torch.inference_mode():
        wanted = model(x)
        assert fold_norms(model) is model
        assert not any(isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) for part in model.modules())
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-3)
        folded = model(x)
        assert_equal("logits", fold_norms(model)(x), folded)
        pack_weights(model)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="model must be in evaluation mode, got one in training mode"):
        fold_norms(build_levit().train())
    with pytest.raises(TypeError, match="model must be a LeViT, got Linear"):
        fold_norms(nn.Linear(1, 1))


@EVERY_VARIANT
def test_images_do_not_meet(variant: str) -> None:
    # E17
    model, x = build_levit(**VARIANTS[variant]), images(4)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_nothing_waits_for_the_device(mode: str) -> None:
    """Where tensors hold no values, none can be read."""
    model = build_levit(mode=mode).to("meta")
    x = images().to("meta")
    with torch.no_grad():
        assert model(x).shape == (3, 10)
    model.train()(x).sum().backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if name != "method.tradeoffs")


def test_no_images() -> None:
    with torch.inference_mode():
        logits, trace = build_levit()(images(0), return_trace=True)
    assert logits.shape == (0, 10)
    assert trace.tokens_per_block.shape == (9, 0)


def test_ours_again() -> None:
    source = build_levit(class_head=True)
    target = create_model("evolevit_128s_224", **SIZES, checkpoint=source.state_dict()).eval()
    with torch.inference_mode():
        assert_equal("logits", target(images()), source(images()))


def test_position_tables_are_resized() -> None:
    source = build_levit()
    model = create_model("evolevit_128s_224", **SIZES | {"img_size": 160})
    with pytest.raises(ValueError, match=r"mis-shaped .*pos_embed"):
        load_checkpoint(model, source.state_dict())
    load_checkpoint(model, source.state_dict(), resize_positions=True)
    assert model.pos_embed.shape == (1, 101, 32)
    assert_equal("class", model.pos_embed[:, 0].detach(), source.pos_embed[:, 0].detach())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "stages": ({"depth": (1, 2)}, ValueError, "depth must have one entry for each of the 3 stages of embed_dim, got 2"),
    "width": ({"embed_dim": (36, 48, 64)}, ValueError, "embed_dim must begin with a multiple of 8, got 36"),
    "heads": ({"embed_dim": (32, 44, 64)}, ValueError, "embed_dim must be multiples of key_dim 8, got 44"),
    "sequence": ({"embed_dim": 32}, TypeError, "embed_dim must be a tuple, got int"),
    "drop": ({"drop_path": 1.0}, ValueError, "drop_path must be below 1"),
    "layers": (
        {"keep_ratios": (1.0, 0.5)},
        ValueError,
        "keep_ratios must have one entry for each of the 7 layers, got 2",
    ),
    "first": ({"keep_ratios": (0.5,) * 7}, ValueError, r"keep_ratios must begin with 1, .*, got 0\.5"),
    "range": ({"keep_ratios": 0.0}, ValueError, "keep_ratios must be in"),
    "agree": (
        {"keep_ratios": (1.0, 0.5, 0.4, 0.5, 0.5, 0.5, 0.5)},
        ValueError,
        "keep_ratios must agree within stage 0 without stage_keep_ratios",
    ),
    "last": (
        {"keep_ratios": (1.0, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5)},
        ValueError,
        "keep_ratios must be 1 in the first layers of a stage alone, .* in stage 0",
    ),
    "stage ratios": (
        {"stage_keep_ratios": (0.5,)},
        ValueError,
        "stage_keep_ratios must have one entry for each of the 3",
    ),
    "stage ratio": ({"stage_keep_ratios": 0.5}, TypeError, "stage_keep_ratios must be a tuple or None, got float"),
    "mode": ({"mode": "token"}, ValueError, "mode must be one of 'stage', 'layer', got 'token'"),
    "unknown": (
        {"patch_size": 8},
        TypeError,
        "evolevit has no option 'patch_size'; the backbone's are depth, distillation",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_use(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        create_model("evolevit_128s_224", **SIZES | options)


def test_backbones_are_not_mixed_up() -> None:
    model = build_levit()
    for door in (checkpointed_twin, masked_twin, lambda model: drop_path_twin(model, 0.1)):
        with pytest.raises(TypeError, match="model must be a VisionTransformer, got LeViT"):
            door(model)
    for door in (calibrate, capture):
        with pytest.raises(TypeError, match=r"model must be a VisionTransformer.*, got LeViT"):
            door(model, images())
    with pytest.raises(ValueError, match="name must be a flat ViT's here, got 'evolevit_128_224'"):
        create_vit("evolevit_128_224")
    with pytest.raises(AttributeError):
        VisionTransformer(ViTConfig(depth=1), EvoLeViT())
    with pytest.raises(TypeError, match="model must be a LeViT, got Linear"):
        EvoLeViT().attach(nn.Linear(1, 1))
    assert LeViT(LeViTConfig(), EvoLeViT(EvoLeViTConfig(class_head=True))).method.head_cls.l.out_features == 1000
