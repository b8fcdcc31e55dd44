"""How good explanations of captions are, word by word (`captioner/1`).

After section 4 of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image
captioning models". A captioner writes captions, and each word that names something is explained:

- ablation: the most relevant patches, or preceding words, are removed. Does the word go?
- localisation: does the relevance lie on the object that the word names?
- hallucination: can the map tell words that are true of the image from those that are not?

Beside these stands how good the captions themselves are.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxrel.metrics import Interval, bootstrap, bootstrap_many, bootstrap_ratio
from jaxrel.metrics.ablation import ablation_summary
from jaxrel.metrics.caption_scores import CiderD
from jaxrel.metrics.detector import fingerprint
from jaxrel.metrics.frequent_words import frequent_words
from jaxrel.metrics.hallucination import chair
from jaxrel.metrics.intervals import group_sums
from jaxrel.metrics.word_statistics import (
    auc_differences,
    auc_intervals,
    best_threshold,
    map_statistics,
)
from jaxrel.metrics.words import STOP_WORDS
from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import special_ids
from jaxrel.train.evaluate.captioned_images import SPLITS, STOP, Images, Word, open_images
from jaxrel.train.evaluate.explained_words import (
    METHODS,
    RANDOM,
    WORDS_EXPLAINED,
    Cases,
    Settings,
    caption_images,
    explain_words,
    word_program,
)

PROTOCOL = "captioner/1"


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
      - "words": by group, the ablation of preceding words; "stop word" is a group too.
      - "localisation": `correctness` by threshold, the pointing game ("pointing": is the largest
        relevance on the object?) and relevance mass accuracy ("mass"), of words that stand for
        objects; means over the images, and their differences from those of attention.
      - "hallucination": by group, the area under the ROC curve of true against hallucinated
        words by statistic of the map, less that of attention. "chosen" is the statistic and
        threshold that are best on images with even numbers, judged on those with odd ones.
        The word's probability and the share of attention that the sentinel leaves to the
        image, where there is one, stand beside the methods.

      Intervals are bootstrap 95% intervals over images. What there are no words for is None.
    """
    count = len(images)
    batch = min(batch, count)
    ids, captions = caption_images(model, images, batch, beams)
    named = [images.words(i, caption) for i, caption in enumerate(captions)]
    stop = [_stop_words(caption, settings.first_word) for caption in captions]
    shared = {"batch": batch, "words": words, "seed": seed}
    program = word_program(methods, settings, beams)
    of_names = explain_words(program, model, images, ids, named, **shared)
    explained = tuple(one for one in methods if one in WORDS_EXPLAINED)
    program = word_program(explained, settings, beams, of_images=False)
    of_stop = explain_words(program, model, images, ids, stop if explained else [], **shared)
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
        "patches": {
            group: _without_patches(one, methods, settings) for group, one in by_group.items()
        },
        "words": {
            group: _without_words(one, explained, settings)
            for group, one in {**late, STOP: of_stop}.items()
        },
        "localisation": _localisation(of_names, methods, settings),
        "hallucination": {
            group: _hallucination(one, methods, settings) for group, one in by_group.items()
        },
        "vocabulary": {group: list(images.vocabulary(group)) for group in images.groups},
        "examples": [" ".join(filter(None, caption)) for caption in captions[:5]],
    }


def _is_of(cases: Cases, group: str) -> list[bool]:
    return [word.group == group for word in cases.words]


def _stop_words(caption: Sequence[str], first_word: int) -> list[Word]:
    return [
        Word(place + 1, word, STOP)
        for place, word in enumerate(caption)
        if place >= first_word and word in STOP_WORDS
    ]


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


def _without_patches(
    cases: Cases, methods: Sequence[str], settings: Settings
) -> dict[str, Any] | None:
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


def _without_words(
    cases: Cases, methods: Sequence[str], settings: Settings
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
    cases: Cases, methods: Sequence[str], settings: Settings
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
    return group_sums(values, group) / count


Scores = Mapping[str, np.ndarray]


def _hallucination(
    cases: Cases, methods: Sequence[str], settings: Settings
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
