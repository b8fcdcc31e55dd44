"""Relevance of captions word by word: in the image's pixels and in the preceding words.

What a model must answer is `Captions`. The forward pass is run once for all words; each word
costs one backward pass more, and all of them are one compiled program.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel.explanations.methods import SIGNED_WORDS, WORD_METHODS
from jaxrel.gradients import class_activation
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, as_composite, everything
from jaxrel.propagation.lrp import lrp_vjp
from jaxrel.tracing.capture import capture
from jaxrel.tracing.sharding import compiler_sharded

__all__ = ["SIGNED_WORDS", "WORD_METHODS", "Captions", "in_pixels", "word_relevance"]


def _is_relu(operation: Any) -> bool:
    return getattr(operation, "is_relu", False)


_GRADIENT = Composite([(everything(), rules.Gradient())])
# Guided backpropagation is defined for ReLUs; gates and tanh keep their derivative.
_GUIDED = Composite([(_is_relu, rules.Guided()), (everything(), rules.Gradient())])
_PLACES = ("features", "text/tokens")
_BY_GRADIENT = frozenset({"gradient", "input_x_gradient", "grad_cam", "guided_grad_cam"})
_BY_GUIDED = frozenset({"guided_backprop", "guided_grad_cam"})


class Captions(Protocol):
    """What `word_relevance` asks of a model.

    `jaxrel.tag` marks the image's feature maps, `[batch, rows, columns, channels]`, as
    "features" and the embedded words, `[batch, tokens, width]`, as "text/tokens".
    """

    def word_scores(self, inputs: Mapping[str, Any]) -> Any:
        """Logit of each token of the captions given the preceding ones, `[batch, tokens]`.

        Of inputs {"image": `[batch, height, width, 3]`, "text": `[batch, tokens]`}.
        """

    def attention_maps(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """{"attention": `[batch, tokens, heads, positions]`}, by the token that is predicted."""


def word_relevance(
    model: Any,
    inputs: Mapping[str, Any],
    positions: Int[Array, "..."] | Int[np.ndarray, "..."],
    *,
    method: Sequence[str] = ("lrp",),
    lrp: Any = None,
    at_once: int | None = None,
) -> tuple[
    Float[Array, "batch words"], dict[str, tuple[Float[Array, "batch words height width"], Array]]
]:
    """Explain words of captions (Sun et al. 2022, section 3).

    "lrp" distributes the word's logit, by default with `composites.captioning`. "gradient" is
    the gradient, "input_x_gradient" the pixel or the embedded word times it, "guided_backprop"
    the same with guided ReLUs. "grad_cam" weighs the feature maps by the mean of their gradients
    and keeps what is positive; "guided_grad_cam" is the product of the two before, the latter
    resized to the image. "attention" is the mean map of all heads. As in the paper, the words
    of "grad_cam" are those of "gradient", and those of "guided_grad_cam" are those of
    "guided_backprop"; "attention" says nothing of words.

    Args:
      model: what speaks the protocol `Captions`, such as `jaxrel.models.Captioner`.
      inputs: "image" and "text", as the model's `prepare` makes them; other entries are passed on.
      positions: [batch, words], the words to explain, by caption, counted from 1 (token 0 is the
        start); 0 where a caption has fewer of them: their relevance is 0.
      method: some of `WORD_METHODS`.
      lrp: other rules for "lrp".
      at_once: how many words go backward together; all, by default. Fewer need less memory.

    Returns:
      The words' logits, and {method: (of the image, of the words)}, float32: [batch, words,
      height, width], in pixels and summed over colours, or for "grad_cam" and "attention" in the
      features' grid; and [batch, words, tokens], summed over the embedding. Sharded as the rows
      of `inputs` are.

    Raises:
      ValueError: an unknown method; positions of a wrong shape; at_once below 1; what `lrp_vjp`
        says of the rules.
    """
    unknown = [one for one in method if one not in WORD_METHODS]
    if unknown or not method:
        raise ValueError(
            f"word_relevance: unknown method {', '.join(map(repr, unknown)) or '(none given)'}; "
            f"known are {', '.join(WORD_METHODS)}"
        )
    if positions.ndim != 2 or len(positions) != len(inputs["text"]):
        raise ValueError(
            f"word_relevance: positions must be [batch, words] with batch {len(inputs['text'])}, "
            f"got shape {list(positions.shape)}"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"word_relevance: at_once must be 1 or more, got {at_once}")
    given = {name: jnp.asarray(value) for name, value in inputs.items()}
    options = _options(method, lrp, at_once)
    score, found = _word_relevance(model, given, jnp.asarray(positions), **options)
    # A compiled program returns a dictionary in the order of its keys.
    return score, {one: found[one] for one in method}


def word_program(
    model: Any, inputs: Any, positions: Any, *, method: Any, lrp: Any = None, at_once: Any = None
) -> jax.stages.Lowered:
    """The program of `word_relevance` for arrays of such shapes, not yet compiled."""
    return _word_relevance.lower(model, inputs, positions, **_options(method, lrp, at_once))


def _options(method: Sequence[str], lrp: Any, at_once: int | None) -> dict[str, Any]:
    """What is chosen, as the static arguments of the compiled program."""
    composite = composites.captioning() if lrp is None else as_composite(lrp)
    return {"methods": tuple(method), "composite": composite, "at_once": at_once}


def in_pixels(
    maps: Float[Array | np.ndarray, "*words rows columns"], side: int
) -> Float[Array, "*words {side} {side}"]:
    """Maps of words in the pixels of the square image; grids are resized (bilinear).

    Args:
      maps: of images, as `word_relevance` returns them by method.
      side: of the image that the model sees, in pixels.
    """
    return jax.image.resize(jnp.asarray(maps), (*maps.shape[:-2], side, side), "bilinear")


@functools.partial(jax.jit, static_argnames=("methods", "composite", "at_once"))
def _word_relevance(
    model: Any, inputs: Mapping[str, Array], positions: Array, **options: Any
) -> Any:
    explained = functools.partial(_word_relevance_rows, **options)
    return compiler_sharded(explained, inputs)(model, inputs, positions)


def _word_relevance_rows(
    model: Any,
    inputs: Mapping[str, Array],
    positions: Array,
    *,
    methods: tuple[str, ...],
    composite: Composite,
    at_once: int | None,
) -> Any:
    image = inputs["image"]
    rest = {name: value for name, value in inputs.items() if name != "image"}

    def scores(model: Any, image: Array, rest: Any) -> Array:
        by_token = model.word_scores({"image": image, **rest})
        return jnp.take_along_axis(by_token, positions, axis=1)

    def by_word(rules: Composite, *, gradient: bool) -> tuple[Array, dict[str, Array]]:
        """Relevance, or gradients, of the pixels and at the tags, words first."""
        value, explain = lrp_vjp(scores, rules, argnums=1, at=_PLACES, gradient=gradient)(
            model, image, rest
        )
        seeds = jnp.eye(positions.shape[1], dtype=value.dtype)[:, None] * (positions > 0)
        return _map(explain, seeds if gradient else seeds * value, at_once)

    value, tagged = capture(scores, _PLACES)(model, image, rest)
    features, embedded = (tagged[name] for name in _PLACES)
    found: dict[str, tuple[Array, Array]] = {}
    if "lrp" in methods:
        pixels, places = by_word(composite, gradient=False)
        found["lrp"] = (pixels.sum(-1), places["text/tokens"].sum(-1))
    if _BY_GRADIENT & {*methods}:
        pixels, places = by_word(_GRADIENT, gradient=True)
        words = places["text/tokens"]
        cam = class_activation(features, places["features"])
        found["gradient"] = (pixels.sum(-1), words.sum(-1))
        found["input_x_gradient"] = ((pixels * image).sum(-1), (words * embedded).sum(-1))
        found["grad_cam"] = (cam, words.sum(-1))
    if _BY_GUIDED & {*methods}:
        pixels, places = by_word(_GUIDED, gradient=True)
        found["guided_backprop"] = (pixels.sum(-1), places["text/tokens"].sum(-1))
    if "guided_grad_cam" in methods:
        details, words = found["guided_backprop"]
        cam = jax.image.resize(found["grad_cam"][0], details.shape, "bilinear")
        found["guided_grad_cam"] = (details * cam, words)
    if "attention" in methods:
        maps = model.attention_maps(inputs)["attention"].mean(2)
        by_caption = jax.vmap(lambda x, at: x[at] * (at > 0)[:, None])(maps, positions)
        grid = by_caption.reshape(*positions.shape, *features.shape[1:3]).swapaxes(0, 1)
        found["attention"] = (grid, jnp.zeros((*grid.shape[:2], embedded.shape[1])))
    captions_first = {
        one: tuple(x.swapaxes(0, 1).astype(jnp.float32) for x in found[one]) for one in methods
    }
    return value.astype(jnp.float32), captions_first


def _map(explain: Callable, seeds: Array, at_once: int | None) -> Any:
    """Explain each seed, all together or some at a time."""
    if at_once is None or at_once >= len(seeds):
        return jax.vmap(explain)(seeds)
    return lax.map(explain, seeds, batch_size=at_once)
