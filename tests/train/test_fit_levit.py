"""Evo-LeViT by recipe: from layer to stage, with a teacher's answers, and timm's models as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_cases import CLASSES, DENSE, LEVIT, StopsAt, assert_same_run, make_data, make_recipe, records

from mtvit_ops._timm import import_timm
from mtvit_ops.nn import LeViT
from mtvit_ops.photos import MEAN, STD
from mtvit_ops.train.evaluation import evaluate
from mtvit_ops.train.fit import StoppedError, train
from mtvit_ops.train.processes import Processes
from mtvit_ops.train.recipe import OptimiserOptions, RecipeError, TeacherOptions
from mtvit_ops.train.teacher import Teacher
from mtvit_ops.weights import load_model, load_vit

TAUGHT: dict[str, Any] = {"model": LEVIT, "teacher.answers": True, "plan.stage_from": 0.5}
ALONE: dict[str, Any] = {"model": {**LEVIT, "distillation": False}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(make_recipe({**ALONE, "optimiser.epochs": 1}), data, out, device="cpu")
    return out / "last.safetensors"


def test_from_layer_to_stage_with_answers_and_the_same_bits_after_a_stop(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe({**TAUGHT, "optimiser.clip_mode": "agc", "optimiser.clip_grad": 0.01})
    found = train(recipe, data, tmp_path / "whole", teacher=teacher, device="cpu")
    with pytest.raises(StoppedError):
        train(recipe, data, tmp_path / "parts", teacher=teacher, device="cpu", progress=StopsAt(7))
    train(recipe, data, tmp_path / "parts", teacher=teacher, device="cpu", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    first = records(tmp_path / "whole", "train")[0]
    terms = [first[name] for name in ("task", "class_task", "distillation", "class_distillation")]
    assert first["loss"] == pytest.approx(sum(terms) / 4, rel=1e-6)
    model, _ = load_model(tmp_path / "whole" / "last.safetensors")
    assert isinstance(model, LeViT)
    assert model.method.config.mode == "stage"
    assert model.method.config.keep_ratios == tuple(LEVIT["keep_ratios"])
    again = evaluate(
        tmp_path / "whole" / "last.safetensors", data, batch_size=recipe.run.eval_batch, workers=0, device="cpu"
    )
    assert again == found.score  # of the same batches: sums in another order end in other bits
    with pytest.raises(ValueError, match=r"must be of a flat ViT here, got evolevit_128s_224"):
        load_vit(tmp_path / "whole" / "last.safetensors")


def test_training_goes_by_layer_first(data: Path, tmp_path: Path) -> None:
    train(make_recipe({**ALONE, "plan.stage_from": 1.0, "optimiser.epochs": 1}), data, tmp_path / "run", device="cpu")
    assert load_model(tmp_path / "run" / "best.safetensors").info.model["mode"] == "stage"  # at its very end
    with pytest.raises(StoppedError):
        train(
            make_recipe({**ALONE, "plan.stage_from": 1.0, "optimiser.ema_decay": 0.0}),
            data,
            tmp_path / "by",
            device="cpu",
            progress=StopsAt(5),
        )
    state = torch.load(tmp_path / "by" / "state.pt", weights_only=True)
    assert state["method"]["mode"] == "layer"


def test_autocast(data: Path, tmp_path: Path) -> None:
    train(
        make_recipe({**ALONE, "run.precision": "bfloat16", "optimiser.epochs": 1}), data, tmp_path / "run", device="cpu"
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({**ALONE, "regularise.drop_path": 0.1}, RecipeError, r"drop_path must be 0 for a LeViT.*model\.drop_path"),
        ({**ALONE, "run.checkpointing": True}, RecipeError, "run.checkpointing must be false for a LeViT"),
        (
            {**ALONE, "optimiser.batch_size": 1, "mix": {}},
            RecipeError,
            "batch_size must be at least 2 for each process",
        ),
        ({"model": LEVIT}, ValueError, "answers must be the teacher's for a model that is distilled"),
        (
            {"model": LEVIT, "teacher.answers": True},
            ValueError,
            r"teacher must be a file.*\[teacher\] asks for answers",
        ),
        ({**ALONE, "plan.freeze": True}, TypeError, "the plan of EvoLeViT has no 'freeze', it has stage_from"),
    ],
)
def test_wrong_wishes(
    changes: dict[str, Any], error: type[Exception], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(make_recipe(changes), data, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_answers_are_for_losses_that_read_them(teacher: Path, data: Path, tmp_path: Path) -> None:
    recipe = make_recipe({"model": {**DENSE, "img_size": 64}, "teacher.answers": True})
    with pytest.raises(RecipeError, match=r"teacher.answers must be false for Dense, whose loss reads no answers"):
        train(recipe, data, tmp_path / "run", teacher=teacher, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.answers": True, "teacher.share": 0.5}, "share must be 0 where the teacher gives answers, got 0.5"),
        ({"teacher.model": "lcnet_035"}, "model must be empty without share and without answers, got 'lcnet_035'"),
        ({"teacher.answers": "yes"}, "answers must be"),
        ({"optimiser.clip_mode": "value"}, "clip_mode must be"),
        ({"optimiser.clip_mode": "agc", "optimiser.clip_grad": 0.0}, "clip_mode must be 'norm' where clip_grad is 0"),
        (
            {"optimiser.clip_mode": "agc", "run.sharding": "full"},
            "clip_mode must be 'norm' where run.sharding is 'full'",
        ),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(changes)


def save_timm(name: str, path: Path) -> nn.Module:
    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES)).eval()
    torch.save({"model": model.state_dict()}, path)
    return model


def make_teacher(path: Path, img_size: int = 64, **options: Any) -> Teacher:
    return Teacher(path, TeacherOptions(**options), CLASSES, img_size, torch.device("cpu"))


# the second learned with another mean and standard deviation
@pytest.mark.parametrize("name", ["lcnet_035", "tf_mobilenetv3_small_minimal_100"])
def test_a_teacher_of_timm_sees_what_it_learned_with(name: str, tmp_path: Path) -> None:
    model = save_timm(name, tmp_path / "teacher.pth")
    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((pixels - mean) / std)
    views = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    taught = make_teacher(tmp_path / "teacher.pth", model=name, share=1.0, temperature=2.0)
    targets = torch.tensor([1, 0, 1, 1, 0])
    torch.testing.assert_close(taught.soften(views, targets), (logits / 2).softmax(dim=1), rtol=0, atol=1e-5)
    answers = make_teacher(tmp_path / "teacher.pth", model=name, answers=True).answers(views)
    assert answers.dtype == torch.int64
    assert torch.equal(answers, logits.argmax(dim=1))


def test_a_teacher_of_timm_teaches_a_levit(data: Path, tmp_path: Path) -> None:
    save_timm("lcnet_035", tmp_path / "teacher.pth")
    recipe = make_recipe({**TAUGHT, "teacher.model": "lcnet_035", "optimiser.epochs": 1})
    train(recipe, data, tmp_path / "run", teacher=tmp_path / "teacher.pth", device="cpu")
    assert records(tmp_path / "run", "train")[0]["distillation"] > 0


def test_teachers_of_timm_that_do_not_fit(teacher: Path, tmp_path: Path) -> None:
    save_timm("lcnet_035", tmp_path / "teacher.pth")
    save_timm("vit_tiny_patch16_224", tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"teacher.model must be an architecture of timm's, got 'lcnet_34'; close are"):
        make_teacher(tmp_path / "teacher.pth", model="lcnet_34", answers=True)
    with pytest.raises(FileNotFoundError, match="teacher must be a file of weights"):
        make_teacher(tmp_path / "none.pth", model="lcnet_035", answers=True)
    for other in (tmp_path / "vit.pth", teacher):
        with pytest.raises(ValueError, match="teacher must be weights of lcnet_035 for 2 classes"):
            make_teacher(other, model="lcnet_035", answers=True)
    with pytest.raises(ValueError, match="teacher must see 64 pixels, as the model does"):
        make_teacher(tmp_path / "vit.pth", model="vit_tiny_patch16_224", answers=True)


def test_gradients_are_clipped_by_unit() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight[0] = 0.0  # shorter than 1e-3
    x, target = 100 * torch.randn(8, 6), torch.randint(4, (8,))
    F.cross_entropy(linear(x), target).backward()
    want = []
    for weight in linear.parameters():
        assert weight.grad is not None
        rows, grads = (each.detach().reshape(len(weight), -1) for each in (weight, weight.grad))
        if weight.ndim == 1:  # timm takes a vector as one unit
            rows, grads = rows.T, grads.T
        allowed = 0.01 * rows.norm(dim=1, keepdim=True).clamp(min=1e-3)
        norm = grads.norm(dim=1, keepdim=True)
        assert bool((norm > allowed).any())
        want.append(torch.where(norm > allowed, grads * allowed / norm, grads).reshape(-1))
    options = OptimiserOptions(batch_size=8, epochs=1, lr=1.0, clip_grad=0.01, clip_mode="agc")
    Processes("float32", "cpu").clip(linear.parameters(), options)
    for weight, wanted in zip(linear.parameters(), want):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.reshape(-1), wanted, rtol=1e-5, atol=0)
