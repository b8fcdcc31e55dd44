"""The recipes, by name: what `jaxrel train` and `jaxrel evaluate` can run.

A recipe's module is imported when it is asked for: reading the list costs nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

# The module of each recipe, in this package.
RECIPES = {
    "clip-shapes": "clip_shapes",
    "vqa-shapes": "vqa_shapes",
    "caption-shapes": "caption_shapes",
    "vqa-v2": "vqa_v2",
    "caption-coco": "caption_coco",
    "gridtd-shapes": "captioner_shapes",
    "aoa-shapes": "captioner_shapes",
    "gridtd-coco": "captioner_real",
    "aoa-coco": "captioner_real",
    "gridtd-flickr30k": "captioner_real",
    "aoa-flickr30k": "captioner_real",
    "finetune-shapes": "finetune",
    "finetune-coco": "finetune",
    "finetune-flickr30k": "finetune",
}
# What each makes, for the help of the command line.
MEANINGS = {
    "clip-shapes": "a small CLIP on Shapes, from nothing",
    "vqa-shapes": "a CLIPmapper that answers questions about Shapes",
    "caption-shapes": "a CLIPmapper that captions Shapes",
    "vqa-v2": "a CLIPmapper that answers the questions of VQA v2, over a CLIP",
    "caption-coco": "a CLIPmapper that captions COCO, over a CLIP",
    "gridtd-shapes": "a captioner (GridTD) on Shapes, from nothing",
    "aoa-shapes": "a captioner (AoA) on Shapes, from nothing",
    "gridtd-coco": "a captioner (GridTD) on COCO",
    "aoa-coco": "a captioner (AoA) on COCO",
    "gridtd-flickr30k": "a captioner (GridTD) on Flickr30k",
    "aoa-flickr30k": "a captioner (AoA) on Flickr30k",
    "finetune-shapes": "a captioner of Shapes, fine-tuned",
    "finetune-coco": "a captioner of COCO, fine-tuned",
    "finetune-flickr30k": "a captioner of Flickr30k, fine-tuned",
}


class Recipe(NamedTuple):
    """An experiment.

    Attributes:
      settings: the dataclass of its settings; each field is a command-line option.
      model: the class of model that it makes and judges.
      train: `train(settings, folder)` makes a model, writes it into the folder, and returns it as
        it is there. A folder that exists and is no model's (FileExistsError), data that are not
        there (FileNotFoundError) and sizes that do not fit (ValueError) are said before any work;
        what else can go wrong is said in `jaxrel.train.loop.fit`.
      evaluate: `evaluate(model, ...)` judges one on held-out data.
      card: `card(folder, result)` makes the model's README of what `evaluate` returned, if the
        recipe has one. A folder without settings.json raises FileNotFoundError.
      tables: `tables(result)` gives the tables of a result, where they are not simply all numbers.
    """

    settings: type
    model: type
    train: Callable[..., Any]
    evaluate: Callable[..., dict[str, Any]]
    card: Callable[..., str] | None = None
    tables: Callable[..., list[Any]] | None = None


def is_real(name: str) -> bool:
    """Whether a recipe needs a data set of photographs; Shapes are drawn."""
    return not name.endswith("-shapes")


def find_recipe(name: str) -> Recipe:
    """Import a recipe.

    Raises:
      KeyError: there is none of that name.
    """
    module = importlib.import_module(f"jaxrel.train.recipes.{RECIPES[name]}")
    return module.RECIPES[name]
