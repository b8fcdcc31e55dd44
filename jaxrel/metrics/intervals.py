"""Intervals: how much a mean over examples would move with other examples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

# A number of examples that count several times, once per column of the weights:
# `weights [examples, resamples] -> [resamples]`.
Statistic = Callable[[Float[np.ndarray, "examples resamples"]], Float[np.ndarray, " resamples"]]

# Drawn indices held at a time: 32 MiB as int64.
_DRAWN_AT_ONCE = 2**22


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
    return percentiles(values.mean(), means).at()


class Intervals(NamedTuple):
    """Many means with the ends of their 95% intervals, each an array of one shape."""

    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]

    def at(self, *index: int) -> Interval:
        """One of them."""
        return Interval(*(float(part[index]) for part in self))


def percentiles(
    mean: float | np.floating | Float[np.ndarray, "*rows"],
    drawn: Sequence[float] | Float[np.ndarray, "*rows resamples"],
) -> Intervals:
    """The 95% intervals of values whose resamples are given: percentiles (Efron 1979).

    Args:
      mean: the values themselves.
      drawn: the same of each resample, along the last axis.
    """
    ends = np.percentile(drawn, [2.5, 97.5], axis=-1)
    return Intervals(*map(np.asarray, (mean, *ends)))


def bootstrap_ratio(
    part: Shaped[np.ndarray, " examples"],
    whole: Shaped[np.ndarray, " examples"],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Ratio of two sums over independent examples with its bootstrap 95% interval.

    For shares of things of which an example has several (the questions of a scene, the objects
    that a caption names): examples are resampled, since their parts are not independent.

    Args:
      part: what counts in each example, such as its right answers.
      whole: out of how many, such as its questions.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Returns:
      The ratio and the 2.5% and 97.5% percentiles of the resampled ratios.

    Raises:
      ValueError: the numbers of examples differ, or there is nothing to take a share of.
    """
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    if part.shape != whole.shape or not whole.sum() > 0:
        raise ValueError(
            f"bootstrap_ratio: expected a part and a positive whole per example, got "
            f"{part.shape} and {whole.shape} with the sums {part.sum():g} and {whole.sum():g}"
        )
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        rows = rng.integers(0, len(part), len(part))
        ratios.append(part[rows].sum() / max(whole[rows].sum(), 1e-9))
    return percentiles(part.sum() / whole.sum(), ratios).at()


def bootstrap_many(
    values: Shaped[np.ndarray, "*rows examples"], *, seed: int = 0, resamples: int = 2000
) -> Intervals:
    """`bootstrap` for many measures of the same examples at once, such as the points of a curve.

    Every row meets the same resamples, those that `bootstrap` draws with this seed, so a row's
    interval is `bootstrap`'s up to rounding, and the difference of two rows may be given as a
    row of its own. The intervals hold for each row alone, not for all of them together.

    Args:
      values: one number (or bool) per example in each row.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Returns:
      Means and percentiles of shape `[*rows]`, float64.

    Raises:
      ValueError: no values, or some are not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError(
            f"bootstrap_many: expected values [..., examples], got none: shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"bootstrap_many: of {values.size} values some are not finite")
    examples = values.shape[-1]
    rng = np.random.default_rng(seed)
    means = np.empty((*values.shape[:-1], resamples))
    chunk = max(1, _DRAWN_AT_ONCE // examples)
    for start in range(0, resamples, chunk):
        rows = means[..., start : start + chunk]
        # A resampled mean is a weighted mean, the weight being how often an example was drawn.
        rows[...] = values @ times_drawn(rng, examples, rows.shape[-1]) / examples
    return percentiles(values.mean(-1), means)


def share(
    part: Shaped[np.ndarray, " examples"], whole: Shaped[np.ndarray, " examples"]
) -> Statistic:
    """The ratio of two sums over examples, as a `Statistic`; 0 of nothing is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return lambda weights: (part @ weights) / np.maximum(whole @ weights, 1e-9)


def resampled(
    repetitions: Sequence[Statistic], examples: int, *, seed: int = 0, resamples: int = 2000
) -> Float[np.ndarray, " draws"]:
    """The mean of a statistic over repetitions of an experiment, and the same of resamples.

    Resampled are the examples, which all repetitions share, and the repetitions (such as
    training runs with other seeds): the two levels of a hierarchical bootstrap. With few
    repetitions their part of the spread is itself uncertain: with three, 1 in 9 resamples has
    one of them alone.

    The same seed and numbers give the same resamples: the difference of two results is paired.

    Args:
      repetitions: the statistic of each; see `Statistic`.
      examples: how many.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Returns:
      The mean itself, then that of each resample: `[1 + resamples]`. See `interval`.

    Raises:
      ValueError: no repetitions, no examples, or a statistic that is not finite.
    """
    if not repetitions or examples < 1:
        raise ValueError(
            f"resampled: expected repetitions and examples, got {len(repetitions)} and {examples}"
        )
    rng = np.random.default_rng(seed)
    of_examples = times_drawn(rng, examples, resamples)
    of_repetitions = times_drawn(rng, len(repetitions), resamples)
    weights = np.hstack([np.ones((examples, 1)), of_examples])
    values = np.stack([statistic(weights) for statistic in repetitions])
    if not np.isfinite(values).all():
        raise ValueError("resampled: a statistic is not finite")
    times = np.hstack([np.ones((len(repetitions), 1)), of_repetitions])
    return (values * times).sum(0) / len(repetitions)


def interval(draws: Float[np.ndarray, " draws"]) -> Interval:
    """The value and its 95% interval of what `resampled` gives, or of a difference of two."""
    return percentiles(draws[0], draws[1:]).at()


def group_sums(
    values: Shaped[np.ndarray, "*measures cases"], group: Int[np.ndarray, " cases"]
) -> Float[np.ndarray, "*measures groups"]:
    """Sums over the cases of each group, such as the words of an image.

    Args:
      values: one number (or bool) per case.
      group: the number of each case's group, from 0.
    """
    sums = np.zeros((group.max() + 1, *values.shape[:-1]))
    np.add.at(sums, group, np.moveaxis(values, -1, 0).astype(np.float64))
    return np.moveaxis(sums, 0, -1)


def times_drawn(
    rng: np.random.Generator, examples: int, resamples: int
) -> Float[np.ndarray, "{examples} {resamples}"]:
    """How often each example is in each resample drawn with replacement."""
    # One call draws the same numbers as a call per resample.
    drawn = rng.integers(0, examples, (resamples, examples))
    drawn += examples * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=examples * resamples)
    return counts.reshape(resamples, examples).T.astype(np.float64)
