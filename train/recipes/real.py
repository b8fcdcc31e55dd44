"""What the recipes on photographs share: reading a data set, and judging captions by CIDEr-D."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrel.metrics import bootstrap
from jaxrel.metrics.caption_scores import CiderD, tokenise
from jaxrel.train.data.files import ImageSource
from jaxrel.train.evaluate.batching import equal_batches


def read_images(reader: Callable[..., ImageSource], recipe: Any) -> ImageSource:
    """Read a recipe's data set.

    Args:
      reader: of the data set: `reader(folder, split, missing=, corrupt=)`.
      recipe: its settings, an `OnImages`.

    Raises:
      FileNotFoundError, ValueError: as the reader.
    """
    return reader(recipe.data, recipe.split, missing=recipe.missing, corrupt=recipe.corrupt)


def how_many(asked: int, source: ImageSource) -> int:
    """How many examples are judged: at most all.

    Raises:
      ValueError: fewer than one is asked for.
    """
    if asked < 1:
        raise ValueError(f"scenes must be at least 1, got {asked}")
    return min(asked, len(source))


def judge_captions(
    model: Any, source: ImageSource, *, scenes: int, batch: int, **options: Any
) -> dict[str, Any]:
    """CIDEr-D of a model's captions against all references, words split without Java's tokenizer.

    Words are weighed over the whole split, as in published numbers, however many images are judged.

    Args:
      model: what writes captions.
      source: images with "captions".
      scenes: how many images.
      batch: images at a time.
      **options: of `model.predict`.

    Returns:
      "images", "CIDEr-D" with its bootstrap 95% interval, and the first captions as "examples".

    Raises:
      ValueError: no scenes.
    """
    count = how_many(scenes, source)
    captions: list[str] = []
    for rows in equal_batches(count, batch, "captioning", leave=False):
        inputs = {"image": model.processor.image([source[i]["image"] for i in rows])}
        captions += model.predict(inputs, **options)
    references = [[tokenise(c) for c in record["captions"]] for record in source.records]
    cider = CiderD.from_references(references)
    scores = cider.score([tokenise(c) for c in captions[:count]], references[:count])
    return {
        "images": count,
        "CIDEr-D": bootstrap(np.asarray(scores))._asdict(),
        "examples": captions[:5],
    }
