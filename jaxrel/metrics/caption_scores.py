"""How like the references a caption is: BLEU, ROUGE-L and CIDEr-D, on tokens.

A sentence is a list of words, so there is no tokenizer to install: split sentences once, all of
them the same way, with `tokenise` or otherwise. On the same tokens the numbers are those of
pycocoevalcap, which most papers report; published numbers also depend on its PTB tokenizer.

CIDEr-D is the reward of self-critical training: see `CiderD`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Tokens = Sequence[str]
# The references of one image; images may have different numbers of them.
References = Sequence[Tokens]

ORDERS = 4  # n-grams of one to four words

# pycocoevalcap's guards against dividing by zero, which show in the scores of short sentences:
# an order in which a sentence has no n-gram at all counts as a precision of 1e-6.
_TINY, _SMALL = 1e-15, 1e-9
_BETA = 1.2
_SIGMA = 6.0


class Scores(NamedTuple):
    """What a metric gives: for BLEU an array over n = 1..4, otherwise one number.

    Attributes:
      corpus: the number to report; for BLEU not the mean of the examples.
      examples: one number per caption, for intervals and paired comparisons; float64.
    """

    corpus: float | Float[np.ndarray, " orders"]
    examples: Float[np.ndarray, "examples *orders"]


def tokenise(text: str) -> list[str]:
    """The words of a sentence: lower case, without punctuation.

    Apostrophes and hyphens inside a word stay. The PTB tokenizer of published COCO numbers
    splits some words further ("man's" into two).
    """
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("\u2019", "'"))


def bleu(candidates: Sequence[Tokens], references: Sequence[References]) -> Scores:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002).

    The geometric mean of the clipped n-gram precisions up to n, times the brevity penalty
    exp(1 - r / c) where the candidate's length c is below r, the length of the reference
    closest to it (the shorter of two equally close). The corpus number takes precisions and
    lengths over all captions together.

    Args:
      candidates: one caption per image.
      references: the references of each image, at least one.

    Returns:
      Scores with corpus `[4]` and examples `[examples, 4]`, from 0 to 1.

    Raises:
      ValueError: no captions, numbers that differ, an image without references, or text in
        place of tokens.
    """
    counts = bleu_counts(candidates, references)
    return Scores(bleu_of_counts(counts.sum(0)), bleu_of_counts(counts))


def bleu_counts(
    candidates: Sequence[Tokens], references: Sequence[References]
) -> Float[np.ndarray, "examples counts"]:
    """What BLEU of each caption is made of: sums of rows are the counts of a corpus.

    Args:
      candidates: one caption per image.
      references: the references of each image, at least one.

    Returns:
      Clipped matches for n = 1..4, n-grams for n = 1..4, the length, and that of the closest
      reference; see `bleu_of_counts`.

    Raises:
      ValueError: as `bleu`.
    """
    check_captions("bleu", candidates, references)
    rows = [_bleu_counts(*pair) for pair in zip(candidates, references, strict=True)]
    return np.array(rows, np.float64)


def bleu_of_counts(
    counts: Float[np.ndarray, "*examples counts"],
) -> Float[np.ndarray, "*examples orders"]:
    """BLEU-1 to BLEU-4 of counts as `bleu_counts` gives them, or of sums of them.

    Args:
      counts: of a caption, or of a corpus.

    Returns:
      From 0 to 1.
    """
    matches, grams = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    length, closest = counts[..., -2, None], counts[..., -1, None]
    logs = np.log((matches + _TINY) / (grams + _SMALL))
    mean = np.cumsum(logs, -1) / np.arange(1, ORDERS + 1)
    brevity = np.minimum(0, 1 - (closest + _SMALL) / (length + _TINY))
    return np.exp(mean + brevity)


