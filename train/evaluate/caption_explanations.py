"""How good explanations of captions are, word by word (`captioner/1`).

After section 4 of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image
captioning models". A captioner writes captions, and each word that names something is explained:

- ablation: the most relevant patches, or words before it, are taken away. Does the word go?
- localisation: does the relevance lie on the object that the word names?
- hallucination: can the map tell words that are true of the image from those that are not?

Beside these stands how good the captions themselves are.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
from tqdm.auto import trange

from jaxrel.explanations.words import WORD_METHODS, in_pixels, word_relevance
from jaxrel.metrics import Interval, bootstrap, bootstrap_many, bootstrap_ratio
from jaxrel.metrics.ablation import (
    FIRST_WORD,
    PATCH,
    PATCHES,
    WORDS,
    ablate,
    ablated_prefixes,
    ablation_summary,
    patch_mask,
    patch_scores,
)
from jaxrel.metrics.caption_scores import CiderD
from jaxrel.metrics.correctness import THRESHOLDS, correctness
from jaxrel.metrics.detector import fingerprint
from jaxrel.metrics.frequent_words import frequent_words
from jaxrel.metrics.hallucination import chair
from jaxrel.metrics.perturbation import random_relevance
from jaxrel.metrics.word_statistics import (
    auc_differences,
    auc_intervals,
    best_threshold,
    map_statistics,
)
from jaxrel.metrics.words import STOP_WORDS
from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import end_of_caption, logit_by_token, special_ids
from jaxrel.train.evaluate.examples import SPLITS, STOP, Images, Word, open_images

PROTOCOL = "captioner/1"
RANDOM = "random"
METHODS = (*WORD_METHODS, RANDOM)
# The other methods say nothing of words, or what "gradient" and "guided_backprop" say.
WORDS_EXPLAINED = ("lrp", "gradient", "input_x_gradient", "guided_backprop", RANDOM)
# The images that the paper's sizes are for.
_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is taken away, and what is counted.

    The paper's patches are 8 x 8 of 224 x 224 pixels, of which 20 of 784 go. In images of
    another size they are of the same share of the image's side, as nearly as whole pixels
    that divide it allow, and as many go as make the same share of its area.

    Attributes:
      patch: side of a patch, as a share of the image's.
      area: share of the image that is set to its mean colour.
      removed: how many words before a word are taken away.
      first_word: words that have fewer before them are not asked about.
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


def evaluate(
    model: Captioner,
    *,
    data: str | None = None,
    split: str | None = None,
    methods: Sequence[str] = METHODS,
    scenes: int = 512,
    batch: int = 16,
    words: int = 8,
    beams: int = 1,
    data_seed: int = 0,
    seed: int = 0,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Judge explanations of a model's own captions, and the captions.

    Args:
      model: one that reads images.
      data: the folder of COCO (see `jaxrel.train.data.coco`) or of Flickr30k; Shapes by default.
      split: of the data set; by default "biased_test" of Shapes, where words that go together
        in "biased_train" do not, "val2017" of COCO (or one of Karpathy's), "test" of Flickr30k.
      methods: of `METHODS`; "random" is relevance uniform in [0, 1).
      scenes: how many images, the first of the split.
      batch: images at a time.
      words: how many words of a caption are explained together; a caption with more takes
        several places of a batch. `batch * words` backward passes share the memory.
      beams: of the search for captions, also for those of images without patches; 1 is greedy.
      data_seed: of the Shapes data set.
      seed: of "random".
      settings: by default those of the paper.

    Returns:
      What JSON can hold; see `judge`.

    Raises:
      ValueError: an unknown method, no scenes, a number below 1, a model without an encoder or
        without a tokenizer, or an unknown split.
      FileNotFoundError: files of the data set are missing.
    """
    methods = _check(model, methods, scenes=scenes, batch=batch, words=words, beams=beams)
    images = open_images(model, data, split=split, scenes=scenes, data_seed=data_seed)
    result = judge(
        model,
        images,
        methods=methods,
        batch=batch,
        words=words,
        beams=beams,
        seed=seed,
        settings=settings or Settings(),
    )
    drawn = {"data_seed": data_seed} if data is None else {}
    return result | {"split": split or SPLITS[images.name]} | drawn


def _check(model: Captioner, methods: Sequence[str], **numbers: int) -> tuple[str, ...]:
    unknown = [one for one in methods if one not in METHODS]
    if unknown or not methods:
        wrong = f"unknown method {unknown[0]!r}" if unknown else "no method given"
        raise ValueError(f"captioner: {wrong}; there are {', '.join(METHODS)}")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"captioner: {name} must be at least 1, got {number}")
    if model.encoder is None:
        raise ValueError(
            "captioner: this model reads features of regions and not images, and there are no "
            "maps to judge; give a model with an encoder"
        )
    special_ids(model.processor.tokenizer)
    return tuple(dict.fromkeys(methods))


