"""Can the map of a word tell that the word is hallucinated?

After Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image captioning
models": statistics of each mention's map, and how well they separate words that are true of the
image from those that are not, as the area under the ROC curve. One statistic per mention; the
reference implementation keeps the largest of a true word's mentions and the smallest of a
hallucinated word's, which widens the gap by itself.

    scores = map_statistics(maps)                # maps[i] is the map of mention i
    auc_intervals(scores, true, image=image)     # true[i]: is it true of its image?
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrel.metrics.correctness import check_maps
from jaxrel.metrics.intervals import Interval, percentiles, times_drawn

QUANTILES: tuple[float, ...] = tuple(i / 100 for i in range(100))
_PLAIN = ("mean", "mean_abs", "mean_positive", "max")

# Weights of mentions in resamples held at a time: 32 MiB as float64.
_WEIGHTS_AT_ONCE = 2**22

# Shapes and dtypes are told apart here so that a wrong one meets our own error.
Scores = Shaped[Array | np.ndarray, "*statistics mentions"]
Statistics = Mapping[str, Shaped[Array | np.ndarray, "..."]]
Labels = Shaped[Array | np.ndarray, "..."]
Images = Int[Array | np.ndarray, "..."]


class Threshold(NamedTuple):
    """A statistic that says of a word whether it is true.

    Attributes:
      statistic: its name.
      threshold: words with at least this much are said to be true.
      sensitivity: the share of true words that are said to be true.
      specificity: the share of hallucinated words that are said not to be.
    """

    statistic: str
    threshold: float
    sensitivity: float
    specificity: float


def map_statistics(
    maps: Float[Array | np.ndarray, "*words height width"],
    *,
    quantiles: Sequence[int | float] = QUANTILES,
) -> dict[str, Float[Array, "*words"]]:
    """One number per map: how much relevance a word has, said in several ways.

    Args:
      maps: signed relevance, of relevance per channel the mean; or attention, of which the mean,
        the maximum and the quantiles tell something.
      quantiles: from 0 to 1, interpolated linearly; static.

    Returns:
      `mean`, `mean_abs`, `mean_positive` (of the positive pixels alone, 0 where there are none),
      `max` and `quantile 0`, `quantile 0.01`, ... for each of `quantiles`; float32 (float64 for
      float64 maps). Pure, and made for `jax.jit`.

    Raises:
      ValueError: maps without pixels, a map that is not finite (NaN under `jax.jit`), or a
        quantile outside [0, 1].
    """
    if not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(f"map_statistics: quantiles lie from 0 to 1, got {tuple(quantiles)}")
    if not maps.shape[-1] * maps.shape[-2]:
        raise ValueError(
            f"map_statistics: expected maps [..., height, width] with pixels, got "
            f"{list(maps.shape)}"
        )
    check_maps("map_statistics", maps)
    names = (*_PLAIN, *(f"quantile {q:g}" for q in quantiles))
    # A dict that leaves jax.jit is sorted by its names.
    found = _map_statistics(jnp.asarray(maps), tuple(float(q) for q in quantiles))
    return dict(zip(names, found, strict=True))


def map_statistic(
    maps: Float[Array | np.ndarray, "*words height width"], name: str
) -> Float[Array, "*words"]:
    """One statistic of `map_statistics`, by its name; a quantile need not be of `QUANTILES`.

    Raises:
      ValueError: as `map_statistics`, or see `check_statistic`.
    """
    check_statistic(name)
    quantiles = () if name in _PLAIN else (float(name.removeprefix("quantile ")),)
    return map_statistics(maps, quantiles=quantiles)[name]


def check_statistic(name: str) -> None:
    """Raise ValueError unless `map_statistics` can give a statistic of this name."""
    try:
        quantile = float(name.removeprefix("quantile "))
    except ValueError:
        quantile = -1.0
    if name not in _PLAIN and not (0 <= quantile <= 1 and name == f"quantile {quantile:g}"):
        raise ValueError(
            f"there is no statistic {name!r} of maps; there are {', '.join(_PLAIN)} and quantiles "
            "from 0 to 1, such as 'quantile 0.95'"
        )


def roc_auc(scores: Scores, true: Labels) -> Float[np.ndarray, "*statistics"]:
    """The area under the ROC curve: how often a true word has the higher score.

    Over all pairs of a true and a hallucinated mention; equal scores count half. 0.5 is chance;
    below it, hallucinated words have the higher scores.

    Args:
      scores: of each mention, by any number of statistics.
      true: bool, False for hallucinated mentions.

    Raises:
      ValueError: mentions of one kind alone, whose area is not defined; scores that are not
        finite or not as many as mentions; or `true` is not bool.
    """
    values, kind = _checked("roc_auc", scores, true)
    flat = values.reshape(-1, kind.size)
    areas = _areas(flat, kind, np.ones((kind.size, 1)))
    return areas[:, 0].reshape(values.shape[:-1])


def auc_intervals(
    statistics: Statistics,
    true: Labels,
    *,
    image: Images | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """`roc_auc` by statistic, with bootstrap 95% intervals over images.

    The mentions of an image are not independent, and are drawn together. A resample with
    mentions of one kind alone has no area and is left out. Each interval holds for itself:
    nothing is corrected for how many statistics there are.

    Args:
      statistics: scores of the same mentions by name, as `map_statistics` gives them.
      true: bool, False for hallucinated mentions.
      image: the image of each mention; None for an image per mention.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Raises:
      ValueError: as `roc_auc`; no statistics; images that are not as many as mentions; or no
        resample has mentions of both kinds.
    """
    names, scores, kind = _stacked("auc_intervals", statistics, true)
    groups = _groups("auc_intervals", image, kind.size)
    drawn = _resampled("auc_intervals", scores, kind, groups, seed, resamples)
    return _intervals(names, roc_auc(scores, kind), drawn)


def auc_differences(
    first: Statistics,
    second: Statistics,
    true: Labels,
    *,
    image: Images | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """How much better the first method separates than the second, on the same mentions.

    The area of each statistic of the first less that of the second's statistic of that name,
    with bootstrap 95% intervals: both methods meet the same resamples of images.

    Args:
      first: scores by name; to compare different statistics, give both the same name.
      second: scores of the same mentions, with the same names.
      true: as in `auc_intervals`.
      image: as in `auc_intervals`.
      seed: of the resampling.
      resamples: how many samples are drawn with replacement.

    Raises:
      ValueError: as `auc_intervals`, or the names differ.
    """
    if set(first) != set(second):
        raise ValueError(
            f"auc_differences: statistics {', '.join(sorted(first))} of the first and "
            f"{', '.join(sorted(second))} of the second; give the same names"
        )
    names, one, kind = _stacked("auc_differences", first, true)
    _, two, _ = _stacked("auc_differences", {name: second[name] for name in names}, true)
    groups = _groups("auc_differences", image, kind.size)
    both = np.concatenate([one, two])
    drawn = _resampled("auc_differences", both, kind, groups, seed, resamples)
    areas = roc_auc(both, kind)
    half = len(names)
    return _intervals(names, areas[:half] - areas[half:], drawn[:half] - drawn[half:])


def best_threshold(statistics: Statistics, true: Labels) -> Threshold:
    """The statistic that separates best, and the threshold at which it does.

    The statistic has the largest `roc_auc`, the first of equal ones; the threshold is the score
    with the largest sensitivity + specificity - 1 (Youden 1950), the highest of equal ones.
    Both are chosen on these mentions, which flatters them: measure on others.

    Args:
      statistics: scores of the same mentions by name.
      true: bool, False for hallucinated mentions.

    Raises:
      ValueError: as `auc_intervals`.
    """
    names, scores, kind = _stacked("best_threshold", statistics, true)
    best = int(np.argmax(roc_auc(scores, kind)))
    thresholds = np.unique(scores[best])[::-1]
    accepted, caught = _told(scores[best], kind, thresholds)
    real, false = int(kind.sum()), int((~kind).sum())
    # In whole numbers, so that equal ones are equal.
    i = int(np.argmax(accepted * false + caught * real))
    return Threshold(
        names[best], float(thresholds[i]), float(accepted[i] / real), float(caught[i] / false)
    )


@functools.partial(jax.jit, static_argnames="quantiles")
def _map_statistics(
    maps: Float[Array, "*words height width"], quantiles: tuple[float, ...]
) -> list[Float[Array, "*words"]]:
    x = maps.reshape(*maps.shape[:-2], -1)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    positive = (x > 0).sum(-1)
    mean_positive = jnp.maximum(x, 0).sum(-1) / jnp.where(positive == 0, 1, positive)
    parts = jnp.quantile(x, jnp.asarray(quantiles, x.dtype), axis=-1)
    return [x.mean(-1), jnp.abs(x).mean(-1), mean_positive, x.max(-1), *parts]


def _resampled(
    what: str,
    scores: Float[np.ndarray, "statistics mentions"],
    true: Bool[np.ndarray, " mentions"],
    group: Int[np.ndarray, " mentions"],
    seed: int,
    resamples: int,
) -> Float[np.ndarray, "statistics defined"]:
    """The areas in the resamples that have mentions of both kinds."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_AT_ONCE // len(group))
    areas = []
    for start in range(0, resamples, chunk):
        drawn = times_drawn(rng, int(group.max()) + 1, min(chunk, resamples - start))
        areas.append(_areas(scores, true, drawn[group]))
    found = np.concatenate(areas, axis=-1)
    defined = np.isfinite(found[0])
    if not defined.any():
        raise ValueError(
            f"{what}: none of {resamples} resamples of {group.max() + 1} images has both true "
            "and hallucinated mentions; give more images or resamples"
        )
    return found[:, defined]


