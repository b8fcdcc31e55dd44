"""Recipe `caption-shapes`: CLIPmapper learns to caption Shapes, on two CPU cores.

Stage 1 begins as a CLIP. The loss of naming the object in each patch is added while training; see
`jaxrel.train.losses.auxiliary`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import Array

from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption
from jaxrel.train.data.shapes.examples import CaptionExamples
from jaxrel.train.evaluate import captions
from jaxrel.train.evaluate.tables import grid
from jaxrel.train.losses.captions import mapper_caption_loss
from jaxrel.train.recipes.mapper import MapperShapes, new_model_of_shapes, train_on_shapes
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import setting, write_card


@dataclasses.dataclass(frozen=True)
class CaptionShapes(MapperShapes):
    """Settings of the recipe `caption-shapes`: each image of a batch with one caption."""

    least_context = (32, "captions")

    batch: int = 64
    context: int = 34
    full: float = setting(1.0, "share of captions that name every object", "from 0 to 1")


def train(recipe: CaptionShapes, folder: Path) -> CLIPMapper:
    """Train on one caption of each image of a batch; see `Recipe`."""
    check_new_folder(folder)
    model = new_model_of_shapes(recipe, CLIPMapperCaption)
    grid = model.config.clip.vision.grid
    examples = CaptionExamples(recipe, "train", model.processor, recipe.context, grid)

    def loss(parts: Any, tokens: Array, batch: dict[str, Array]) -> Any:
        return mapper_caption_loss(parts["model"], tokens, batch["text"])

    parts = {"model": model}
    return train_on_shapes(recipe, folder, parts, loss, examples, name="caption-shapes")


def card(folder: Path, result: dict[str, Any]) -> str:
    """The model card; `result` is what `evaluate` found."""
    (table,) = captions.tables(result)
    return write_card(
        CARD,
        folder,
        CaptionShapes(),
        table=grid(table.columns, table.rows),
        split=result["split"],
        tested=result["scenes"],
        examples="\n".join(f"- {caption}" for caption in result["examples"]),
    )


CARD = """\
# caption-shapes

A CLIPmapper that captions 64x64 images of coloured shapes: the model that `jaxrel explain
--caption` uses when none is named. It knows the words of the Shapes grammar and nothing of
photographs.

    jaxrel train caption-shapes{flags} --out models/pretrained/caption-shapes
    jaxrel evaluate caption-shapes --model models/pretrained/caption-shapes --card

Stage 1 began as {stage1}. Trained on {scenes} scenes of the split `train` (data seed {data_seed}),
{steps} steps of {batch} images with one caption each; settings.json has every setting,
train.jsonl the loss.

Its greedy captions judged on the split `{split}` ({tested} scenes), with bootstrap 95% intervals:

{table}
The first captions (its tokenizer knows no commas; they are left out):

{examples}
"""

RECIPES = {
    "caption-shapes": Recipe(
        CaptionShapes, CLIPMapperCaption, train, captions.evaluate, card, captions.tables
    )
}
