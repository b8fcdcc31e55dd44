"""Recipe `vqa-shapes`: CLIPmapper learns to answer questions about Shapes, on two CPU cores.

Stage 1 begins as a CLIPmapper that captions. Two losses are added while training; see
`jaxrel.train.losses.auxiliary`. That of naming the object in each patch and the patch's place
gives stage 1 a notion of left and below, which a CLIP need not have. That of finding what each
question is about reads its patches from the image's tokens in stage 2, and its place from the token
that the answer is read from. Without these, counts and comparisons were learnt late, and how two
objects lie to each other not at all.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperVQA
from jaxrel.train.data.shapes import Scene, answers
from jaxrel.train.data.shapes.examples import draw_scenes
from jaxrel.train.data.shapes.patches import QUESTIONS, asked_by_patch, asked_places
from jaxrel.train.evaluate import vqa
from jaxrel.train.evaluate.tables import cell, grid
from jaxrel.train.loop.batches import Arrays
from jaxrel.train.losses.answers import answer_loss
from jaxrel.train.losses.auxiliary import Asked
from jaxrel.train.recipes.mapper import MapperShapes, new_model_of_shapes, train_on_shapes
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import setting, write_card


@dataclasses.dataclass(frozen=True)
class VqaShapes(MapperShapes):
    """Settings of the recipe `vqa-shapes`: each image of a batch with all its questions."""

    least_context = (18, "questions")

    stage1: str = "caption-shapes"
    steps: int = 3_500
    batch: int = 16
    asked_loss: float = setting(
        0.5, "weight of the loss of finding what each question is about", "0 or more"
    )


def examples(recipe: VqaShapes, model: CLIPMapperVQA) -> Arrays:
    """Scenes with all their questions; what is missing to seven has the answer -1."""
    count = recipe.scenes
    grid = model.config.clip.vision.grid

    def read(scene: Scene) -> Any:
        return scene.questions, asked_by_patch(scene, grid), asked_places(scene, grid)

    arrays, rest = draw_scenes(recipe.data_seed, "train", count, read, grid=grid)
    asked = [questions for questions, *_ in rest]
    index = {answer: i for i, answer in enumerate(model.config.answers)}
    ids = model.processor.text([q.text for qs in asked for q in qs], recipe.context)
    text = np.zeros((count, QUESTIONS, recipe.context), np.int32)
    answer = np.full((count, QUESTIONS), -1, np.int8)
    start = 0
    for i, questions in enumerate(asked):
        text[i, : len(questions)] = ids[start : start + len(questions)]
        # A text that nobody asks still needs an end.
        text[i, len(questions) :] = ids[start]
        answer[i, : len(questions)] = [index[q.answer] for q in questions]
        start += len(questions)
    patches, places = (np.stack(part) for part in list(zip(*rest, strict=True))[1:])
    return Arrays(**arrays, text=text, answer=answer, asked=patches, place=places)


def train(recipe: VqaShapes, folder: Path) -> CLIPMapper:
    """Train on all questions of each image of a batch; see `Recipe`."""
    check_new_folder(folder)
    model = new_model_of_shapes(recipe, CLIPMapperVQA, answers=answers())
    about = Asked(model.config.width, rngs=nnx.Rngs(recipe.seed))

    def loss(parts: Any, tokens: Array, batch: dict[str, Array]) -> Any:
        return answer_loss(parts["model"], parts["about"], tokens, batch, recipe.asked_loss)

    parts, source = {"model": model, "about": about}, examples(recipe, model)
    return train_on_shapes(recipe, folder, parts, loss, source, name="vqa-shapes")


def card(folder: Path, result: dict[str, Any]) -> str:
    """The model card; `result` is what `evaluate` found."""
    local = result["localisation"]
    accuracy, *localisation = (grid(one.columns, one.rows) for one in vqa.tables(result))
    return write_card(
        CARD,
        folder,
        VqaShapes(),
        accuracy=accuracy,
        split=result["split"],
        tested=result["scenes"],
        questions=result["questions"],
        examples=local["examples"],
        chance=cell(local.get("chance"), nothing="-"),
        localisation="".join(localisation),
    )


CARD = """\
# vqa-shapes

A CLIPmapper that answers questions about 64x64 images of coloured shapes: the model that
`jaxrel explain --question` uses when none is named. It knows the words and the 26 answers of the
Shapes grammar and nothing of photographs.

    jaxrel train vqa-shapes{flags} --out models/pretrained/vqa-shapes
    jaxrel evaluate vqa-shapes --model models/pretrained/vqa-shapes --card

Stage 1 began as {stage1}. Trained on {scenes} scenes of the split `train` (data seed {data_seed}),
{steps} steps of {batch} images with all their questions; settings.json has every setting,
train.jsonl the loss.

Judged on the split `{split}` ({tested} scenes, {questions} questions), with bootstrap 95%
intervals. With the image withheld all patches are hidden from attention; the last column is the
share of the most frequent answer.

{accuracy}
Relevance for rightly answered questions about the colour, shape or size of one object of several
({examples} questions): relevance mass accuracy (the share of relevance inside the object's mask),
its difference to equal accumulation's on the same questions, and how often the most relevant point
is on the object (pointing game). The mass accuracy of a map without information is the mask's share
of the image: {chance}.

{localisation}"""

RECIPES = {"vqa-shapes": Recipe(VqaShapes, CLIPMapperVQA, train, vqa.evaluate, card, vqa.tables)}