def _areas(
    scores: Float[np.ndarray, "statistics mentions"],
    true: Bool[np.ndarray, " mentions"],
    weights: Float[np.ndarray, "mentions resamples"],
) -> Float[np.ndarray, "statistics resamples"]:
    """Weighted areas; NaN where a kind has no weight."""
    positive, negative = weights[true], weights[~true]
    pairs = positive.sum(0) * negative.sum(0)
    won = np.array([_won(one[true], one[~true], positive, negative) for one in scores])
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan)


def _won(
    true: Float[np.ndarray, " true"],
    hallucinated: Float[np.ndarray, " hallucinated"],
    positive: Float[np.ndarray, "true resamples"],
    negative: Float[np.ndarray, "hallucinated resamples"],
) -> Float[np.ndarray, " resamples"]:
    """In how many pairs the true mention has the higher score, equal pairs at a half."""
    order = np.argsort(hallucinated)
    # The weight of the lowest 0, 1, 2, ... hallucinated mentions.
    lowest = np.concatenate([np.zeros_like(negative[:1]), np.cumsum(negative[order], axis=0)])
    below, up_to = (
        np.searchsorted(hallucinated[order], true, side=side) for side in ("left", "right")
    )
    return np.einsum("mr,mr->r", positive, lowest[below] + lowest[up_to]) / 2


