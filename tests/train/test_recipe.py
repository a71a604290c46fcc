"""Recipes: what is written is what is meant, or told; every recipe of the repository builds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import RECIPE, make_recipe, write_recipe

from mtvit_ops.nn import LeViT, drop_path_twin
from mtvit_ops.train.build import build_model
from mtvit_ops.train.compute_loss import compute_loss, loss_of
from mtvit_ops.train.order import TrainOrder
from mtvit_ops.train.parts import Schedule, make_optimiser
from mtvit_ops.train.plan import make_plan
from mtvit_ops.train.recipe import RecipeError, load_recipe
from mtvit_ops.train.views import eval_view, train_view

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))


def test_file_and_tables_are_the_same(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "é.toml")
    recipe = load_recipe(path)
    assert recipe == load_recipe(str(path)) == make_recipe()
    content = json.loads(json.dumps(recipe.to_dict()))
    assert content == recipe.to_dict()  # lists, not tuples: as JSON and a saved state have it
    assert load_recipe(content) == recipe
    assert content["optimiser"]["ema_decay"] == 0.9
    assert content["run"]["precision"] == "float32"


def test_changes_win_and_leave_their_source_alone(tmp_path: Path) -> None:
    source = copy.deepcopy(RECIPE)
    changes = {"optimiser.epochs": 7, "model.depth": 3, "loss.label_smoothing": 0.1, "title": "other", "data": {}}
    recipe = load_recipe(source, changes)
    assert source == RECIPE
    assert (recipe.optimiser.epochs, recipe.model["depth"], recipe.title) == (7, 3, "other")
    assert recipe.loss == {"label_smoothing": 0.1}
    assert recipe.data.workers == 1
    assert load_recipe(write_recipe(tmp_path / "r.toml"), changes) == recipe


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"optimizer": {}}, "there is no 'optimizer', only augment, .*; did you mean optimiser?"),
        (
            {"optimiser.weightdecay": 1},
            r"recipe: \[optimiser\]: there is no 'weightdecay', .*did you mean weight_decay\?",
        ),
        ({"augment.colour_jitter": 1.0}, r"\[augment\]: there is no 'colour_jitter'.* did you mean color_jitter\?"),
        ({"run.zzz": 1}, r"\[run\]: there is no 'zzz', only [a-z_, ]*$"),
        ({"title.x": 1}, "title is no table, so it has no x"),
        ({"run": 3}, "run must be a table, got 3"),
        ({"model": 3}, "model must be a table, got 3"),
        ({"model": {}}, "model must have a name, got {}"),
        ({"model.name": 3}, "model must have a name"),
        ({"title": 3}, "title must be a string, got 3"),
        ({"optimiser": {"lr": 1.0}}, r"\[optimiser\]: batch_size, epochs must be given"),
        ({"optimiser.name": 3}, "name must be a string, got 3"),
        ({"optimiser.lr": 0.0}, r"\[optimiser\]: lr must be "),
        ({"optimiser.lr": float("nan")}, "lr must be "),
        ({"optimiser.lr": "1e-3"}, "lr must be "),
        ({"optimiser.epochs": 0}, "epochs must be >= 1, got 0"),
        ({"optimiser.epochs": 1.5}, "epochs must be an int, got float"),
        ({"optimiser.epochs": True}, "epochs must be an int, got bool"),
        ({"optimiser.batch_size": 5}, "batch_size must be even where images are mixed in pairs, got 5"),
        ({"optimiser.betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"optimiser.betas": [0.9]}, r"betas must be two numbers, got \[0.9\]"),
        ({"optimiser.warmup_epochs": 3}, r"warmup_epochs must be in \[0.0, 2.0\], got 3"),
        ({"optimiser.ema_decay": 1.0}, "ema_decay must be below 1"),
        ({"optimiser.lr": 9e-6}, r"min_lr must be at most lr 9e-06, or the rate would rise to it, got 1e-05"),
        ({"mix": {"label_smoothing": 0.1}}, r"\[mix\]: label_smoothing must be 0 without mixing, .*, got 0.1"),
        ({"mix.prob": 0.0, "mix.label_smoothing": 0.1}, "label_smoothing must be 0 without mixing"),
        ({"teacher.temperature": 2.0}, r"\[teacher\]: temperature must be 1 where share is 0, got 2.0"),
        ({"mix.prob": 1.1}, r"\[mix\]: prob must be "),
        ({"mix.mixup": -1.0}, "mixup must be "),
        ({"regularise.drop_path": 1.0}, r"\[regularise\]: drop_path must be below 1, or nothing is left"),
        ({"regularise.drop_path": -0.1}, r"drop_path must be in \[0.0, 1.0\], got -0.1"),
        ({"regularise.drop_path": "0.1"}, "drop_path must be a number, got str"),
        (
            {"regularise.droppath": 0.1},
            r"\[regularise\]: there is no 'droppath', only drop_path; did you mean drop_path\?",
        ),
        ({"augment.repeats": 0}, r"\[augment\]: repeats must be >= 1, got 0"),
        ({"run.seed": -1}, "seed must be in"),
        ({"run.seed": 2**63}, "seed must be in"),
        ({"run.precision": "float16"}, "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"run.checkpointing": "yes"}, "checkpointing must be one of True, False, got 'yes'"),
        ({"run.sharding": "half"}, "sharding must be one of 'none', 'full', got 'half'"),
        (
            {"run.sharding": "full", "optimiser.name": "lamb"},
            "optimiser.name must be one of adam, adamw, momentum, sgd where run.sharding is 'full', got 'lamb'",
        ),
        ({"run.log_steps": 0}, "log_steps must be >= 1, got 0"),
        ({"data.workers": -1}, "workers must be >= 0, got -1"),
        ({"data.cache": "always"}, "cache must be one of 'auto', True, False, got 'always'"),
        ({"data.train_split": 3}, "train_split must be a string, got 3"),
        ({"augment.scale": [0.5, 0.2]}, "scale must be 0 < a <= b <= 1"),
        ({"augment.auto_augment": "randaug"}, "auto_augment must be a policy of timm"),
    ],
)
def test_what_cannot_be_meant(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        make_recipe(changes)


@pytest.mark.parametrize("schedule", ["constant", "step", "multistep"])
def test_a_rate_below_an_end_that_is_not_read(schedule: str) -> None:
    assert make_recipe({"optimiser.lr": 1e-30, "optimiser.schedule": schedule}).optimiser.min_lr == 1e-5


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe must be a file, there is none at"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match="recipe must be a file"):
        load_recipe(tmp_path)
    path = tmp_path / "r.toml"
    for content in (b"title = ", b"\xff\xfe\0", b"[model]\n[model]\n"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"r.toml is not TOML: "):
            load_recipe(path)
    path.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"r.toml: title, model, optimiser must be given"):
        load_recipe(path)
    write_recipe(path, {**RECIPE, "run": {"sed": 1}})
    with pytest.raises(RecipeError, match=r"r.toml: \[run\]: there is no 'sed'.*did you mean seed\?"):
        load_recipe(path)


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_first_and_a_last_step(path: Path) -> None:
    recipe = load_recipe(path)
    torch.manual_seed(0)
    model = build_model(recipe, 10).train()
    plan = make_plan(model, recipe.plan)
    plan.start(model, recipe.loss)
    size = model.config.img_size
    images, target = torch.randn(2, 3, size, size), torch.tensor([3, 8])
    if recipe.mix.mixes or recipe.teacher.share:
        target = torch.randn(2, 10).softmax(dim=1)
    answers = {"answers": torch.tensor([8, 3])} if recipe.teacher.answers else {}
    for progress in (0.0, 1.0):
        model.zero_grad()
        loss, parts = compute_loss(model, images, target, **plan.at(model, recipe.loss, progress), **answers)
        loss.backward()
        assert all(bool(part.isfinite()) for part in (loss, *parts.values()))
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert any(bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.title
    model = build_model(recipe, 10)
    assert model.config.num_classes == 10
    plan = make_plan(model, recipe.plan)
    plan.start(model, recipe.loss)
    optimiser = make_optimiser(model, recipe.optimiser, plan)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(learning) > 0
    # matrices decay, vectors, positions and the class token do not
    spared = {id(each) for group in optimiser.param_groups if not group["weight_decay"] for each in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and recipe.optimiser.weight_decay:
            vector = parameter.ndim < 2 or "pos_embed" in name or "cls_token" in name
            assert (id(parameter) in spared) == vector, name
    steps = 10
    schedule = Schedule(optimiser, recipe.optimiser, steps)
    rates = []
    for step in range(recipe.optimiser.epochs * steps):
        schedule.set(step)
        rates.append(optimiser.param_groups[0]["lr"])
        loss_of(model, plan.at(model, recipe.loss, step / (recipe.optimiser.epochs * steps)))
    assert max(rates) <= recipe.optimiser.lr
    assert rates[-1] < max(rates) or recipe.optimiser.schedule == "constant"
    # a rate follows from the step alone
    schedule.set(steps // 2)
    assert optimiser.param_groups[0]["lr"] == rates[steps // 2]
    for view in (train_view, eval_view):
        assert view(model.config.img_size, recipe.augment).img_size == model.config.img_size


# what the authors' own recipes have, and DeiT's augmentation where theirs is that
AUTHORS = {
    "imagenet_avit_small": (0.1, 3),
    "imagenet_avit_tiny": (0.1, 3),
    "imagenet_evolevit_128s": (0.0, 3),
    "imagenet_evolevit_256": (0.0, 3),
    "imagenet_evovit_small": (0.1, 3),
    "imagenet_evovit_tiny": (0.0, 3),
    "imagenet_lifevit_small_stage1": (0.0, 1),
    "imagenet_lifevit_small_stage2": (0.0, 1),
    "imagenet_mtvit_small": (0.0, 3),
    "imagenet_mtvit_small_tails": (0.0, 3),
}


def test_drop_path_and_repeats_of_the_recipes() -> None:
    found = {}
    for path in RECIPES:
        recipe = load_recipe(path)
        rate, repeats = recipe.regularise.drop_path, recipe.augment.repeats
        if path.stem.startswith("imagenet_"):
            found[path.stem] = rate, repeats
        # the order and the twin are made as training makes them
        size = recipe.optimiser.batch_size
        batch = next(TrainOrder(max(size, 12), size, 0, paired=recipe.mix.mixes, repeats=repeats).batches(0))
        assert len({key[1] for key in batch}) == -(-size // repeats)
        model = build_model(recipe, 10)
        if isinstance(model, LeViT):
            assert rate == 0  # its own is the model's
            continue
        twin = drop_path_twin(model, rate)
        rates = [getattr(block, "rate", 0.0) for block in twin.blocks]
        assert rates[0] == 0
        assert rates[-1] == pytest.approx(rate, rel=1e-15)
    assert found == AUTHORS


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_labels_are_smoothed_once(path: Path) -> None:
    recipe = load_recipe(path)
    _, weights = loss_of(build_model(recipe, 10), recipe.loss)
    assert recipe.mix.label_smoothing == 0 or weights.label_smoothing == 0


def test_the_rates_of_a_cosine() -> None:
    """timm's formula by hand: 1 epoch of warm-up in a line, then half a cosine over all of the steps."""
    changes = {"optimiser.epochs": 4, "optimiser.warmup_epochs": 1, "optimiser.lr": 1.0}
    recipe = make_recipe({**changes, "optimiser.warmup_lr": 0.0, "optimiser.min_lr": 0.0})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    schedule = Schedule(optimiser, recipe.optimiser, 2)
    rates = []
    for step in (0, 1, 2, 4, 7):
        schedule.set(step)
        rates.append(optimiser.param_groups[0]["lr"])
    half = [0.5 * (1 + torch.cos(torch.tensor(step * torch.pi / 8)).item()) for step in (2, 4, 7)]
    # the cosine here is float32's
    assert rates == pytest.approx([0.0, 0.5, *half], abs=2e-7)