def judge(
    model: Captioner,
    images: Images,
    *,
    methods: Sequence[str] = METHODS,
    batch: int = 16,
    words: int = 8,
    beams: int = 1,
    seed: int = 0,
    settings: Settings,
) -> dict[str, Any]:
    """`evaluate` on any images.

    Args:
      model: one that reads images.
      images: at least one.
      methods, batch, words, beams, seed, settings: as in `evaluate`.

    Returns:
      `protocol`, the settings, "weights" (the model's `fingerprint`), "vocabulary" (by group), and

      - "captions": CIDEr-D, CHAIR, precision, recall and F1 of frequent words.
      - "patches": by group of words, the ablation of patches (see `ablation_summary`), less
        that of random patches and of those that attention names.
      - "words": by group, the ablation of words before; "stop word" is a group too.
      - "localisation": `correctness` by threshold, the pointing game ("pointing": is the largest
        relevance on the object?) and the share of positive relevance on the object ("mass"), of
        words that stand for objects; means over the images, less those of attention.
      - "hallucination": by group, the area under the ROC curve of true against hallucinated
        words by statistic of the map, less that of attention. "chosen" is the statistic and
        threshold that are best on images with even numbers, judged on those with odd ones.
        The word's probability and the share of attention that the sentinel leaves to the
        image, where there is one, stand beside the methods.

      Intervals are bootstrap 95% intervals over images. What there are no words for is None.
    """
    count = len(images)
    batch = min(batch, count)
    ids, captions = _write(model, images, batch, beams)
    named = [images.words(i, caption) for i, caption in enumerate(captions)]
    stop = [_stop_words(caption, settings.first_word) for caption in captions]
    shared = {"batch": batch, "words": words, "seed": seed}
    program = _program(methods, settings, beams)
    of_names = _cases(program, model, images, ids, named, **shared)
    explained = tuple(one for one in methods if one in WORDS_EXPLAINED)
    program = _program(explained, settings, beams, of_images=False)
    of_stop = _cases(program, model, images, ids, stop if explained else [], **shared)
    by_group = {group: of_names.where(_is_of(of_names, group)) for group in images.groups}
    late = {
        group: one.where([word.position > settings.first_word for word in one.words])
        for group, one in by_group.items()
    }
    patch, patches = settings.patches(model.config.image_size)
    return {
        "protocol": PROTOCOL,
        "data": images.name,
        "images": count,
        "weights": fingerprint(model),
        "methods": list(methods),
        "lrp": "captioning",
        "beams": beams,
        "seed": seed,
        "settings": dataclasses.asdict(settings) | {"patch_pixels": patch, "patches": patches},
        "versions": {"jaxrel": version("jaxrel"), "jax": jax.__version__},
        "captions": _quality(images, captions, named, settings),
        "patches": {group: _patches(one, methods, settings) for group, one in by_group.items()},
        "words": {
            group: _words_before(one, explained, settings)
            for group, one in {**late, STOP: of_stop}.items()
        },
        "localisation": _localisation(of_names, methods, settings),
        "hallucination": {
            group: _hallucination(one, methods, settings) for group, one in by_group.items()
        },
        "vocabulary": {group: list(images.vocabulary(group)) for group in images.groups},
        "examples": [" ".join(filter(None, caption)) for caption in captions[:5]],
    }


class _Cases(NamedTuple):
    """Words that were explained, in the order of the images.

    Attributes:
      words: the words.
      image: the number of each word's image.
      found: what was measured, by name, [cases, ...].
    """

    words: tuple[Word, ...]
    image: Int[np.ndarray, " cases"]
    found: dict[str, np.ndarray]

    def where(self, kept: Sequence[bool]) -> "_Cases":
        """Some of them."""
        rows = np.flatnonzero(kept)
        words = tuple(self.words[i] for i in rows)
        return _Cases(words, self.image[rows], {n: x[rows] for n, x in self.found.items()})


def _is_of(cases: _Cases, group: str) -> list[bool]:
    return [word.group == group for word in cases.words]


def _stop_words(caption: Sequence[str], first_word: int) -> list[Word]:
    return [
        Word(place + 1, word, STOP)
        for place, word in enumerate(caption)
        if place >= first_word and word in STOP_WORDS
    ]


# What is computed on the device.


