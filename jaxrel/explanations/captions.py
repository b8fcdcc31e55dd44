"""`explain` for models that score the words of captions: see `jaxrel.explanations.words`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxrel.attention.methods import check_methods
from jaxrel.explanations.result import Explanation
from jaxrel.explanations.words import SIGNED_WORDS, WORD_METHODS, in_pixels, word_relevance
from jaxrel.images import seen_images
from jaxrel.metrics.detector import Detector
from jaxrel.tracing.sharding import shard_rows

# So many backward passes of one image go together: more would need more memory, not less time.
_TOGETHER = 32
# Captions are cut to a multiple of this: programs are compiled per length.
_LENGTHS = 4


def explain_captions(
    model: Any,
    *,
    image: Any,
    text: Any,
    target: Any,
    method: str | Sequence[str],
    layers: Any,
    heads: Sequence[int] | None,
    lrp: Any,
    name: str,
    detector: Detector | None = None,
) -> Any:
    """Explain each word of the captions of images; one row per word.

    The arguments, results and errors are those of `jaxrel.explain`.
    """
    methods = check_methods(method, WORD_METHODS, "method")
    if layers is not None:
        raise ValueError(
            f"layers choose attention maps, and {type(model).__name__} has one layer of attention"
        )
    if getattr(model.layout.streams[0], "grid", None) is None:
        raise ValueError(
            "this model reads features of regions and not images, and there is no map to draw; "
            "jaxrel.lrp with argnums=None, at='features/tokens' gives the relevance of regions"
        )
    prepared = dict(model.prepare(image=image, text=text))
    rows = model.pairs(prepared, target)
    example, position = (np.asarray(rows[key]) for key in ("example", "position"))
    places, column = _by_caption(example, position, len(prepared["text"]))
    if heads is not None:
        prepared["heads"] = _chosen_heads(model, heads, len(places))
    words = prepared["text"].shape[1]
    length = min(words, -(-(int(position.max()) + 1) // _LENGTHS) * _LENGTHS)
    score, relevance = jax.device_get(
        word_relevance(
            model,
            *shard_rows((prepared | {"text": prepared["text"][:, :length]}, places)),
            method=methods,
            lrp=lrp,
            at_once=max(1, _TOGETHER // len(places)),
        )
    )
    content = np.asarray(model.content(rows)["text"])
    tokens = tuple(map(tuple, model.tokens(rows)))
    asked = [row[i] for row, i in zip(tokens, position, strict=True)]
    # Its maps were those of all heads and of the usual rules.
    judges = detector if heads is None and lrp is None else None
    side = prepared["image"].shape[1]
    shared: dict[str, Any] = {
        "target": tuple(model.describe(rows)),
        "score": score[example, column],
        "tokens": tokens,
        "pixels": seen_images(model, image, len(example), example),
        "model": name,
    }
    chosen = "all heads" if heads is None else f"heads {', '.join(map(str, heads))}"
    explanations = []
    for one in methods:
        of_image, of_text = (x[example, column] for x in relevance[one])
        of_text = np.where(content, np.pad(of_text, ((0, 0), (0, words - length))), 0)
        summary = {"image": of_image.sum((1, 2)).tolist(), "text": of_text.sum(1).tolist()}
        explanations.append(
            Explanation(
                **shared,
                image=of_image,
                text=of_text,
                method=one,
                signed=one in SIGNED_WORDS,
                settings=f"summed over the features of each pixel and word, {chosen}",
                report={"example": example.tolist(), "relevance": summary},
                flags=judges.flags(one, asked, in_pixels(of_image, side)) if judges else (),
            )
        )
    return explanations[0] if isinstance(method, str) else explanations


def _by_caption(
    example: Int[np.ndarray, " rows"], position: Int[np.ndarray, " rows"], captions: int
) -> tuple[Int[np.ndarray, "captions words"], Int[np.ndarray, " rows"]]:
    """The positions to explain by caption, filled up with 0, and each row's column in it."""
    count = np.zeros(captions, int)
    column = np.empty(len(example), int)
    for row, caption in enumerate(example):
        column[row] = count[caption]
        count[caption] += 1
    places = np.zeros((captions, count.max()), np.int32)
    places[example, column] = position
    return places, column


def _chosen_heads(model: Any, heads: Sequence[int], captions: int) -> np.ndarray:
    """Which heads relevance goes through, [captions, heads]."""
    known = getattr(model.config, "heads", 1)
    if not len(heads):
        raise ValueError(f"heads is empty; choose some of 0 to {known - 1}, or None for all")
    chosen = np.zeros(known, bool)
    for head in heads:
        if not -known <= head < known:
            raise ValueError(
                f"heads: there is no head {head}; the model has heads 0 to {known - 1}"
            )
        chosen[head] = True
    return np.broadcast_to(chosen, (captions, known))
