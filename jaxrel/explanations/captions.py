"""`explain` for models of captions: each word, in the image's pixels and the preceding words.

The relevance itself is that of `jaxrel.explanations.words`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from PIL import Image

from jaxrel.explanations.examples import Rows, rows_of
from jaxrel.explanations.methods import Request, computed
from jaxrel.explanations.words import in_pixels, word_program, word_relevance
from jaxrel.tracing.sharding import fetch, shard_rows

# So many backward passes of one image go together: more would need more memory, not less time.
_TOGETHER = 32
# These read one place, the attention's map or the last feature map; the rest go through all.
COVERAGE = {
    "attention": {"of": "layers of attention", "followed": 1, "layers": 1, "share": 1.0},
    "grad_cam": {"of": "operations after the last feature map", "share": 1.0},
}
# Captions are cut to a multiple of this, and as many words go together: programs are compiled per
# length.
_LENGTHS = 4


def check(model: Any, request: Request) -> None:
    """Raise ValueError where the model cannot be explained as asked."""
    if request.layers is not None:
        raise ValueError(
            f"layers choose attention maps, and {type(model).__name__} has one layer of attention"
        )
    if request.sinks is not None:
        raise ValueError(
            "sinks are tokens whose columns are left out of the maps of a transformer, and "
            f"{type(model).__name__} has none"
        )
    if model.layout.streams[0].grid is None:
        raise ValueError(
            "this model reads features of regions and not images, and there is no map to draw; "
            "jaxrel.lrp with argnums=None, at='features/tokens' gives the relevance of regions"
        )


def relevance(
    model: Any,
    prepared: Mapping[str, Any],
    rows: Mapping[str, Any],
    request: Request,
    *,
    count: int,
    size: int,
) -> Iterator[tuple[Rows, np.ndarray, dict[str, dict[str, Any]]]]:
    """Explain each row, a word of a caption.

    Args:
      model: a model that speaks the protocols `Explainable` and `Captions`.
      prepared: images and captions, one caption per image, as `prepare` returns them.
      rows: the same with one row per word, as `pairs` returns them.
      request: the methods and their settings.
      count: how many of the prepared captions are asked for; others fill up.
      size: how many captions go together: as many as are prepared.

    Yields:
      Rows, the score of each that is asked for, and by method the fields of an `Explanation` that
      depend on it.
    """
    del size
    words = int((np.asarray(rows["example"]) < count).sum())
    (batch,) = rows_of(rows, count, -(-words // _TOGETHER) * _TOGETHER)
    example, position = (np.asarray(batch.inputs[key])[:words] for key in ("example", "position"))
    places, column = _by_caption(example, position, len(prepared["text"]))
    score, found = _by_word(model, prepared, places, request)
    content = np.asarray(model.content(batch.inputs)["text"])[:words]
    shown = model.tokens(batch.inputs)[:words]
    asked = [row[i] for row, i in zip(shown, position, strict=True)]
    heads = request.heads
    chosen = "all heads" if heads is None else f"heads {', '.join(map(str, heads))}"
    # A detector was measured on maps of all heads and of the usual rules.
    judge = request.detector if heads is None and request.lrp is None else None
    fields = {}
    for one in request.methods:
        of_image, of_text = (x[example, column] for x in found[one])
        of_text = np.where(content, _padded(of_text, content.shape[1]), 0)
        summary = {"image": of_image.sum((1, 2)).tolist(), "text": of_text.sum(1).tolist()}
        fields[one] = {
            "image": of_image,
            "text": of_text,
            "settings": f"summed over the features of each pixel and word, {chosen}",
            "report": {
                "example": example.tolist(),
                "relevance": summary,
                "coverage": COVERAGE.get(one, {"of": "operations", "share": 1.0}),
            },
        }
        if judge is not None:
            maps = in_pixels(of_image, prepared["image"].shape[1])
            fields[one]["flags"] = judge.flags(one, asked, maps)
    yield batch, score[example, column], fields


def map_shapes(model: Any, methods: Sequence[str]) -> set[tuple[int, ...]]:
    """Rows and columns of the image's relevance: of pixels, and of the features' grid."""
    by_grid = {"grad_cam", "attention"} & {*methods}
    shapes = {model.layout.streams[0].grid} if by_grid else set()
    if set(methods) - by_grid:
        # How large an image is, the model's own preprocessing says.
        prepared = model.prepare(image=Image.new("RGB", (8, 8)), text=None)
        shapes.add(tuple(prepared["image"].shape[1:3]))
    return shapes


def program(model: Any, prepared: Any, rows: Any, request: Request) -> jax.stages.Lowered:
    """The program that explains the longest captions of such images, not yet compiled.

    Args:
      model, request: as of `relevance`.
      prepared: images and captions, or their shapes.
      rows: not used.
    """
    del rows
    captions, length = prepared["text"].shape
    words = -(-(length - 1) // _LENGTHS) * _LENGTHS
    places = jax.ShapeDtypeStruct((captions, words), np.int32)
    options = {"method": request.methods, "lrp": request.lrp}
    return word_program(model, prepared, places, at_once=max(1, _TOGETHER // captions), **options)


def _by_word(
    model: Any, prepared: Mapping[str, Any], places: np.ndarray, request: Request
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores and relevance by caption and word, of captions that are cut after the last word."""
    length = -(-(int(places.max()) + 1) // _LENGTHS) * _LENGTHS
    inputs = {**computed(prepared), "text": prepared["text"][:, :length]}
    if request.heads is not None:
        inputs["heads"] = _chosen_heads(model, request.heads, len(places))
    explained = word_relevance(
        model,
        *shard_rows((inputs, places)),
        method=request.methods,
        lrp=request.lrp,
        at_once=max(1, _TOGETHER // len(places)),
    )
    return fetch(explained)


def _padded(of_text: np.ndarray, tokens: int) -> np.ndarray:
    return np.pad(of_text, ((0, 0), (0, tokens - of_text.shape[1])))


def _by_caption(
    example: Int[np.ndarray, " rows"], position: Int[np.ndarray, " rows"], captions: int
) -> tuple[Int[np.ndarray, "captions words"], Int[np.ndarray, " rows"]]:
    """The positions to explain by caption, filled up with 0, and each row's column in it."""
    count = np.zeros(captions, int)
    column = np.empty(len(example), int)
    for row, caption in enumerate(example):
        column[row] = count[caption]
        count[caption] += 1
    places = np.zeros((captions, -(-count.max() // _LENGTHS) * _LENGTHS), np.int32)
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
