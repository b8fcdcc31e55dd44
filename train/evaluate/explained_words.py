"""Words of captions, and what becomes of them without what their explanations name.

The device's part of `caption_explanations`: one program captions images, and another explains
words, removes what the explanations name, and measures.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrel.explanations.words import WORD_METHODS, in_pixels, word_relevance
from jaxrel.metrics.ablation import (
    FIRST_WORD,
    PATCH,
    PATCHES,
    WORDS,
    ablate,
    ablated_prefixes,
    patch_mask,
    patch_scores,
)
from jaxrel.metrics.correctness import THRESHOLDS, correctness
from jaxrel.metrics.perturbation import random_relevance
from jaxrel.metrics.word_statistics import map_statistics
from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import end_of_caption, logit_by_token, special_ids
from jaxrel.train.evaluate.batching import equal_batches
from jaxrel.train.evaluate.captioned_images import Images, Word

RANDOM = "random"
METHODS = (*WORD_METHODS, RANDOM)
# The other methods say nothing of words, or what "gradient" and "guided_backprop" say.
WORDS_EXPLAINED = ("lrp", "gradient", "input_x_gradient", "guided_backprop", RANDOM)
# The images that the paper's sizes are for.
_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is removed, and what is measured.

    The paper's patches are 8 x 8 of 224 x 224 pixels, of which 20 of 784 go. In images of
    another size they are of the same share of the image's side, as nearly as whole pixels
    that divide it allow, and as many go as make the same share of its area.

    Attributes:
      patch: side of a patch, as a share of the image's.
      area: share of the image that is set to its mean colour.
      removed: how many of the words that precede a word are removed.
      first_word: words with fewer preceding words are not asked about.
      thresholds: of correctness, as shares of a map's largest value.
      quantiles: of maps, as statistics that may tell hallucinated words.
      resamples: of the bootstrap.

    Raises:
      ValueError: a share or a number is out of range.
    """

    patch: float = PATCH / _SIDE
    area: float = PATCHES * (PATCH / _SIDE) ** 2
    removed: int = WORDS
    first_word: int = FIRST_WORD
    thresholds: tuple[float, ...] = THRESHOLDS
    quantiles: tuple[float, ...] = THRESHOLDS
    resamples: int = 2000

    def __post_init__(self):
        for name in ("patch", "area"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"captioner: {name} must be a share, got {getattr(self, name)}")
        for name in ("removed", "first_word", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"captioner: {name} must be at least 1, got {getattr(self, name)}")

    def patches(self, side: int) -> tuple[int, int]:
        """Return the side of a patch in pixels, and how many patches go.

        Args:
          side: of the image, in pixels.
        """
        sizes = [size for size in range(1, side) if side % size == 0] or [side]
        patch = min(sizes, key=lambda size: abs(size - self.patch * side))
        return patch, max(1, round(self.area * (side // patch) ** 2))


class Cases(NamedTuple):
    """Words that were explained, in the order of the images.

    Attributes:
      words: the words.
      image: the number of each word's image.
      found: what was measured, by name, [cases, ...].
    """

    words: tuple[Word, ...]
    image: Int[np.ndarray, " cases"]
    found: dict[str, np.ndarray]

    def where(self, kept: Sequence[bool]) -> "Cases":
        """Some of them."""
        rows = np.flatnonzero(kept)
        words = tuple(self.words[i] for i in rows)
        return Cases(words, self.image[rows], {n: x[rows] for n, x in self.found.items()})


def caption_images(
    model: Captioner, images: Images, batch: int, beams: int
) -> tuple[Int[np.ndarray, "images tokens"], list[list[str]]]:
    """The model's captions as ids and as words; "" for what the tokenizer does not know."""
    generate = jax.jit(lambda model, image: model.generate(image, beams=beams))
    parts = []
    for numbers in equal_batches(len(images), batch, "captioning"):
        pixels = model.processor.image([images.image(i) for i in numbers.tolist()])
        parts.append(np.asarray(generate(model, pixels)))
    ids = np.concatenate(parts)[: len(images)]
    ends = np.asarray(end_of_caption(ids, special_ids(model.processor.tokenizer)[1]))
    shown = model.tokens({"text": ids})
    return ids, [row[1:end] for row, end in zip(shown, ends.tolist(), strict=True)]


def explain_words(
    program: Callable[..., dict[str, Array]],
    model: Captioner,
    images: Images,
    ids: Int[np.ndarray, "images tokens"],
    asked: Sequence[Sequence[Word]],
    *,
    batch: int,
    words: int,
    seed: int,
) -> Cases:
    """Run a program on the words that are asked about, by image."""
    rows = [
        (i, some[k : k + words]) for i, some in enumerate(asked) for k in range(0, len(some), words)
    ]
    parts = []
    for numbers in equal_batches(len(rows), batch, "explaining"):
        inputs = _inputs(model, images, ids, [rows[k] for k in numbers], words)
        keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(numbers)
        parts.append(jax.device_get(program(model, keys=keys, **inputs)))
    places = np.array([(r, k) for r, (_, some) in enumerate(rows) for k in range(len(some))], int)
    row, place = places.reshape(-1, 2).T
    found = jax.tree.map(lambda *x: np.concatenate(x)[row, place], *parts) if parts else {}
    image = np.array([rows[r][0] for r in row], int)
    return Cases(tuple(word for _, some in rows for word in some), image, found)


def _inputs(
    model: Captioner,
    images: Images,
    ids: Int[np.ndarray, "images tokens"],
    rows: Sequence[tuple[int, Sequence[Word]]],
    words: int,
) -> dict[str, Any]:
    """Images and captions, positions [rows, words], and which objects each word stands for."""
    numbers = [i for i, _ in rows]
    masks = np.stack([images.masks(i) for i in numbers])
    positions = np.zeros((len(rows), words), np.int32)
    named = np.zeros((len(rows), words, masks.shape[1]), bool)
    for r, (_, some) in enumerate(rows):
        for k, word in enumerate(some):
            positions[r, k] = word.position
            named[r, k, list(word.objects)] = True
    pixels = model.processor.image([images.image(i) for i in numbers])
    inputs = {"image": pixels, "text": ids[numbers]}
    return {"inputs": inputs, "positions": positions, "masks": masks, "named": named}


def word_program(
    methods: Sequence[str], settings: Settings, beams: int, *, of_images: bool = True
) -> Callable[..., dict[str, Array]]:
    """One program for all words: what happens to each without what its explanations name.

    Args:
      methods: whose explanations.
      settings: what is removed.
      beams: of regenerated captions.
      of_images: whether to judge maps; otherwise only words are removed.

    Returns:
      Results by name, [batch, words], and where they are by method, [batch, words, methods, ...].
    """
    explained = [i for i, one in enumerate(methods) if one in WORDS_EXPLAINED]

    @jax.jit
    def program(
        model: Captioner,
        *,
        inputs: Mapping[str, Array],
        positions: Int[Array, "batch words"],
        masks: Bool[Array, "batch objects side side"],
        named: Bool[Array, "batch words objects"],
        keys: Any,
    ) -> dict[str, Array]:
        maps, relevance = relevance_of_words(model, inputs, positions, keys, methods)
        features, text = model.encode(inputs["image"]), inputs["text"]
        before = _probabilities(model, features, text)
        found = {"probability": jnp.take_along_axis(before, positions, axis=1)}
        if explained:
            of_words = relevance[jnp.asarray(explained)]
            found["without_words"] = without_words(
                model, features, text, positions, of_words, settings
            )
        if of_images:
            found |= without_patches(model, inputs, positions, maps, settings, beams)
            found |= on_objects(maps, named, masks, settings)
            statistics = map_statistics(maps, quantiles=settings.quantiles).values()
            found["statistics"] = jnp.moveaxis(jnp.stack([*statistics]), (0, 1), (-1, -2))
            sentinel = model.attention_maps({"features": features, "text": text}).get("sentinel")
            if sentinel is not None:
                found["seen"] = 1 - jnp.take_along_axis(sentinel, positions, axis=1)
        return found

    return program


def relevance_of_words(
    model: Captioner,
    inputs: Mapping[str, Array],
    positions: Int[Array, "batch words"],
    keys: Any,
    methods: Sequence[str],
) -> tuple[
    Float[Array, "methods batch words side side"], Float[Array, "methods batch words tokens"]
]:
    """Maps in pixels, grids resized (bilinear), and relevance of the preceding words."""
    plain = tuple(one for one in methods if one != RANDOM)
    found = word_relevance(model, inputs, positions, method=plain)[1] if plain else {}
    words = positions.shape[1]
    side, tokens = inputs["image"].shape[1], inputs["text"].shape[1]

    def draw(key: Array) -> tuple[Array, Array]:
        of_image, of_text = jax.random.split(key)
        image = random_relevance(of_image, (words, side, side))
        return image, random_relevance(of_text, (words, tokens))

    found = {**found, RANDOM: jax.vmap(draw)(keys)}
    maps = jnp.stack([in_pixels(found[one][0], side) for one in methods])
    return maps, jnp.stack([found[one][1] for one in methods])


def _probabilities(
    model: Captioner, features: Array, text: Int[Array, "batch tokens"]
) -> Float[Array, "batch tokens"]:
    """The probability of each token given those before it; column 0 is 1."""
    logits = model({"features": features, "text": text})
    return jnp.exp(logit_by_token(jax.nn.log_softmax(logits), text))


def without_words(
    model: Captioner,
    features: Array,
    text: Int[Array, "batch tokens"],
    positions: Int[Array, "batch words"],
    relevance: Float[Array, "methods batch words tokens"],
    settings: Settings,
) -> Float[Array, "batch words methods"]:
    """The probability of each word after its preceding words without the most relevant ones."""
    batch, words = positions.shape
    row, position = jnp.arange(batch * words), positions.reshape(-1)
    by_word = jnp.repeat(features, words, axis=0)
    whole = jnp.repeat(text, words, axis=0)

    def after(relevance: Array) -> Array:
        prefix = ablated_prefixes(
            whole, jnp.maximum(position, 1), relevance, count=settings.removed
        )
        logits = model({"features": by_word, "text": prefix.ids})
        return jax.nn.softmax(logits[row, prefix.lengths - 1])[row, whole[row, position]]

    found = lax.map(after, relevance.reshape(len(relevance), batch * words, -1))
    return jnp.moveaxis(found.reshape(-1, batch, words), 0, -1)


def without_patches(
    model: Captioner,
    inputs: Mapping[str, Array],
    positions: Int[Array, "batch words"],
    maps: Float[Array, "methods batch words side side"],
    settings: Settings,
    beams: int,
) -> dict[str, Shaped[Array, "batch words methods"]]:
    """Whether the caption regenerated without the most relevant patches has the word.

    And the word's probability where that caption has it first.
    """
    batch, words = positions.shape
    patch, count = settings.patches(maps.shape[-1])
    mask = patch_mask(patch_scores(maps, patch), count)
    row = jnp.arange(batch * words)
    images = jnp.repeat(inputs["image"], words, axis=0)
    word = jnp.take_along_axis(inputs["text"], positions, axis=1).reshape(-1)

    def after(mask: Array) -> tuple[Array, Array]:
        features = model.encode(ablate(images, mask))
        ids = model.generate(features, beams=beams)
        same = ids == word[:, None]
        probability = _probabilities(model, features, ids)
        return same.any(-1), probability[row, same.argmax(-1)]

    found = lax.map(after, mask.reshape(len(mask), batch * words, *mask.shape[-2:]))
    there, probability = (jnp.moveaxis(x.reshape(-1, batch, words), 0, -1) for x in found)
    return {"there": there, "without_patches": probability}


def on_objects(
    maps: Float[Array, "methods batch words side side"],
    named: Bool[Array, "batch words objects"],
    masks: Bool[Array, "batch objects side side"],
    settings: Settings,
) -> dict[str, Shaped[Array, "batch words ..."]]:
    """How much of each map lies on the objects that its word stands for; see `judge`."""

    def of_image(image: tuple[Array, Array, Array]) -> dict[str, Array]:
        maps, named, masks = image
        objects = named[..., None, None] & masks
        union = objects.any(1)
        by_method = functools.partial(correctness, masks=objects, thresholds=settings.thresholds)
        positive = jnp.maximum(maps, 0)
        total = positive.sum((-2, -1))
        on = (positive * union).sum((-2, -1)) / jnp.where(total == 0, 1, total)
        best = maps.reshape(*maps.shape[:2], -1).argmax(-1)
        hit = jnp.take_along_axis(union.reshape(1, len(union), -1), best[..., None], axis=-1)
        return {
            "correctness": jax.vmap(by_method)(maps[..., None]).swapaxes(0, 1),
            "mass": on.T,
            "pointing": hit[..., 0].T,
            "area": union.mean((-2, -1)),
        }

    # Masks by word and object are large: one image after the other.
    return lax.map(of_image, (maps.swapaxes(0, 1), named, masks))
