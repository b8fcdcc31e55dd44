"""Does a score follow what an explanation says? Insertion, deletion, infidelity, sensitivity.

All take plain functions of a batch: `fun` from inputs `[batch, ...]` to one score per example,
`[batch]`, and `explain` from inputs to relevance of any shape. They are pure, and may be jitted.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Images = Float[Array | np.ndarray, "batch height width channels"]
# As many cells as divide the image; told apart here so that a wrong shape meets our own error.
Maps = Float[Array | np.ndarray, "maps rows columns"]
Inputs = Float[Array | np.ndarray, "batch *features"]
# As many as inputs; a wrong shape meets our own error.
Relevance = Float[Array | np.ndarray, "examples *parts"]
Score = Callable[[Array], Array]
Perturbation = Callable[[PRNGKeyArray, Array], Array]


def deletion(
    fun: Score,
    images: Images,
    relevance: Maps,
    baseline: Float[Array | np.ndarray, "..."] | float = 0.0,
    *,
    steps: int = 28,
) -> Float[Array, "steps batch"]:
    """Scores while the most relevant cells are replaced by a baseline, a step at a time.

    Petsiuk et al. 2018, "RISE". The faster the score falls, the better the map: lower areas
    (`area`) are better.

    Args:
      fun: the score of each image, `[batch, height, width, channels]` to `[batch]`.
      images: to be explained.
      relevance: maps whose cells divide the image, as patches or pixels do.
      baseline: what removed cells become: a number, a colour `[channels]`, or images.
      steps: how many; the same number of cells goes in each, up to rounding.

    Returns:
      The scores from the whole image to the baseline, `steps + 1` of them, in `fun`'s dtype. Of
      equally relevant cells the first goes first.

    Raises:
      ValueError: maps do not fit the images, are not finite (not seen under `jax.jit`), steps
        are fewer than 1, or `fun` does not return one score per image.
    """
    return _replaced("deletion", fun, images, relevance, baseline, steps, inserted=False)


def insertion(
    fun: Score,
    images: Images,
    relevance: Maps,
    baseline: Float[Array | np.ndarray, "..."] | float = 0.0,
    *,
    steps: int = 28,
) -> Float[Array, "steps batch"]:
    """Scores while the most relevant cells are inserted into a baseline: the reverse of `deletion`.

    Petsiuk et al. 2018, who insert into the blurred image, such as
    `scipy.ndimage.gaussian_filter(images, (0, 5, 5, 0))`. Higher areas are better. Arguments,
    results and errors are those of `deletion`, from the baseline to the whole image.
    """
    return _replaced("insertion", fun, images, relevance, baseline, steps, inserted=True)


def area(scores: Float[Array, "steps batch"]) -> Float[Array, " batch"]:
    """The area under curves whose steps are equally far apart, over 0 to 1."""
    return jnp.trapezoid(scores, axis=0) / (len(scores) - 1)


def _replaced(
    name: str,
    fun: Score,
    images: Images,
    relevance: Maps,
    baseline: Array | np.ndarray | float,
    steps: int,
    *,
    inserted: bool,
) -> Array:
    (batch, height, width, _), (maps, rows, columns) = images.shape, relevance.shape
    if maps != batch or height % rows or width % columns:
        raise ValueError(
            f"{name}: maps {relevance.shape} do not divide images {images.shape}; give one map "
            "per image, of pixels or of patches that tile it"
        )
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
    _check_finite(name, relevance)
    cells = rows * columns
    order = jnp.argsort(-jnp.asarray(relevance).reshape(batch, cells), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1).reshape(batch, rows, columns)
    rank = jnp.repeat(jnp.repeat(rank, height // rows, 1), width // columns, 2)[..., None]
    images = jnp.asarray(images)
    empty = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    first, last = (empty, images) if inserted else (images, empty)

    def score(count):
        return _scores(name, fun, jnp.where(rank < count, last, first))

    return jax.lax.map(score, jnp.asarray(np.round(np.linspace(0, cells, steps + 1)), jnp.int32))


def infidelity(
    fun: Score,
    x: Inputs,
    relevance: Relevance,
    key: PRNGKeyArray,
    *,
    perturb: Perturbation | float = 0.2,
    samples: int = 64,
    normalise: bool = False,
) -> Float[Array, " batch"]:
    """How wrongly relevance predicts what small perturbations do to a score.

    `E[(I . R - (f(x) - f(x - I)))^2]`: Yeh et al. 2019, "On the (In)fidelity and Sensitivity of
    Explanations", definition 2.1. R is per unit of input, as gradients are: divide relevance that
    sums to the score, such as input x gradient or LRP, by the input.

    Args:
      fun: the score of each example.
      x: the inputs.
      relevance: of the inputs' shape.
      key: of the perturbations.
      perturb: `(key, x) -> I`, what is taken from the inputs; a number is the standard deviation of
        normal noise.
      samples: perturbations per example.
      normalise: whether R is scaled for each example by the factor that fits best, so that maps
        of other units compare.

    Returns:
      0 or more, lower is better, in the dtype of the scores.

    Raises:
      ValueError: shapes differ, relevance is not finite (not seen under `jax.jit`), fewer than one
        sample, or `fun` does not return one score per example.
    """
    if x.shape != relevance.shape:
        raise ValueError(
            f"infidelity: relevance {relevance.shape} of inputs {x.shape}; give relevance of every "
            "feature"
        )
    _check_samples("infidelity", samples)
    _check_finite("infidelity", relevance)
    x, relevance = jnp.asarray(x), jnp.asarray(relevance)
    score = _scores("infidelity", fun, x)

    def one(key):
        change = perturb(key, x) if callable(perturb) else _normal(key, x) * perturb
        predicted = (change * relevance).reshape(len(x), -1).sum(-1)
        return predicted, score - _scores("infidelity", fun, x - change)

    predicted, found = jax.lax.map(one, jax.random.split(key, samples))
    if normalise:
        squares = jnp.square(predicted).sum(0)
        scale = (predicted * found).sum(0) / jnp.where(squares == 0, 1, squares)
        predicted = predicted * scale
    return jnp.square(predicted - found).mean(0)


def max_sensitivity(
    explain: Callable[[Array], Array],
    x: Inputs,
    key: PRNGKeyArray,
    *,
    radius: float = 0.02,
    samples: int = 10,
) -> Float[Array, " batch"]:
    """The largest change of relevance in a neighbourhood, over the length of the relevance.

    Yeh et al. 2019, definition 3.1, by `samples` uniform draws within `radius` of each feature.

    Args:
      explain: from inputs to relevance, `[batch, ...]`, each example by itself.
      x: the inputs.
      key: of the draws.
      radius: of the neighbourhood, in units of the input.
      samples: draws per example.

    Returns:
      0 or more, lower is steadier; of relevance that is 0 everywhere, infinity where it changes.

    Raises:
      ValueError: fewer than one sample.
    """
    _check_samples("max_sensitivity", samples)
    x = jnp.asarray(x)
    before = explain(x)

    def one(key):
        noise = jax.random.uniform(key, x.shape, x.dtype, -radius, radius)
        return _length(explain(x + noise) - before)

    change = jax.lax.map(one, jax.random.split(key, samples)).max(0)
    return jnp.where(change == 0, 0, change / _length(before))


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.square(x).reshape(len(x), -1).sum(-1))


def _normal(key: PRNGKeyArray, x: Array) -> Array:
    return jax.random.normal(key, x.shape, x.dtype)


def _scores(name: str, fun: Score, x: Array) -> Array:
    scores = fun(x)
    if jnp.shape(scores) != (len(x),):
        raise ValueError(
            f"{name}: expected one score per example, ({len(x)},), from the function for inputs "
            f"{x.shape}, got {jnp.shape(scores)}; choose one, as in lambda x: fun(x)[:, target]"
        )
    return scores


def _check_samples(name: str, samples: int) -> None:
    if samples < 1:
        raise ValueError(f"{name}: samples must be at least 1, got {samples}")


def _check_finite(name: str, relevance: Array | np.ndarray) -> None:
    if not isinstance(relevance, jax.core.Tracer) and not np.isfinite(relevance).all():
        raise ValueError(f"{name}: relevance is not finite; look for NaN in the explanation")