def _write(
    model: Captioner, images: Images, batch: int, beams: int
) -> tuple[Int[np.ndarray, "images tokens"], list[list[str]]]:
    """The model's captions as ids and as words; "" for what the tokenizer does not know."""
    generate = jax.jit(lambda model, image: model.generate(image, beams=beams))
    parts = []
    for start in trange(0, len(images), batch, desc="captioning", unit="batch"):
        # One size compiles once: the last batch begins again with the first images.
        images = [images.image(i % len(images)) for i in range(start, start + batch)]
        parts.append(np.asarray(generate(model, model.processor.image(images))))
    ids = np.concatenate(parts)[: len(images)]
    ends = np.asarray(end_of_caption(ids, special_ids(model.processor.tokenizer)[1]))
    shown = model.tokens({"text": ids})
    return ids, [row[1:end] for row, end in zip(shown, ends.tolist(), strict=True)]


def _cases(
    program: Callable[..., dict[str, Array]],
    model: Captioner,
    images: Images,
    ids: Int[np.ndarray, "images tokens"],
    asked: Sequence[Sequence[Word]],
    *,
    batch: int,
    words: int,
    seed: int,
) -> _Cases:
    """Run a program on the words that are asked about, by image."""
    rows = [
        (i, some[k : k + words]) for i, some in enumerate(asked) for k in range(0, len(some), words)
    ]
    parts = []
    for start in trange(0, len(rows), batch, desc="explaining", unit="batch"):
        # As in `_write`: rows begin again.
        numbers = np.arange(start, start + batch) % len(rows)
        inputs = _inputs(model, images, ids, [rows[k] for k in numbers], words)
        keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(numbers)
        parts.append(jax.device_get(program(model, keys=keys, **inputs)))
    places = np.array([(r, k) for r, (_, some) in enumerate(rows) for k in range(len(some))], int)
    row, place = places.reshape(-1, 2).T
    found = jax.tree.map(lambda *x: np.concatenate(x)[row, place], *parts) if parts else {}
    image = np.array([rows[r][0] for r in row], int)
    return _Cases(tuple(word for _, some in rows for word in some), image, found)


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
    images = model.processor.image([images.image(i) for i in numbers])
    inputs = {"image": images, "text": ids[numbers]}
    return {"inputs": inputs, "positions": positions, "masks": masks, "named": named}


def _program(
    methods: Sequence[str], settings: Settings, beams: int, *, of_images: bool = True
) -> Callable[..., dict[str, Array]]:
    """One program for all words: what happens to each without what its explanations name.

    Args:
      methods: whose explanations.
      settings: what is taken away.
      beams: of captions that are written anew.
      of_images: whether to judge maps; otherwise words alone are taken away.

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
        maps, relevance = _relevance(model, inputs, positions, keys, methods)
        features, text = model.encode(inputs["image"]), inputs["text"]
        before = _probabilities(model, features, text)
        found = {"probability": jnp.take_along_axis(before, positions, axis=1)}
        if explained:
            of_words = relevance[jnp.asarray(explained)]
            found["without_words"] = _without_words(
                model, features, text, positions, of_words, settings
            )
        if of_images:
            found |= _without_patches(model, inputs, positions, maps, settings, beams)
            found |= _on_objects(maps, named, masks, settings)
            statistics = map_statistics(maps, quantiles=settings.quantiles).values()
            found["statistics"] = jnp.moveaxis(jnp.stack([*statistics]), (0, 1), (-1, -2))
            sentinel = model.attention_maps({"features": features, "text": text}).get("sentinel")
            if sentinel is not None:
                found["seen"] = 1 - jnp.take_along_axis(sentinel, positions, axis=1)
        return found

    return program


def _relevance(
    model: Captioner,
    inputs: Mapping[str, Array],
    positions: Int[Array, "batch words"],
    keys: Any,
    methods: Sequence[str],
) -> tuple[
    Float[Array, "methods batch words side side"], Float[Array, "methods batch words tokens"]
]:
    """Maps in the image's pixels, grids resized (bilinear), and relevance of the words before."""
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


def _without_words(
    model: Captioner,
    features: Array,
    text: Int[Array, "batch tokens"],
    positions: Int[Array, "batch words"],
    relevance: Float[Array, "methods batch words tokens"],
    settings: Settings,
) -> Float[Array, "batch words methods"]:
    """The probability of each word after the words before it but the most relevant."""
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


