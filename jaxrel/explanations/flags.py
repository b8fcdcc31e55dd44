"""`Verdict`: what the map of a word says of the word."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a word is doubted to be true of the picture, since a statistic of its map is low.

    Attributes:
      word: the word.
      statistic: of its map, by the name that `map_statistics` in `jaxrel.metrics` gives it.
      value: of the statistic.
      threshold: a word with less is doubted.
      precision: the share of words doubted so that were hallucinated, where that was measured.
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
            raise ValueError(f"Verdict: numbers must be finite, got {numbers}")

    @property
    def doubted(self) -> bool:
        """Is it below the threshold?"""
        return self.value < self.threshold

    def __str__(self) -> str:
        found = f"{self.statistic} of the map {self.value:.4g}"
        if not self.doubted:
            return f"not doubted: {found}, at least {self.threshold:.4g}"
        # "Likely" is said of more than half alone.
        how = "likely" if self.precision > 0.5 else "perhaps"
        return (
            f"{how} hallucinated: {found}, below {self.threshold:.4g} ({self.precision:.0%} of the "
            f"words below it were hallucinated, {self.evidence})"
        )