def rouge_l(candidates: Sequence[Tokens], references: Sequence[References]) -> Scores:
    """ROUGE-L (Lin 2004): an F-measure (beta = 1.2) of the longest common subsequence.

    The largest precision and the largest recall over the references are taken each for itself,
    as pycocoevalcap does. An empty sentence has nothing in common with any.

    Args:
      candidates: one caption per image.
      references: the references of each image, at least one.

    Returns:
      Scores from 0 to 1; the corpus number is the mean.

    Raises:
      ValueError: as `bleu`.
    """
    check_captions("rouge_l", candidates, references)
    examples = [_rouge_l(*pair) for pair in zip(candidates, references, strict=True)]
    return Scores(float(np.mean(examples)), np.array(examples))


def cider_d(candidates: Sequence[Tokens], references: Sequence[References]) -> Scores:
    """CIDEr-D (Vedantam et al. 2015), document frequencies from these references.

    With one image alone every weight is log 1, and the score 0. To score few captions, or to
    score in training, take the frequencies from a larger corpus: `CiderD`.

    Args:
      candidates: one caption per image.
      references: the references of each image, at least one.

    Returns:
      Scores from 0 to 10; the corpus number is the mean.

    Raises:
      ValueError: as `bleu`.
    """
    check_captions("cider_d", candidates, references)
    examples = CiderD.from_references(references).score(candidates, references)
    return Scores(float(examples.mean()), examples)


@dataclasses.dataclass(frozen=True, eq=False)
class TfIdf:
    """A sentence as CIDEr-D sees it: made by `CiderD.weigh`.

    Attributes:
      weights: for n = 1..4, the weight of each n-gram.
      norms: for n = 1..4, the length of that vector.
      bigrams: how many there are, which stands for the sentence's length.
    """

    weights: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    bigrams: int


@dataclasses.dataclass(frozen=True, eq=False)
class CiderD:
    """CIDEr-D with the document frequencies of a corpus.

    For a reward, count the training references once and weigh each reference once:

        cider = CiderD.from_references(references)
        weighed = [[cider.weigh(tokens) for tokens in image] for image in references]
        reward = cider.score(sampled, [weighed[i] for i in batch])

    Attributes:
      frequency: in the references of how many images an n-gram occurs.
      images: how many images the corpus has.
    """

    frequency: Mapping[tuple[str, ...], int] = dataclasses.field(repr=False)
    images: int

    @classmethod
    def from_references(cls, references: Sequence[References]) -> "CiderD":
        """Count the n-grams of a corpus.

        Args:
          references: the references of each image, at least one.

        Returns:
          The metric for this corpus.

        Raises:
          ValueError: no images, an image without references, or text in place of tokens.
        """
        _check_references("CiderD", references)
        frequency: Counter[tuple[str, ...]] = Counter()
        for image in references:
            frequency.update({gram for tokens in image for n in _counts(tokens) for gram in n})
        return cls(frequency, len(references))

    def weigh(self, tokens: Tokens) -> TfIdf:
        """Weigh the n-grams of a sentence: count times log(images / frequency).

        An n-gram that the corpus lacks counts as one that occurs once.

        Args:
          tokens: the words.

        Returns:
          The weighed sentence; it fits this corpus alone.

        Raises:
          ValueError: text in place of tokens.
        """
        _check_tokens("CiderD.weigh", "the sentence", tokens)
        frequency, most = self.frequency.get, math.log(self.images)
        counts = _counts(tokens)
        weights = tuple(
            {gram: count * (most - math.log(frequency(gram, 1))) for gram, count in n.items()}
            for n in counts
        )
        norms = tuple(math.sqrt(sum(weight * weight for weight in n.values())) for n in weights)
        return TfIdf(weights, norms, max(len(tokens) - 1, 0))

    def score(
        self,
        candidates: Sequence[Tokens],
        references: Sequence[Sequence[Tokens | TfIdf]],
    ) -> Float[np.ndarray, " examples"]:
        """CIDEr-D of each caption.

        For each reference and each n the cosine of the weighed n-grams, the candidate's weights
        clipped to the reference's, times exp(-d^2 / (2 * 6^2)) with d the difference in length;
        then 10 times the mean over n and over references.

        Args:
          candidates: one caption per image.
          references: of each image, as tokens or as `weigh` returned them, which is faster.

        Returns:
          Scores from 0 to 10, float64.

        Raises:
          ValueError: as `bleu`.
        """
        check_captions("CiderD.score", candidates, references)
        return np.array([self._score(*pair) for pair in zip(candidates, references, strict=True)])

    def _score(self, tokens: Tokens, references: Sequence[Tokens | TfIdf]) -> float:
        candidate = self.weigh(tokens)
        weighed = [r if isinstance(r, TfIdf) else self.weigh(r) for r in references]
        return 10 * sum(_similarity(candidate, r) for r in weighed) / len(weighed)