def _told(
    scores: Float[np.ndarray, " mentions"],
    true: Bool[np.ndarray, " mentions"],
    thresholds: Float[np.ndarray, " thresholds"],
) -> tuple[Int[np.ndarray, " thresholds"], Int[np.ndarray, " thresholds"]]:
    """How many true mentions are said to be true, and how many hallucinated ones not to be."""
    missed, caught = (np.searchsorted(np.sort(scores[kind]), thresholds) for kind in (true, ~true))
    return true.sum() - missed, caught


def _intervals(
    names: Sequence[str],
    means: Float[np.ndarray, " statistics"],
    drawn: Float[np.ndarray, "statistics resamples"],
) -> dict[str, Interval]:
    intervals = percentiles(means, drawn)
    return {name: intervals.at(i) for i, name in enumerate(names)}


def _groups(what: str, image: Images | None, count: int) -> Int[np.ndarray, " mentions"]:
    """Images numbered from 0."""
    if image is None:
        return np.arange(count)
    if image.shape != (count,):
        raise ValueError(
            f"{what}: images of {list(image.shape)} for {count} mentions; give one number "
            "per mention"
        )
    return np.unique(np.asarray(image), return_inverse=True)[1]


def _stacked(
    what: str, statistics: Statistics, true: Labels
) -> tuple[list[str], Float[np.ndarray, "statistics mentions"], Bool[np.ndarray, " mentions"]]:
    if not statistics:
        raise ValueError(f"{what}: expected scores by statistic, got none")
    rows = [_checked(f"{what}: {name!r}", one, true) for name, one in statistics.items()]
    wrong = {name: list(one.shape) for name, one in statistics.items() if one.ndim != 1}
    if wrong:
        raise ValueError(f"{what}: expected one score per mention, got shapes {wrong}")
    return list(statistics), np.stack([values for values, _ in rows]), rows[0][1]


def _checked(
    what: str, scores: Scores, true: Labels
) -> tuple[Float[np.ndarray, "*statistics mentions"], Bool[np.ndarray, " mentions"]]:
    values, kind = np.asarray(scores, np.float64), np.asarray(true)
    if kind.dtype != np.bool_:
        raise ValueError(
            f"{what}: `true` must be bool, False for hallucinated mentions, got {kind.dtype}"
        )
    if kind.ndim != 1 or values.shape[-1:] != kind.shape:
        raise ValueError(
            f"{what}: scores of {list(values.shape)} and `true` of {list(kind.shape)}; expected "
            "[..., mentions] and [mentions]"
        )
    if not 0 < kind.sum() < kind.size:
        raise ValueError(
            f"{what}: an area needs true and hallucinated mentions, got {kind.sum()} true ones "
            f"of {kind.size}"
        )
    check_maps(f"{what}: scores", values)
    return values, kind