def _without_patches(
    model: Captioner,
    inputs: Mapping[str, Array],
    positions: Int[Array, "batch words"],
    maps: Float[Array, "methods batch words side side"],
    settings: Settings,
    beams: int,
) -> dict[str, Shaped[Array, "batch words methods"]]:
    """Whether a new caption, of the image without the most relevant patches, has the word.

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


def _on_objects(
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


# What is counted on the host.


def _quality(
    images: Images,
    captions: Sequence[Sequence[str]],
    named: Sequence[Sequence[Word]],
    settings: Settings,
) -> dict[str, Any]:
    """How good captions are: CIDEr-D, CHAIR of things, and frequent words."""
    resamples = settings.resamples
    written = [[word for word in caption if word] for caption in captions]
    references = [images.references(i) for i in range(len(images))]
    cider = CiderD.from_references(images.corpus()).score(written, references)
    things = [[word for word in some if word.group == images.groups[0]] for some in named]
    counted = chair(
        [[word.name for word in some] for some in things],
        [{word.name for word in some if word.true} for some in things],
    )
    wrong, all_things = counted.hallucinated, counted.mentions
    share = bootstrap_ratio(wrong, all_things, resamples=resamples) if all_things.any() else None
    often = frequent_words(
        [images.forms(caption) for caption in written],
        [[images.forms(one) for one in some] for some in references],
        images.frequent,
        resamples=resamples,
    )
    by_word = {
        name: getattr(often, name).tolist()
        for name in (
            "true_positives",
            "false_positives",
            "false_negatives",
            "precision",
            "recall",
            "f1",
        )
    }
    return {
        "CIDEr-D": bootstrap(np.asarray(cider), resamples=resamples)._asdict(),
        "CHAIR_i": None if share is None else share._asdict(),
        "CHAIR_s": bootstrap(wrong > 0, resamples=resamples)._asdict(),
        "mentions": int(all_things.sum()),
        "mean_precision": often.mean_precision._asdict(),
        "mean_recall": often.mean_recall._asdict(),
        "mean_f1": often.mean_f1._asdict(),
        "words": {
            word: {name: values[i] for name, values in by_word.items()}
            for i, word in enumerate(often.words)
        },
    }


def _patches(cases: _Cases, methods: Sequence[str], settings: Settings) -> dict[str, Any] | None:
    if not cases.words:
        return None
    drops = cases.found["probability"][:, None] - cases.found["without_patches"]
    return _ablation(
        dict(zip(methods, drops.T, strict=True)),
        dict(zip(methods, cases.found["there"].T, strict=True)),
        cases.image,
        (RANDOM, "attention"),
        settings,
    )


def _words_before(
    cases: _Cases, methods: Sequence[str], settings: Settings
) -> dict[str, Any] | None:
    if not cases.words or not methods:
        return None
    drops = cases.found["probability"][:, None] - cases.found["without_words"]
    by_method = dict(zip(methods, drops.T, strict=True))
    return _ablation(by_method, None, cases.image, (RANDOM,), settings)


def _ablation(
    drops: Mapping[str, np.ndarray],
    there: Mapping[str, np.ndarray] | None,
    image: Int[np.ndarray, " cases"],
    baselines: Sequence[str],
    settings: Settings,
) -> dict[str, Any]:
    """`ablation_summary`, with the differences from several baselines by their name."""
    summary = functools.partial(
        ablation_summary, drops, there=there, image=image, resamples=settings.resamples
    )
    result = summary()
    for one in result["methods"].values():
        one["difference"] = {}
    for baseline in baselines:
        if baseline in drops:
            for name, one in summary(baseline=baseline)["methods"].items():
                if name != baseline:
                    result["methods"][name]["difference"][baseline] = one["difference"]
    del result["baseline"]
    return result


def _localisation(
    cases: _Cases, methods: Sequence[str], settings: Settings
) -> dict[str, Any] | None:
    cases = cases.where([bool(word.objects) for word in cases.words])
    if not cases.words:
        return None
    found, ends = cases.found, len(settings.thresholds)
    parts = [found["correctness"], found["pointing"][..., None], found["mass"][..., None]]
    # [measures, methods, images]
    values = _by_image(np.concatenate(parts, axis=-1).T, cases.image)
    area = _by_image(found["area"], cases.image)

    def intervals(values: np.ndarray) -> list[dict[str, Any]]:
        """By method."""
        low_mean_high = bootstrap_many(values, resamples=settings.resamples)._asdict()
        return [
            {
                "correctness": {n: x[:ends, m].tolist() for n, x in low_mean_high.items()},
                "pointing": {n: float(x[ends, m]) for n, x in low_mean_high.items()},
                "mass": {n: float(x[ends + 1, m]) for n, x in low_mean_high.items()},
            }
            for m in range(len(methods))
        ]

    result = dict(zip(methods, intervals(values), strict=True))
    for one in result.values():
        one["difference"] = {}
    if "attention" in methods:
        at = methods.index("attention")
        less = intervals(values - values[:, [at]])
        for name, one in zip(methods, less, strict=True):
            if name != "attention":
                result[name]["difference"]["attention"] = one
    return {
        "cases": len(cases.words),
        "images": values.shape[-1],
        "thresholds": list(settings.thresholds),
        "area": bootstrap(area, resamples=settings.resamples)._asdict(),
        "methods": result,
    }


def _by_image(
    values: Shaped[np.ndarray, "*measures cases"], image: Int[np.ndarray, " cases"]
) -> Float[np.ndarray, "*measures images"]:
    """Means over the words of each image, which are not independent."""
    _, group, count = np.unique(image, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), *values.shape[:-1]))
    np.add.at(sums, group, np.moveaxis(values, -1, 0).astype(np.float64))
    return np.moveaxis(sums, 0, -1) / count


Scores = Mapping[str, np.ndarray]


def _hallucination(
    cases: _Cases, methods: Sequence[str], settings: Settings
) -> dict[str, Any] | None:
    """Areas by statistic, where there are words of both kinds."""
    true = np.array([word.true for word in cases.words], bool)
    counts = {"true": int(true.sum()), "hallucinated": int((~true).sum())}
    if not all(counts.values()):
        return None
    names = list(map_statistics(np.zeros((1, 1)), quantiles=settings.quantiles))
    scores: dict[str, Scores] = {
        method: dict(zip(names, cases.found["statistics"][:, m].T, strict=True))
        for m, method in enumerate(methods)
    }
    beside = {"probability": "probability", "1 - sentinel": "seen"}
    scores |= {n: {n: cases.found[key]} for n, key in beside.items() if key in cases.found}
    drawn: dict[str, Any] = {"image": cases.image, "resamples": settings.resamples}
    result: dict[str, Any] = {
        name: {
            "auc": _as_dicts(auc_intervals(one, true, **drawn)),
            "chosen": None,
            "difference": {},
        }
        for name, one in scores.items()
    }
    attention = scores.get("attention")
    for method in methods:
        if attention is not None and method != "attention":
            less = auc_differences(scores[method], attention, true, **drawn)
            result[method]["difference"]["attention"] = {"auc": _as_dicts(less)}
    _choose(result, scores, true, cases.image, settings.resamples)
    images = len(np.unique(cases.image))
    return {**counts, "images": images, "methods": result}


def _as_dicts(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: one._asdict() for name, one in intervals.items()}


def _choose(
    result: dict[str, Any],
    scores: Mapping[str, Scores],
    true: Bool[np.ndarray, " cases"],
    image: Int[np.ndarray, " cases"],
    resamples: int,
) -> None:
    """Choose statistics and thresholds on the even images, and judge them on the odd ones.

    "precision" is the share of words below the threshold that are hallucinated.
    """
    even = image % 2 == 0
    if any(not 0 < kind.sum() < kind.size for kind in (true[even], true[~even])):
        return
    kept, true_of_odd = {}, true[~even]
    drawn = {"image": image[~even], "resamples": resamples}
    for name, one in scores.items():
        chosen = best_threshold({n: x[even] for n, x in one.items()}, true[even])
        kept[name] = {"chosen": one[chosen.statistic][~even]}
        said = kept[name]["chosen"] >= chosen.threshold
        result[name]["chosen"] = {
            "statistic": chosen.statistic,
            "threshold": chosen.threshold,
            "auc": auc_intervals(kept[name], true_of_odd, **drawn)["chosen"]._asdict(),
            "sensitivity": _share(said & true_of_odd, true_of_odd, **drawn),
            "specificity": _share(~said & ~true_of_odd, ~true_of_odd, **drawn),
            "precision": None if said.all() else _share(~said & ~true_of_odd, ~said, **drawn),
            "images": len(np.unique(image[~even])),
        }
    if "attention" in scores:
        for name in set(scores) - {"attention"}:
            less = auc_differences(kept[name], kept["attention"], true_of_odd, **drawn)
            difference = result[name]["difference"].setdefault("attention", {})
            difference["chosen"] = less["chosen"]._asdict()


def _share(
    part: Bool[np.ndarray, " cases"],
    whole: Bool[np.ndarray, " cases"],
    *,
    image: Int[np.ndarray, " cases"],
    resamples: int,
) -> dict[str, float]:
    """Of words, with an interval over images."""
    counts = [np.bincount(image, weights=one) for one in (part, whole)]
    there = np.isin(np.arange(image.max() + 1), image)
    return bootstrap_ratio(*(one[there] for one in counts), resamples=resamples)._asdict()
