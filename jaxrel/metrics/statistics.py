"""Intervals: how much a mean over examples would move with other examples."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped


class Interval(NamedTuple):
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Shaped[np.ndarray, " examples"], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Mean of independent examples with its bootstrap 95% interval (percentiles; Efron 1979).

    To compare two methods, give their difference on the same examples: the comparison is then
    paired, and a claim needs an interval that excludes 0.

    Args:
      values: one number (or bool) per example.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Returns:
      The mean and the 2.5% and 97.5% percentiles of the resampled means.

    Raises:
      ValueError: no values, or some are not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("bootstrap: expected one value per example, got none")
    if not np.isfinite(values).all():
        raise ValueError(f"bootstrap: of {values.size} values some are not finite")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
