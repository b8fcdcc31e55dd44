"""The recipes, by name: what `jaxrel train` and `jaxrel evaluate` can run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrel.train import (
    caption_evaluation,
    clip_shapes,
    mapper_real,
    mapper_shapes,
    vqa_evaluation,
)


class Recipe(NamedTuple):
    """`train(settings, folder)`, `evaluate(model, ...)`, and `card(folder, result)` if any."""

    train: Callable[..., Any]
    evaluate: Callable[..., dict[str, Any]]
    card: Callable[..., str] | None = None


RECIPES = {
    "clip-shapes": Recipe(clip_shapes.train, clip_shapes.evaluate, clip_shapes.card),
    "vqa-shapes": Recipe(mapper_shapes.train_vqa, vqa_evaluation.evaluate, vqa_evaluation.card),
    "caption-shapes": Recipe(
        mapper_shapes.train_caption, caption_evaluation.evaluate, caption_evaluation.card
    ),
    "vqa-v2": Recipe(mapper_real.train_vqa, mapper_real.evaluate_vqa),
    "caption-coco": Recipe(mapper_real.train_caption, mapper_real.evaluate_caption),
}
