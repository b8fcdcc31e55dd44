"""Recipes `vqa-v2` and `caption-coco`: CLIPmapper on real data, with a CLIP from the hub.

Images are read, resized and normalised by CLIP's own preprocessing while the device computes.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from tqdm.auto import trange

from jaxrel.metrics import bootstrap
from jaxrel.metrics.caption_scores import CiderD, tokenise
from jaxrel.models.checkpoint import check_new_folder
from jaxrel.models.clipmapper import CLIPMapper, CLIPMapperCaption, CLIPMapperVQA
from jaxrel.models.processor import Processor, quiet_transformers
from jaxrel.train.data import coco, vqa_v2
from jaxrel.train.data.files import Choice, ImageSource
from jaxrel.train.evaluate.vqa import best_answers
from jaxrel.train.recipes.mapper import caption_loss, new_model, train_mapper
from jaxrel.train.recipes.settings import CaptionCoco, VqaV2

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions of VQA v2 as arrays: image, token ids, soft scores of the answers.

    Args:
      source: of `vqa_v2.questions`.
      processor: of the model.
      vocabulary: the answers.
      context: tokens that the model reads; longer questions are left out with one warning.
    """

    source: ImageSource
    processor: Processor
    vocabulary: vqa_v2.AnswerVocabulary
    context: int
    _fitting: tuple[int, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        asked = [record["question"] for record in self.source.records]
        fits = _fits(self.processor, asked, self.context, "questions")
        object.__setattr__(self, "_fitting", tuple(np.flatnonzero(fits).tolist()))

    def __len__(self) -> int:
        return len(self._fitting)

    def __getitem__(self, index: int) -> Example:
        record = self.source[self._fitting[index]]
        return {
            "id": np.int64(record["id"]),
            "image": self.processor.image(record["image"])[0],
            "text": self.processor.text(record["question"], self.context)[0],
            "target": self.vocabulary.scores(record["answers"]),
        }


@dataclasses.dataclass(frozen=True)
class Captions:
    """Every caption of every image as arrays: image and token ids.

    Args:
      source: of `coco.karpathy_captions`.
      processor: of the model.
      context: tokens that the model reads; longer captions are left out with one warning.
    """

    source: ImageSource
    processor: Processor
    context: int
    _places: tuple[tuple[int, int], ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        captions = [record["captions"] for record in self.source.records]
        places = [(i, j) for i, texts in enumerate(captions) for j in range(len(texts))]
        written = [text for texts in captions for text in texts]
        fits = _fits(self.processor, written, self.context, "captions")
        kept = tuple(place for place, fine in zip(places, fits, strict=True) if fine)
        object.__setattr__(self, "_places", kept)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        image, caption = self._places[index]
        record = self.source[image]
        return {
            "id": np.int64(record["id"]),
            "image": self.processor.image(record["image"])[0],
            "text": self.processor.text(record["captions"][caption], self.context)[0],
        }


def _fits(processor: Processor, texts: list[str], context: int, what: str) -> list[bool]:
    """Whether the model can read each text; warns of those that are too long."""
    with quiet_transformers():
        ids = processor.tokenizer(texts, verbose=False)["input_ids"]
    fits = [len(row) <= context for row in ids]
    if not all(fits):
        warnings.warn(
            f"{fits.count(False)} of {len(fits)} {what} have more than {context} tokens and are "
            "left out; a larger context keeps them",
            UserWarning,
            stacklevel=4,
        )
    return fits


def train_vqa(recipe: VqaV2, folder: Path) -> CLIPMapper:
    """Train on VQA v2 with soft targets: sigmoid cross-entropy over all answers.

    Args:
      recipe: the settings; `data` is the folder of `vqa_v2.questions`.
      folder: where the model goes; see `train_mapper`.

    Raises:
      FileExistsError, FileNotFoundError: before any work; see `vqa_v2.questions`.
      ValueError, FloatingPointError, OSError: see `new_model` and `fit`.
    """
    check_new_folder(folder)
    source = vqa_v2.questions(
        recipe.data, recipe.split, missing=choice(recipe.missing), corrupt=choice(recipe.corrupt)
    )
    vocabulary = vqa_v2.build_vocabulary(
        recipe.data, recipe.counted.split(","), at_least=recipe.at_least
    )
    model = new_model(recipe, CLIPMapperVQA, answers=vocabulary.answers, several=True)
    examples = Questions(source, model.processor, vocabulary, recipe.context)

    def loss(parts: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        model, text = parts["model"], batch["text"]
        tokens, _ = model.encode_image(batch["image"])
        logits = model.answer_logits(model.map(tokens, text)[0], text)
        entropy = optax.sigmoid_binary_cross_entropy(logits, batch["target"]).sum(-1).mean()
        # What the most probable answer scores: min(n / 3, 1).
        best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
        return entropy, {"accuracy": (best * batch["target"]).sum(-1).mean()}

    parts = {"model": model}
    return train_mapper(
        recipe, folder, parts, loss, examples, name="vqa-v2", workers=recipe.workers
    )


def train_caption(recipe: CaptionCoco, folder: Path) -> CLIPMapper:
    """Train on COCO captions, one caption of an image per example.

    Args:
      recipe: the settings; `data` is the folder of `coco.karpathy_captions`.
      folder: where the model goes; see `train_mapper`.

    Raises:
      FileExistsError, FileNotFoundError: before any work; see `coco.karpathy_captions`.
      ValueError, FloatingPointError, OSError: see `new_model` and `fit`.
    """
    check_new_folder(folder)
    source = coco.karpathy_captions(
        recipe.data, recipe.split, missing=choice(recipe.missing), corrupt=choice(recipe.corrupt)
    )
    model = new_model(recipe, CLIPMapperCaption)
    examples = Captions(source, model.processor, recipe.context)

    def loss(parts: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        tokens, _ = parts["model"].encode_image(batch["image"])
        return caption_loss(parts["model"], tokens, batch["text"])

    parts = {"model": model}
    return train_mapper(
        recipe, folder, parts, loss, examples, name="caption-coco", workers=recipe.workers
    )


def evaluate_vqa(
    model: CLIPMapperVQA, *, data: str, split: str = "val", scenes: int = 2048, batch: int = 32
) -> dict[str, Any]:
    """The official VQA accuracy on the first questions of a split, in all and by answer type.

    Args:
      model: trained by `train_vqa`.
      data: the folder of `vqa_v2.questions`.
      split: one with annotations.
      scenes: how many questions.
      batch: questions at a time.

    Raises:
      FileNotFoundError, ValueError: see `vqa_v2.questions`.
    """
    source = vqa_v2.questions(data, split)
    count = _count(scenes, source)
    scores, kinds = [], []
    for start in trange(0, count, batch, desc="answering", leave=False):
        records = [source[i] for i in range(start, min(start + batch, count))]
        # One size compiles once.
        padded = records + records[:1] * (batch - len(records))
        inputs = model.prepare(
            image=[record["image"] for record in padded],
            text=[record["question"] for record in padded],
        )
        best = np.asarray(best_answers(model, inputs))[: len(records)]
        for record, index in zip(records, best, strict=True):
            answer = model.config.answers[index]
            scores.append(vqa_v2.vqa_accuracy(answer, record["answers"]))
            kinds.append(record["answer_type"])
    accuracy, kind = np.asarray(scores), np.asarray(kinds)
    return {
        "protocol": "vqa-v2/1",
        "split": split,
        "questions": count,
        "accuracy": {"all": bootstrap(accuracy)._asdict()}
        | {one: bootstrap(accuracy[kind == one])._asdict() for one in sorted(set(kinds))},
    }


def evaluate_caption(
    model: CLIPMapperCaption, *, data: str, split: str = "test", scenes: int = 5000, batch: int = 32
) -> dict[str, Any]:
    """CIDEr-D of greedy captions against all references, words split without Java's tokenizer.

    Args:
      model: trained by `train_caption`.
      data: the folder of `coco.karpathy_captions`.
      split: of Karpathy's.
      scenes: how many images.
      batch: images at a time.

    Raises:
      FileNotFoundError, ValueError: see `coco.karpathy_captions`.
    """
    source = coco.karpathy_captions(data, split)
    count = _count(scenes, source)
    captions: list[str] = []
    for start in trange(0, count, batch, desc="captioning", leave=False):
        images = [source[i]["image"] for i in range(start, min(start + batch, count))]
        padded = images + images[:1] * (batch - len(images))
        captions += model.predict({"image": model.processor.image(padded)})[: len(images)]
    # Words are weighed over the whole split, as in published numbers, however many are judged.
    references = [[tokenise(c) for c in record["captions"]] for record in source.records]
    cider = CiderD.from_references(references)
    scores = cider.score([tokenise(c) for c in captions], references[:count])
    return {
        "protocol": "caption-coco/1",
        "split": split,
        "images": count,
        "CIDEr-D": bootstrap(np.asarray(scores))._asdict(),
        "examples": captions[:5],
    }


def choice(text: str) -> Choice:
    """A setting that was checked before, as the readers take it."""
    return "skip" if text == "skip" else "error"


def _count(asked: int, source: ImageSource) -> int:
    if asked < 1:
        raise ValueError(f"scenes must be at least 1, got {asked}")
    return min(asked, len(source))
