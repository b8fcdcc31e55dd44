"""Are the words that captions often have the right ones? Precision, recall and F1 by word.

After Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image captioning
models", who call the mean precision mAP; it is no average precision over thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrel.metrics.caption_scores import References, Tokens, check_captions
from jaxrel.metrics.intervals import Interval, percentiles, times_drawn


class FrequentWords(NamedTuple):
    """How well captions use words; the means over words with intervals over images.

    Attributes:
      words: in the order given.
      true_positives: per word, in how many images the caption and a reference have it.
      false_positives: the caption alone.
      false_negatives: a reference alone.
      precision: per word, true positives of what captions have; 0 where they never have it.
      recall: per word, true positives of what references have; 0 where they never have it.
      f1: per word, the harmonic mean of the two; 0 where both are 0.
      mean_precision: over the words, what the paper calls mAP.
      mean_recall: over the words.
      mean_f1: over the words, of their F1.
    """

    words: tuple[str, ...]
    true_positives: Int[np.ndarray, " words"]
    false_positives: Int[np.ndarray, " words"]
    false_negatives: Int[np.ndarray, " words"]
    precision: Float[np.ndarray, " words"]
    recall: Float[np.ndarray, " words"]
    f1: Float[np.ndarray, " words"]
    mean_precision: Interval
    mean_recall: Interval
    mean_f1: Interval


def frequent_words(
    candidates: Sequence[Tokens],
    references: Sequence[References],
    words: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> FrequentWords:
    """Precision, recall and F1 of words, by their presence in captions and in references.

    A word is expected where any reference of the image has it. How often a sentence has it
    does not count, and forms of a word are words of their own.

    Args:
      candidates: one caption per image.
      references: the references of each image, at least one.
      words: such as `FLICKR30K_FREQUENT` or `COCO_FREQUENT`.
      seed: of the resampling.
      resamples: how many samples of images are drawn with replacement.

    Raises:
      ValueError: no captions, numbers that differ, an image without references, text in place
        of tokens or of words, no words, or a word twice.
    """
    check_captions("frequent_words", candidates, references)
    _check_words("frequent_words", words)
    said, expected = _present(candidates, words), _expected(references, words)
    counts = _counts(said, expected, np.ones((len(said), 1)))[0]
    scores = _scores(counts)
    weights = times_drawn(np.random.default_rng(seed), len(said), resamples)
    drawn = _scores(_counts(said, expected, weights)).mean(-1)
    intervals = percentiles(scores.mean(-1), drawn.T)
    tp, fp, fn = counts.astype(np.int64)
    return FrequentWords(tuple(words), tp, fp, fn, *scores, *map(intervals.at, range(3)))


def mean_scores(
    candidates: Sequence[Tokens],
    references: Sequence[References],
    words: Sequence[str],
    weights: Float[np.ndarray, "images resamples"],
) -> Float[np.ndarray, "resamples 3"]:
    """Precision, recall and F1, means over the words, of images that count several times.

    Args:
      candidates, references, words: as in `frequent_words`.
      weights: how often each image counts.

    Raises:
      ValueError: as `frequent_words`.
    """
    check_captions("mean_scores", candidates, references)
    _check_words("mean_scores", words)
    counts = _counts(_present(candidates, words), _expected(references, words), weights)
    return _scores(counts).mean(-1)


def _present(
    captions: Sequence[Tokens], words: Sequence[str]
) -> Bool[np.ndarray, "captions words"]:
    return np.array([[word in tokens for word in words] for tokens in map(set, captions)])


def _expected(
    references: Sequence[References], words: Sequence[str]
) -> Bool[np.ndarray, "images words"]:
    return _present([[w for tokens in image for w in tokens] for image in references], words)


def _counts(
    said: Bool[np.ndarray, "images words"],
    expected: Bool[np.ndarray, "images words"],
    weights: Float[np.ndarray, "images resamples"],
) -> Float[np.ndarray, "resamples 3 words"]:
    """True positives, false positives and false negatives, each image as often as drawn."""
    kinds = (said & expected, said & ~expected, ~said & expected)
    return np.stack([weights.T @ kind.astype(np.float64) for kind in kinds], axis=1)


def _scores(
    counts: Float[np.ndarray, "*resamples 3 words"],
) -> Float[np.ndarray, "*resamples 3 words"]:
    """Precision, recall and F1."""
    tp, fp, fn = np.moveaxis(counts, -2, 0)
    parts = [(tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn)]
    return np.stack([part / np.maximum(whole, 1) for part, whole in parts], axis=-2)


def _check_words(what: str, words: Sequence[str]) -> None:
    if isinstance(words, str) or not len(words) or len(set(words)) != len(words):
        raise ValueError(f"{what}: expected a list of different words, got {words!r}")
