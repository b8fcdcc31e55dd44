"""`Flag`: what the map of a word says of the word."""

import dataclasses
import math

from jaxrel.renamed import renamed_attribute


@dataclasses.dataclass(frozen=True)
class Flag:
    """Whether a word is worth a second look, judged by a statistic of its map.

    Words that are not in the image have less of it, on average; a flag is a hint and no verdict.

    Attributes:
      word: the word.
      statistic: the name of the statistic, as in `jaxrel.metrics.word_statistics.map_statistics`.
      value: the value of the statistic on the word's map.
      threshold: a word with a lower value is flagged.
      precision: the share of flagged words that were hallucinated when this was measured.
      evidence: how well the statistic tells words apart, and on which data.

    Raises:
      ValueError: a number is not finite.
    """

    word: str
    statistic: str
    value: float
    threshold: float
    precision: float
    evidence: str

    def __post_init__(self) -> None:
        numbers = (self.value, self.threshold, self.precision)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"Flag: numbers must be finite, got {numbers}")

    @property
    def flagged(self) -> bool:
        """Whether the value is below the threshold."""
        return self.value < self.threshold

    doubted = renamed_attribute("doubted", "flagged")

    def __str__(self) -> str:
        found = f"{self.statistic} of the map {self.value:.4g}"
        if not self.flagged:
            return f"not flagged: {found}, at least {self.threshold:.4g}"
        # The share comes first: most flagged words may be true.
        return (
            f"{1 - self.precision:.0%} of words flagged like this one are true of the image, and "
            f"{self.precision:.0%} are not ({self.evidence}); flagged by the {found}, below "
            f"{self.threshold:.4g}"
        )
