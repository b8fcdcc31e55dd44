"""The recipes, by name: what `jaxrel train` and `jaxrel evaluate` can run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrel.models import CLIP, CLIPMapperCaption, CLIPMapperVQA
from jaxrel.train import (
    caption_evaluation,
    clip_shapes,
    mapper_real,
    mapper_shapes,
    vqa_evaluation,
)


class Recipe(NamedTuple):
    """`train(settings, folder)`, `evaluate(model, ...)`, and `card(folder, result)` if any.

    `model` is the class that it makes and judges.
    """

    model: type
    train: Callable[..., Any]
    evaluate: Callable[..., dict[str, Any]]
    card: Callable[..., str] | None = None


RECIPES = {
    "clip-shapes": Recipe(CLIP, clip_shapes.train, clip_shapes.evaluate, clip_shapes.card),
    "vqa-shapes": Recipe(
        CLIPMapperVQA, mapper_shapes.train_vqa, vqa_evaluation.evaluate, vqa_evaluation.card
    ),
    "caption-shapes": Recipe(
        CLIPMapperCaption,
        mapper_shapes.train_caption,
        caption_evaluation.evaluate,
        caption_evaluation.card,
    ),
    "vqa-v2": Recipe(CLIPMapperVQA, mapper_real.train_vqa, mapper_real.evaluate_vqa),
    "caption-coco": Recipe(
        CLIPMapperCaption, mapper_real.train_caption, mapper_real.evaluate_caption
    ),
}
