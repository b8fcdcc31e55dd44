"""`Flag`: what the map of a word says of the word."""

import dataclasses
import math

from jaxrel.renamed import renamed_attribute


@dataclasses.dataclass(frozen=True)
class Flag:
    """Whether a word is likely hallucinated, judged by a statistic of its map.

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
        # "Likely" is said of more than half alone.
        how = "likely" if self.precision > 0.5 else "perhaps"
        return (
            f"{how} hallucinated: {found}, below {self.threshold:.4g} ({self.precision:.0%} of the "
            f"words below it were hallucinated, {self.evidence})"
        )