def _counts(tokens: Tokens) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1..4."""
    tails = [tokens[i:] for i in range(ORDERS)]
    # The shortest tail ends the n-grams.
    return [Counter(zip(*tails[:n], strict=False)) for n in range(1, ORDERS + 1)]


def _bleu_counts(candidate: Tokens, references: References) -> list[int]:
    """Clipped matches and n-grams, both for n = 1..4, the length, and the closest reference's."""
    most = [Counter[tuple[str, ...]]() for _ in range(ORDERS)]
    for reference in references:
        for seen, counts in zip(most, _counts(reference), strict=True):
            seen |= counts  # the larger count of the two, in place
    matches = [(c & r).total() for c, r in zip(_counts(candidate), most, strict=True)]
    length = len(candidate)
    grams = [max(length - n, 0) for n in range(ORDERS)]
    closest = min((abs(len(r) - length), len(r)) for r in references)[1]
    return [*matches, *grams, length, closest]


def _rouge_l(candidate: Tokens, references: References) -> float:
    common = [_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / max(len(candidate), 1)
    recall = max(c / max(len(r), 1) for c, r in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence, row by row of the usual table."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _similarity(candidate: TfIdf, reference: TfIdf) -> float:
    """The mean over n of the clipped cosines, with the penalty for a different length."""
    total = 0.0
    for n in range(ORDERS):
        norm = candidate.norms[n] * reference.norms[n]
        if norm:
            weights = reference.weights[n]
            shared = ((w, weights[g]) for g, w in candidate.weights[n].items() if g in weights)
            total += sum(min(mine, its) * its for mine, its in shared) / norm
    difference = candidate.bigrams - reference.bigrams
    return total / ORDERS * math.exp(-(difference**2) / (2 * _SIGMA**2))


def check_captions(
    where: str, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens | TfIdf]]
) -> None:
    """Raise ValueError unless there are captions, and as many references, in words.

    Args:
      where: who asks, for the message.
      candidates: one caption per image.
      references: of each image, at least one.
    """
    if len(candidates) != len(references):
        raise ValueError(
            f"{where}: {len(candidates)} candidates and references of {len(references)} images; "
            "give one list of references per candidate"
        )
    for i, tokens in enumerate(candidates):
        _check_tokens(where, f"candidate {i}", tokens)
    _check_references(where, references)


def _check_references(where: str, references: Sequence[Sequence[Tokens | TfIdf]]) -> None:
    if not len(references):
        raise ValueError(f"{where}: expected references of at least one image, got none")
    for i, image in enumerate(references):
        if isinstance(image, str) or not len(image):
            raise ValueError(
                f"{where}: the references of image {i} are {image!r}; expected a list of at "
                "least one, each a list of words"
            )
        for tokens in image:
            _check_tokens(where, f"a reference of image {i}", tokens)


def _check_tokens(where: str, what: str, tokens: Tokens | TfIdf) -> None:
    # A string is a sequence of strings too: its letters would be scored as words.
    if isinstance(tokens, str):
        raise ValueError(
            f"{where}: {what} is the text {tokens!r}; expected a list of words, as "
            "tokenise(text) gives"
        )
