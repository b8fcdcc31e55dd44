"""The recipes, by name: what `jaxrel train` and `jaxrel evaluate` can run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrel.train import clip_shapes


class Recipe(NamedTuple):
    """How a recipe trains, `train(settings, folder)`, and how its model is judged."""

    train: Callable[..., Any]
    evaluate: Callable[..., dict[str, Any]]


RECIPES = {
    "clip-shapes": Recipe(clip_shapes.train, clip_shapes.evaluate),
}
