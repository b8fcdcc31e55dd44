"""Recipe `caption-coco`: CLIPmapper learns to caption COCO, over a CLIP from the hub.

Images are read, resized and normalised by CLIP's own preprocessing while the device computes.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import Array

from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption
from jaxrel.train.data import coco
from jaxrel.train.data.image_texts import ImageTexts
from jaxrel.train.loop.train import train_model
from jaxrel.train.losses.captions import mapper_caption_loss
from jaxrel.train.recipes.mapper import MapperReal, new_model
from jaxrel.train.recipes.real import judge_captions, read_images
from jaxrel.train.recipes.registry import Recipe


@dataclasses.dataclass(frozen=True)
class CaptionCoco(MapperReal):
    """Settings of the recipe `caption-coco`: COCO in Karpathy's splits."""

    split: str = "train+restval"
    context: int = 40


def train(recipe: CaptionCoco, folder: Path) -> CLIPMapper:
    """Train on the captions of COCO, one caption of an image per example; see `Recipe`."""
    check_new_folder(folder)
    source = read_images(coco.karpathy_captions, recipe)
    model = new_model(recipe, CLIPMapperCaption)
    captions = [record["captions"] for record in source.records]
    examples = ImageTexts(source, captions, model.processor, recipe.context)

    def loss(parts: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        tokens, _ = parts["model"].encode_image(batch["image"])
        return mapper_caption_loss(parts["model"], tokens, batch["text"])

    name, dtype = "caption-coco", "float32"
    return train_model(recipe, folder, {"model": model}, loss, examples, name=name, dtype=dtype)


def evaluate(
    model: CLIPMapperCaption, *, data: str, split: str = "test", scenes: int = 5000, batch: int = 32
) -> dict[str, Any]:
    """CIDEr-D of greedy captions against all references; see `judge_captions`.

    Args:
      model: trained by `train`.
      data: the folder of `coco.karpathy_captions`.
      split: of Karpathy's.
      scenes: how many images.
      batch: images at a time.

    Raises:
      FileNotFoundError, ValueError: see `coco.karpathy_captions`.
    """
    source = coco.karpathy_captions(data, split)
    judged = judge_captions(model, source, scenes=scenes, batch=batch)
    return {"protocol": "caption-coco/1", "split": split, **judged}


RECIPES = {"caption-coco": Recipe(CaptionCoco, CLIPMapperCaption, train, evaluate)}
