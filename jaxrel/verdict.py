"""`Verdict`: what the map of a word says of the word."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a word is doubted, since a statistic of its map is low.

    Attributes:
      word: the word.
      statistic: of its map, by the name that `map_statistics` in `jaxrel.metrics` gives it.
      value: of the statistic.
      threshold: a word with less is doubted.
      evidence: how well this tells words that are not there, and where that was measured.

    Raises:
      ValueError: value or threshold is not finite.
    """

    word: str
    statistic: str
    value: float
    threshold: float
    evidence: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or not math.isfinite(self.threshold):
            raise ValueError(
                f"Verdict: value and threshold must be finite, got {self.value} and "
                f"{self.threshold}"
            )

    @property
    def doubted(self) -> bool:
        """Is the word likely not there?"""
        return self.value < self.threshold

    def __str__(self) -> str:
        found = f"{self.statistic} of the map {self.value:.4g}"
        if self.doubted:
            return f"likely not there: {found}, below {self.threshold:.4g} ({self.evidence})"
        return f"not doubted: {found}, at least {self.threshold:.4g}"
