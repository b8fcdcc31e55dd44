"""`Flag`: what the map of a word says of the word."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Flag:
    """Whether a word is flagged to be true of the image, since a statistic of its map is low.

    Attributes:
      word: the word.
      statistic: of its map, by the name that `map_statistics` in `jaxrel.metrics` gives it.
      value: of the statistic.
      threshold: a word with less is flagged.
      precision: the share of words flagged so that were hallucinated, where that was measured.
      evidence: how well this tells words, and where that was measured.

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
        """Is it below the threshold?"""
        return self.value < self.threshold

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
