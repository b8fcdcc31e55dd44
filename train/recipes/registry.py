"""The recipes, by name: what `jaxrel train` and `jaxrel evaluate` can run."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxrel.models import CLIP, Captioner, CLIPMapperCaption, CLIPMapperVQA
from jaxrel.train.evaluate import captions, vqa
from jaxrel.train.recipes import (
    captioner_real,
    captioner_shapes,
    clip_shapes,
    finetune,
    mapper_real,
    mapper_shapes,
)
from jaxrel.train.recipes.settings import AoAShapes, GridTDShapes


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
    "vqa-shapes": Recipe(CLIPMapperVQA, mapper_shapes.train_vqa, vqa.evaluate, vqa.card),
    "caption-shapes": Recipe(
        CLIPMapperCaption,
        mapper_shapes.train_caption,
        captions.evaluate,
        captions.card,
    ),
    "vqa-v2": Recipe(CLIPMapperVQA, mapper_real.train_vqa, mapper_real.evaluate_vqa),
    "caption-coco": Recipe(
        CLIPMapperCaption, mapper_real.train_caption, mapper_real.evaluate_caption
    ),
    **{
        f"{settings.kind}-shapes": Recipe(
            Captioner,
            captioner_shapes.train,
            captioner_shapes.evaluate,
            partial(captioner_shapes.card, recipe=settings),
        )
        for settings in (GridTDShapes, AoAShapes)
    },
    **{
        f"{kind}-{dataset}": Recipe(
            Captioner, captioner_real.train, partial(captioner_real.evaluate, dataset=dataset)
        )
        for kind in ("gridtd", "aoa")
        for dataset in captioner_real.READERS
    },
    "finetune-shapes": Recipe(
        Captioner,
        finetune.train_shapes,
        captioner_shapes.evaluate,
        finetune.card,
    ),
    **{
        f"finetune-{dataset}": Recipe(
            Captioner,
            finetune.train_real,
            partial(captioner_real.evaluate, dataset=dataset),
        )
        for dataset in captioner_real.READERS
    },
}
