"""The model of a recipe."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints import load_checkpoint
from ..models import Model, create_model
from .recipe import Recipe, RecipeError


def build_model(recipe: Recipe, num_classes: int, start: str | Path | None = None, reset_head: bool = False) -> Model:
    """The recipe's model for so many classes, with random weights or those of a file, in training mode.

    Args:
        recipe: what model.
        num_classes: of the data.
        start: as ``load_checkpoint`` takes it.
        reset_head: leave the file's classifier out.

    Raises:
        RecipeError: a model that cannot be built.
        FileNotFoundError, ValueError: no such file, or one that does not fit.
    """
    options = dict(recipe.model)
    name = options.pop("name")
    wanted = options.pop("num_classes", num_classes)
    if wanted != num_classes:
        raise RecipeError(f"num_classes must be the data's {num_classes}, or be left out, got {wanted}")
    try:
        model = create_model(name, num_classes=num_classes, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"[model]: {error}") from error
    if start is not None:
        load_checkpoint(model, start, reset_head=reset_head)
    return model
