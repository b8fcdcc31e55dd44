"""`explain`: pictures and sentences in, an `Explanation` out.

Nothing here knows a particular model. What a model must answer is `Explainable`; a function
that is no such model is explained with `jaxrel.attention.relevance` directly.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from jaxrel.attention.importance import measure
from jaxrel.attention.transformation import check_methods, value_and_relevance
from jaxrel.explanation import Explanation


class Explainable(Protocol):
    """What `explain` asks of a model."""

    @property
    def layout(self) -> Any:
        """The streams of tokens: name, modality, tokens, grid and prefix of each."""

    def prepare(self, *, image: Any, text: Any) -> Mapping[str, Any]:
        """Pictures and sentences as the model's inputs."""

    def pairs(self, inputs: Mapping[str, Any], target: Any = None) -> Mapping[str, Any]:
        """Inputs with one row per example to explain."""

    def score(self, inputs: Mapping[str, Any]) -> Any:
        """The scalar to explain, one per row."""

    def describe(self, inputs: Mapping[str, Any]) -> Sequence[str]:
        """By row, what is explained, in words."""

    def readout(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, the token each row's score is read from."""

    def content(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """By stream, which tokens stand for something."""

    def tokens(self, inputs: Mapping[str, Any]) -> Sequence[Sequence[str]]:
        """By row, how to display the text's tokens."""

    def seen(self, picture: Image.Image) -> Image.Image:
        """The part of a picture that the model sees."""


def explain(
    model: Any,
    *,
    image: Any,
    text: Any,
    target: Any = None,
    method: str | Sequence[str] = "weighted",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    importance: str = "grad_value",
    name: str = "",
) -> Any:
    """Explain how much each patch of a picture and each word of a sentence matters to a score.

    For CLIP the score is the similarity of the picture and the sentence. Everything is one
    compiled program: one forward and one backward pass for all examples and all methods.

    Args:
      model: a model that speaks the protocol `Explainable`, such as `jaxrel.models.CLIP`.
      image: a PIL picture, a uint8 `[height, width, 3]` array, or a list of them.
      text: a sentence or a list of sentences; see `model.pairs` for how both are matched.
      target: what to explain of these, in the model's terms; by default the matching pairs.
      method: one of `jaxrel.attention.METHODS`, or several.
      layers: the layers that count, such as `[-1]` for the last alone; all, by default.
      heads: the attention heads that count; all, by default.
      importance: the measure of the weighted method.
      name: the model's name, for the record.

    Returns:
      An `Explanation` of the batch, or a list of them, one per method if several were given.

    Raises:
      TypeError, ValueError: bad pictures, text, target, method, layers or measure; the message
        says what was expected. Relevance that is not finite (a model with NaN weights).
    """
    methods = check_methods(method)
    measure(importance)
    inputs = model.pairs(model.prepare(image=image, text=text), target)
    streams = {stream.name: stream for stream in model.layout.streams}
    score, relevance = _explained(
        model,
        inputs,
        model.readout(inputs),
        methods=methods,
        streams=tuple(streams),
        layers=None if layers is None else tuple(layers),
        heads=None if heads is None else tuple(heads),
        importance=importance,
    )
    score, relevance = jax.device_get((score, relevance))
    content = jax.device_get(model.content(inputs))
    shared: dict[str, Any] = {
        "target": tuple(model.describe(inputs)),
        "score": score,
        "tokens": tuple(map(tuple, model.tokens(inputs))),
        "pictures": _seen(model, image, len(score)),
        "signed": False,
        "model": name,
    }
    explanations = [
        Explanation(
            **shared,
            **_modalities(streams.values(), relevance[one], content),
            method=one,
            settings=_settings(one, layers, heads, importance),
            report={
                stream: _summary(relevance[one][stream], content[stream]) for stream in streams
            },
        )
        for one in methods
    ]
    return explanations[0] if isinstance(method, str) else explanations


@functools.partial(jax.jit, static_argnames=("methods", "streams", "layers", "heads", "importance"))
def _explained(
    model: Any,
    inputs: Any,
    readout: Any,
    *,
    methods: tuple[str, ...],
    streams: tuple[str, ...],
    layers: tuple[int, ...] | None,
    heads: tuple[int, ...] | None,
    importance: str,
) -> Any:
    explained = value_and_relevance(
        lambda model, inputs: model.score(inputs),
        method=methods,
        readout=readout,
        attention=streams,
        layers=layers,
        heads=heads,
        importance=importance,
    )
    return explained(model, inputs)


def _seen(model: Any, image: Any, rows: int) -> tuple[np.ndarray, ...]:
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    seen = [np.asarray(model.seen(picture)) for picture in pictures]
    return tuple(seen) if len(seen) == rows else tuple(seen * rows)


def _modalities(streams: Any, relevance: Mapping, content: Mapping) -> dict[str, Any]:
    """Relevance of the content tokens: a picture's as a grid, a text's with zeros elsewhere."""
    maps = {}
    for stream in streams:
        kept = np.where(content[stream.name], relevance[stream.name], 0)
        if stream.grid is not None:
            kept = kept[:, stream.prefix :].reshape(-1, *stream.grid)
        maps[stream.modality] = kept
    return maps


def _settings(
    method: str, layers: Sequence[int] | None, heads: Sequence[int] | None, importance: str
) -> str:
    chosen = [
        f"all {what}" if some is None else f"{what} {', '.join(map(str, some))}"
        for what, some in (("layers", layers), ("heads", heads))
    ]
    return ", ".join([*chosen, f"importance {importance}"] if method == "weighted" else chosen)


def _summary(relevance: np.ndarray, content: np.ndarray) -> dict[str, Any]:
    kept = np.where(content, relevance, 0).sum(-1)
    return {"tokens": content.sum(-1).tolist(), "relevance of content tokens": kept.tolist()}
