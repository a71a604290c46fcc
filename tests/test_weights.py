"""Files of trained models: everything needed to use them comes back; what is no such file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtvit_ops import create_model
from mtvit_ops.weights import ModelInfo, load_model, read_info, save_model

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: extra [train]")

MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 1, "num_classes": 3}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "avit": {"gate_scale": 3.0, "gate_center": 1.0},
    "evovit": {"keep_ratios": [0.5, 0.6, 0.7], "mode": "layer", "class_head": True},
    "lifevit": {"base_block": 1, "budgets": [9, 5]},
    "mtvit": {"grids": [2, 4], "predictor_size": 16, "cost_weight": 0.5},
}


def options_of(method: str) -> dict[str, Any]:
    return {"name": f"{method}_tiny_patch16_224", **MICRO, **MODELS[method]}


def save(path: Path, method: str = "vit", **rest: Any) -> tuple[Any, ModelInfo]:
    options = options_of(method)
    model = create_model(**options).eval()
    info = ModelInfo(options, ("a", "b", "é"), 0.9, {"top1": 0.5, "recipe": {"x": [1, None]}})
    save_model(path, model.state_dict(), info, **rest)
    return model, info


@pytest.mark.parametrize("method", MODELS)
def test_round_trip(method: str, tmp_path: Path) -> None:
    path = tmp_path / "m-10-30.safetensors"  # a name in which A-ViT's authors put gates
    model, info = save(path, method)
    assert read_info(path) == info
    loaded, again = load_model(path)
    assert again == info
    assert not loaded.training
    assert (loaded.config, loaded.method.config) == (model.config, model.method.config)
    images = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    before = path.read_bytes()
    save_model(path, loaded.state_dict(), info)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "m-10-30.safetensors"
    save(path, "avit")
    config = load_model(path, gate_center=2.0).model.method.config
    assert (config.gate_scale, config.gate_center) == (3.0, 2.0)
    with pytest.raises(TypeError, match="has no option 'gate_centre'"):
        load_model(path, gate_centre=2.0)
    with pytest.raises(
        ValueError, match=r"does not fit the model: mis-shaped head.weight, expected .4, 16., got .3, 16."
    ):
        load_model(path, num_classes=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "half.any"
    model, _ = save(path, dtype=dtype)
    stored = safetensors.load_file(path)
    loaded = load_model(path).model
    for name, value in model.state_dict().items():
        assert stored[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], value.to(dtype).float())
    # whole numbers stay what they are
    weights = {"count": torch.arange(3), "weight": torch.ones(2)}
    save_model(path, weights, ModelInfo({"name": "vit"}, (), 1.0, {}), dtype=dtype)
    assert {name: value.dtype for name, value in safetensors.load_file(path).items()} == {
        "count": torch.int64,
        "weight": dtype,
    }


def test_weights_of_any_layout_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    base = torch.randn(4, 6, requires_grad=True)
    weights = {"across": base.T, "part": base[:, 1:3], "scalar": torch.tensor(2.0)}
    save_model(path, weights, ModelInfo({"name": "x"}, (), 1.0, {}))
    found = safetensors.load_file(path)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def metadata_file(path: Path, text: str | None) -> Path:
    metadata = None if text is None else {"mtvit_ops": text}
    safetensors.save_file({"x": torch.ones(1)}, path, metadata=metadata)
    return path


GOOD = {"model": {"name": "vit_tiny_patch16_224"}, "classes": ["a"], "crop_pct": 0.9, "facts": {}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        json.dumps({**GOOD, "more": 1}),
        json.dumps({key: value for key, value in GOOD.items() if key != "crop_pct"}),
        json.dumps({**GOOD, "classes": 3}),
        json.dumps({**GOOD, "classes": "ab"}),
        json.dumps({**GOOD, "classes": [1]}),
        json.dumps({**GOOD, "model": {}}),
        json.dumps({**GOOD, "model": ["vit"]}),
        json.dumps({**GOOD, "crop_pct": "wide"}),
        json.dumps({**GOOD, "facts": None}),
        json.dumps({**GOOD, "interpolation": "random"}),
    ],
)
def test_unreadable_information(text: str, tmp_path: Path) -> None:
    path = metadata_file(tmp_path / "x.safetensors", text)
    for read in (read_info, load_model):
        with pytest.raises(ValueError, match="says nothing readable of its model"):
            read(path)


def test_a_file_from_before_there_was_an_interpolation(tmp_path: Path) -> None:
    info = read_info(metadata_file(tmp_path / "old.safetensors", json.dumps(GOOD)))
    assert info == ModelInfo(GOOD["model"], ("a",), 0.9, {}, "bicubic")


def test_other_files(tmp_path: Path) -> None:
    bare = metadata_file(tmp_path / "bare.safetensors", None)
    assert read_info(bare) is None
    with pytest.raises(ValueError, match="does not say which model it is for"):
        load_model(bare)
    for content in (b"", b"\0" * 8, b"PK not at all", bare.read_bytes()[:-2]):
        path = tmp_path / "broken.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            read_info(path)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="weights must be a file"):
            load_model(missing)
    unknown = metadata_file(tmp_path / "x.safetensors", json.dumps({**GOOD, "model": {"name": "vit_huge"}}))
    with pytest.raises(ValueError, match="name must be one of"):
        load_model(unknown)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        save(tmp_path / "none" / "x.safetensors")
