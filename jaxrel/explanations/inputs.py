"""What is told of each example: the file, the question, what the model saw, and what to know."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrel.explanations.examples import Batch, Rows


def examples(
    model: Any, batch: Batch, rows: Rows, *, seen: Sequence[np.ndarray], score: np.ndarray
) -> list[dict[str, Any]]:
    """By row, what a reader of its explanation wants to know of the input.

    Args:
      model: a model that speaks the protocol `Explainable`.
      batch: the examples, as they were given.
      rows: the rows to explain, as `pairs` returns them.
      seen: by row, the part of its image that the model sees.
      score: by row.

    Returns:
      Dictionaries, with what is known of: "file", "question" or "sentence", "against" (what the
      target is contrasted with), "image" (its size, and what the model saw of it), "word",
      "position" and "caption" (the explained word, its place and the number of its caption),
      "familiarity" and "unknown words" (see `Explainable`), and "notes", what to know before
      reading the map.
    """
    inputs = {name: np.asarray(value)[: rows.count] for name, value in rows.inputs.items()}
    of = inputs.get("example", np.arange(rows.count)).tolist()
    images = [batch.image[i] if isinstance(batch.image, list) else batch.image for i in of]
    texts = [batch.text[i] if isinstance(batch.text, list) else batch.text or "" for i in of]
    asked = "question" if getattr(model.layout, "schedule", ()) else "sentence"
    captions = "position" in inputs or "words" in inputs
    known = _familiarity(model, inputs, texts, score)
    side = inputs["image"].shape[1:3] if "image" in inputs else ()
    words = model.tokens(inputs) if "position" in inputs else ()
    found: list[dict[str, Any]] = []
    for i, example in enumerate(of):
        about = {
            "file": os.path.basename(str(getattr(images[i], "filename", "") or "")),
            asked: "" if captions else texts[i],
            "against": _others(batch.against, example),
            "image": _sizes(images[i], seen[i], side) if side else "",
            **known[i],
        }
        about = {name: value for name, value in about.items() if value not in ("", [], {})}
        if words:
            position = int(inputs["position"][i])
            about |= {
                "word": words[i][position],
                "position": position,
                "caption": batch.start + example,
            }
        found.append(about)
    return found


def _others(against: Any, example: int) -> str:
    """In words, what an example is contrasted with; "" where it is not."""
    of = against[example] if isinstance(against, list) else against
    if isinstance(of, tuple):
        return ", ".join(map(str, of))
    return "" if of is None else "all others" if str(of) == "*" else str(of)


def _sizes(image: Any, seen: np.ndarray, side: Sequence[int]) -> str:
    given = image.size if hasattr(image, "size") and not isinstance(image, np.ndarray) else None
    whole = given or np.shape(image)[1::-1]
    part = seen.shape[1::-1]
    what = "all of it" if tuple(whole) == tuple(part) else "the middle {} x {}".format(*part)
    return "{} x {} pixels; the model saw {}, as {} x {}".format(*whole, what, side[1], side[0])


def _familiarity(
    model: Any, rows: Mapping[str, Any], text: Sequence[Any], score: np.ndarray
) -> list[dict[str, Any]]:
    measure = getattr(model, "familiarity", None)
    return [{}] * len(score) if measure is None else measure(rows, text, score)
