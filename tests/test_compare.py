"""The main job on a tiny backbone: formulas, calibration, refusal, JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtvit_ops import calibrate, create_method
from mtvit_ops.chart import write_chart
from mtvit_ops.compare import realised_fraction as fraction
from mtvit_ops.compare import run_compare
from mtvit_ops.compare_options import CompareError, CompareOptions
from mtvit_ops.equality import UnequalError, alive_tokens, check_equality, rounding_tolerance
from mtvit_ops.lineup import METHODS, Lineup, build_lineup
from mtvit_ops.methods import EvoViT
from mtvit_ops.report import columns, plain_table, to_json, token_bar, write_json
from mtvit_ops.timing import peak_memory, spread, time_interleaved

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: extra [demo]")

# 16 patches, so that every method has something to drop, and MT-ViT tails of 2, 3 and 4
SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 6, "num_classes": 3}
METHOD = {"base_block": 2}
CPU = torch.device("cpu")


def write_photos(folder: Path, names: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # large soft blots, unlike from photograph to photograph
        small = generator.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(small).resize((90, 80)).save(folder / name)
    return folder


def tiny(folder: Path, **changes: Any) -> CompareOptions:
    own = METHOD if "lifevit" in changes.get("models", METHODS) else {}
    settings: dict[str, Any] = {"photos": (str(folder),), "overrides": SIZES | own, "rounds": 3, "batch": 2}
    return CompareOptions(**(settings | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def result(folder: Path) -> Any:
    return run_compare(tiny(folder))


def test_realised_fraction_by_hand() -> None:
    assert fraction(dense_time=10.0, time=5.0, dense_macs=4.0, macs=2.0) == 1.0
    assert fraction(dense_time=10.0, time=8.0, dense_macs=4.0, macs=2.0) == 0.625
    assert fraction(dense_time=10.0, time=10.0, dense_macs=4.0, macs=4.0) == 1.0


def test_rows_follow_from_what_was_measured(result: Any) -> None:
    dense = result.rows[0]
    assert [row.name for row in result.rows] == list(METHODS)
    assert (dense.mac_ratio, dense.speed_up, dense.realised_fraction) == (1, 1, 1)
    assert dense.tokens_per_block == (17.0,) * 6
    for row in result.rows:
        assert len(row.rounds) == 3
        assert row.milliseconds == spread(row.rounds)
        assert row.mac_ratio == pytest.approx(row.macs / dense.macs)
        assert row.speed_up == pytest.approx(dense.milliseconds.median / row.milliseconds.median)
        assert row.realised_fraction == pytest.approx(row.speed_up * row.mac_ratio)
        assert row.speed_up_spread.low <= row.speed_up <= row.speed_up_spread.high
        assert row.peak_memory.bytes > 0
        assert row.top1 is None


def test_every_method_is_calibrated(result: Any) -> None:
    for row in result.rows[1:]:
        assert row.calibration.target == 0.65
        # 16 patches are few: a token is worth about 1/17 of the operations
        assert row.calibration.mac_ratio == pytest.approx(0.65, abs=0.1)
        assert row.equality.masking_error <= row.equality.tolerance
    assert result.rows[0].calibration is None


def test_batches_are_filled_and_that_is_said(result: Any) -> None:
    assert (result.num_photos, result.num_sample, result.num_timed) == (3, 3, 4)
    assert any("timed on 4 images" in note for note in result.notes)
    assert any("timings are real, choices are not" in note for note in result.notes)
    assert any("predictor is untrained" in note for note in result.notes)


def test_a_sample_is_said(folder: Path) -> None:
    result = run_compare(tiny(folder, models=("evovit",), batch=1, sample=2, rounds=1))
    assert (result.num_photos, result.num_sample, result.num_timed) == (3, 2, 2)
    assert any("2 of 3 photographs" in note for note in result.notes)
    assert [row.name for row in result.rows] == ["vit", "evovit"]


def test_untrained_mt_vit_chooses_several_grids_once_calibrated() -> None:
    model = build_lineup(("mtvit",), "tiny", {}, SIZES, 0, CPU, torch.float32).models["mtvit"]
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # a predictor whose last layer is zero gives all images the same scores, so the same grid at any cost weight
    calibrate(model, images, 0.8)  # between the costs of two grids
    with torch.no_grad():
        _, trace = model(images, return_trace=True)
    assert trace.extras["tail"].unique().numel() > 1


def test_the_lineup_shares_weights_and_leaves_the_generator() -> None:
    before = torch.random.get_rng_state()
    lineup = build_lineup(METHODS, "tiny", {}, SIZES | METHOD, 3, CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    dense = lineup.models["vit"]
    for model in lineup.models.values():
        assert model.blocks[0].attn.qkv.weight is dense.blocks[0].attn.qkv.weight
        assert not model.training
    again = build_lineup(METHODS, "tiny", {}, SIZES | METHOD, 3, CPU, torch.float32)
    alone = build_lineup(("mtvit",), "tiny", {}, SIZES, 3, CPU, torch.float32)
    for name, model in [*again.models.items(), *alone.models.items()]:
        for key, value in model.state_dict().items():
            assert torch.equal(value, lineup.models[name].state_dict()[key]), (name, key)


def test_bfloat16_runs(folder: Path) -> None:
    result = run_compare(tiny(folder, dtype="bfloat16", rounds=1))
    assert len(result.rows) == 5


class Forgetful(EvoViT):
    """Classifies from the class token of the last image of the batch."""

    def readout(self, first_rows: torch.Tensor, tokens: Any, state: Any) -> torch.Tensor:
        return tokens.x[first_rows[-1:]].expand(len(first_rows), -1)


def with_broken(method: EvoViT) -> Any:
    def build(*arguments: Any) -> Lineup:
        lineup = build_lineup(*arguments)
        models = {"vit": lineup.models["vit"], "evovit": lineup.models["vit"].with_method(method)}
        return Lineup(models, True, (), "two models")

    return build


def test_a_model_that_depends_on_its_batch_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtvit_ops.compare.time_interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(UnequalError, match=r"evovit: photograph 0 in a batch of 2 differs"):
        run_compare(tiny(folder), build=with_broken(Forgetful(EvoViT.config_class())))


def test_removal_unlike_masking_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a masked twin that hides nothing stands for a removal that forgets to remove
    monkeypatch.setattr("mtvit_ops.equality.masked_twin", lambda model: model.with_method(create_method("vit")))
    monkeypatch.setattr("mtvit_ops.compare.time_interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(UnequalError, match=r"evovit: removing tokens differs from masking them.*nothing was timed"):
        run_compare(tiny(folder, models=("evovit",)))


def test_wrong_logits_with_the_right_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_lineup(("evovit",), "tiny", {}, SIZES, 0, CPU, torch.float32).models["evovit"]
    images = torch.randn(2, 3, 64, 64)
    tolerance = rounding_tolerance(build_lineup((), "tiny", {}, SIZES, 0, CPU, torch.float32).models["vit"], images)
    assert tolerance < 1e-4
    check_equality("evovit", model, images, tolerance)

    class Twin:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self, images: torch.Tensor, return_trace: bool) -> Any:
            logits, trace = self.model(images, return_trace=True)
            return logits * 1.001, trace

    monkeypatch.setattr("mtvit_ops.equality.masked_twin", Twin)
    with pytest.raises(UnequalError, match="masking them: logits by"):
        check_equality("evovit", model, images, tolerance)


def test_not_a_number_is_not_timed(folder: Path) -> None:
    def build(*arguments: Any) -> Lineup:
        lineup = build_lineup(*arguments)
        torch.nn.init.constant_(lineup.models["vit"].head.bias, torch.nan)
        return lineup

    with pytest.raises(UnequalError, match="not finite"):
        run_compare(tiny(folder, models=("evovit",)), build=build)


def test_alive_tokens_of_a_known_schedule() -> None:
    lineup = build_lineup(("lifevit",), "tiny", {}, SIZES | METHOD | {"budgets": (9, 5)}, 0, CPU, torch.float32)
    with torch.no_grad():
        _, trace = lineup.models["lifevit"](torch.randn(2, 3, 64, 64), return_trace=True)
    alive = alive_tokens(trace, 16)
    assert alive.sum(dim=2).tolist() == [[17] * 2, [17] * 2, [9] * 2, [9] * 2, [5] * 2, [5] * 2]
    assert alive[:, :, 0].all()


def test_top1_is_counted_over_all_photographs(tmp_path: Path) -> None:
    names = ("ant/1.png", "bee/2.png", "bee/3.png", "cat/4.png", "cat/5.png")
    write_photos(tmp_path, names)

    def build(*arguments: Any) -> Lineup:
        lineup = build_lineup(*arguments)
        head = lineup.models["vit"].head  # shared: every model now answers "cat"
        torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            head.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        return lineup

    result = run_compare(tiny(tmp_path, models=("evovit", "mtvit"), rounds=1, sample=1), build=build)
    assert [row.top1 for row in result.rows] == [0.4, 0.4, 0.4]
    assert columns(result)[-1].cells == ("40.0%",) * 3
    named = run_compare(tiny(tmp_path, models=("evovit",), rounds=1, labels=("cat", "bee", "ant")), build=build)
    assert named.rows[0].top1 == 0.2


def test_json_is_complete(result: Any, tmp_path: Path) -> None:
    write_json(result, tmp_path / "compare.json")
    data = json.loads((tmp_path / "compare.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("mtvit_ops.compare", 1)
    assert set(data) == {
        "schema",
        "schema_version",
        "written",
        "options",
        "environment",
        "device",
        "photos",
        "models",
        "notes",
        "pictures",
    }
    assert data["options"]["seed"] == 0
    assert {"torch", "cpu", "threads", "commit", "build", "backends"} <= set(data["environment"])
    for model, row in zip(data["models"], result.rows, strict=True):
        assert set(model) == {
            "name",
            "tokens_per_block",
            "macs_per_image",
            "mac_ratio",
            "ms_per_image",
            "speed_up",
            "speed_up_quartiles",
            "realised_fraction",
            "peak_memory_bytes",
            "peak_memory_measured_by",
            "top1",
            "calibration",
            "equality",
        }
        assert model["ms_per_image"]["rounds"] == list(row.rounds)
    assert data == json.loads(json.dumps(to_json(result), default=str)) | {"written": data["written"]}


def test_chart_is_drawn(result: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: extra [demo]")
    write_chart(result, tmp_path / "speed-up.png")
    with Image.open(tmp_path / "speed-up.png") as chart:
        assert chart.size == (1350, 1080)
        colours = {tuple(pixel) for pixel in np.asarray(chart.convert("RGB")).reshape(-1, 3)}
    # each method's point is in its colour
    for tint in ("0072B2", "D55E00", "009E73", "CC79A7"):
        assert tuple(bytes.fromhex(tint)) in colours


def test_bars_are_as_high_as_their_share() -> None:
    assert token_bar([8, 4, 1, 0.01, 0], 8) == "█▄▁▁ "
    assert token_bar([8, 4, 1, 0.01, 0], 8, ascii_only=True) == "@=.. "


def test_table_is_aligned_and_narrow(result: Any) -> None:
    for ascii_only in (False, True):
        lines = plain_table(result, ascii_only).splitlines()
        assert len(lines) == 2 + 1 + 5
        assert max(map(len, lines)) <= 80
        assert len({len(line) for line in lines[1:]}) <= 2  # only headings may end early
    assert plain_table(result, True).isascii()


def test_interleaving_runs_everything_equally_often() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = time_interleaved(runs, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    warm_up, rounds = order[:6], order[6::2]
    assert warm_up == list("abcabc")
    assert order[7::2] == rounds  # each twice, one after the other
    assert [sorted(rounds[start : start + 3]) for start in (0, 3, 6)] == [list("abc")] * 3
    assert rounds[:3] != rounds[3:6]
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        time_interleaved(runs, rounds=0)


def test_spread_by_hand() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_peak_memory_sees_what_was_released() -> None:
    kept = torch.zeros(1000)

    def run() -> torch.Tensor:
        first = torch.zeros(250_000)  # 1 MB
        second = first + 1  # 2 MB in all
        del first
        return second[:10] + kept[:10]

    found = peak_memory(run, CPU)
    assert 2_000_000 <= found.bytes < 2_010_000
    assert "profiler" in found.how


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("resnet",)}, r"models must be one of vit, avit.*got 'resnet'"),
        ({"size": "huge"}, r"size must be one of tiny.*got 'huge'"),
        ({"dtype": "int8"}, r"dtype must be one of float32.*got 'int8'"),
        ({"mac_ratio": 0.0}, r"mac_ratio must be in \(0, 1\], got 0"),
        ({"mac_ratio": float("nan")}, r"mac_ratio must be in \(0, 1\], got nan"),
        ({"batch": 0}, r"batch must be >= 1, got 0"),
        ({"checkpoints": {"resnet": "x"}}, r"checkpoints must be one of .*all, got 'resnet'"),
    ],
    ids=["model", "size", "dtype", "ratio", "nan", "batch", "checkpoint"],
)
def test_bad_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        CompareOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:99"}, r"device must be .*got 'cuda:99'"),
        ({"device": "abacus"}, r"device must be .*got 'abacus'"),
        ({"device": "meta"}, r"device must be .*got 'meta'"),
        ({"overrides": {"colour": 1}}, r"override 'colour' is no field"),
        ({"overrides": {"depth": "deep"}}, r"depth must be an int, got str"),
        ({"checkpoints": {"all": "nothing.pth"}}, r"checkpoint all=nothing.pth: .*no"),
    ],
    ids=["no-cuda", "no-device", "meta", "no-field", "field-type", "no-checkpoint"],
)
def test_what_cannot_be_met_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        run_compare(tiny(folder, **changes))


def test_threads_are_given_back(folder: Path) -> None:
    before = torch.get_num_threads()
    result = run_compare(tiny(folder, models=("vit",), threads=1, rounds=1))
    assert result.environment["threads"] == 1
    assert torch.get_num_threads() == before


def test_options_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompareOptions().size = "base"  # type: ignore[misc]
