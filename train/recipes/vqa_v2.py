"""Recipe `vqa-v2`: CLIPmapper learns to answer the questions of VQA v2, over a CLIP from the hub.

Images are read, resized and normalised by CLIP's own preprocessing while the device computes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxrel.metrics import bootstrap
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperVQA
from jaxrel.models.processor import Processor
from jaxrel.train.data import vqa_v2
from jaxrel.train.data.files import ImageSource
from jaxrel.train.data.image_texts import ImageTexts
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.vqa import best_answers
from jaxrel.train.loop.batches import Example
from jaxrel.train.loop.train import train_model
from jaxrel.train.losses.answers import soft_answer_loss
from jaxrel.train.recipes.mapper import MapperReal, new_model
from jaxrel.train.recipes.real import how_many, read_images
from jaxrel.train.recipes.registry import Recipe
from jaxrel.train.recipes.settings import setting


@dataclasses.dataclass(frozen=True)
class VqaV2(MapperReal):
    """Settings of the recipe `vqa-v2`."""

    at_least: int = setting(9, "how often an answer must occur to be one of the model's")
    counted: str = setting("train,val", "splits in which answers are counted, with commas")


class Questions(ImageTexts):
    """Questions of VQA v2 as arrays: image, token ids, soft scores of the answers.

    Args:
      source: of `vqa_v2.questions`.
      processor, context: see `ImageTexts`.
      vocabulary: the answers.
    """

    def __init__(
        self,
        source: ImageSource,
        processor: Processor,
        context: int,
        vocabulary: vqa_v2.AnswerVocabulary,
    ) -> None:
        asked = [[record["question"]] for record in source.records]
        super().__init__(source, asked, processor, context, "questions")
        self._vocabulary = vocabulary

    def __getitem__(self, index: int) -> Example:
        answers = self.source.records[self.images[index]]["answers"]
        return super().__getitem__(index) | {"target": self._vocabulary.scores(answers)}


def train(recipe: VqaV2, folder: Path) -> CLIPMapper:
    """Train on VQA v2 with soft targets; see `soft_answer_loss` and `Recipe`."""
    check_new_folder(folder)
    source = read_images(vqa_v2.questions, recipe)
    vocabulary = vqa_v2.build_vocabulary(
        recipe.data, recipe.counted.split(","), at_least=recipe.at_least
    )
    model = new_model(recipe, CLIPMapperVQA, answers=vocabulary.answers, several=True)
    examples = Questions(source, model.processor, recipe.context, vocabulary)

    def loss(parts: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        model, text = parts["model"], batch["text"]
        tokens, _ = model.encode_image(batch["image"])
        logits = model.answer_logits(model.map(tokens, text)[0], text)
        return soft_answer_loss(logits, batch["target"])

    name, dtype = "vqa-v2", "float32"
    return train_model(recipe, folder, {"model": model}, loss, examples, name=name, dtype=dtype)


def evaluate(
    model: CLIPMapperVQA, *, data: str, split: str = "val", scenes: int = 2048, batch: int = 32
) -> dict[str, Any]:
    """The official VQA accuracy on the first questions of a split, in all and by answer type.

    Args:
      model: trained by `train`.
      data: the folder of `vqa_v2.questions`.
      split: one with annotations.
      scenes: how many questions.
      batch: questions at a time.

    Raises:
      FileNotFoundError, ValueError: see `vqa_v2.questions`.
    """
    source = vqa_v2.questions(data, split)
    count = how_many(scenes, source)
    scores, kinds = [], []
    for rows in equal_batches(count, batch, "answering", leave=False):
        records = [source[i] for i in rows]
        inputs = model.prepare(
            image=[record["image"] for record in records],
            text=[record["question"] for record in records],
        )
        for record, index in zip(records, np.asarray(best_answers(model, inputs)), strict=True):
            answer = model.config.answers[index]
            scores.append(vqa_v2.vqa_accuracy(answer, record["answers"]))
            kinds.append(record["answer_type"])
    accuracy, kind = np.asarray(scores[:count]), np.asarray(kinds[:count])
    return {
        "protocol": "vqa-v2/1",
        "split": split,
        "questions": count,
        "accuracy": {"all": bootstrap(accuracy)._asdict()}
        | {one: bootstrap(accuracy[kind == one])._asdict() for one in sorted(set(kinds))},
    }


RECIPES = {"vqa-v2": Recipe(VqaV2, CLIPMapperVQA, train, evaluate)}
