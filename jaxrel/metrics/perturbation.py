"""The perturbation test: how a model fares when tokens go in the order of their relevance.

Protocol `perturbation/1`, after Chefer, Gur and Wolf 2021, "Generic Attention-model
Explainability". In the negative test the least relevant tokens go first, and a good explanation
keeps the model right for long; in the positive test the most relevant go first, and a good
explanation breaks it soon. Nothing here knows a model: what is measured is a function of the
tokens that are kept.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jaxrel.metrics.intervals import Intervals, bootstrap_many
from jaxrel.renamed import renamed

PROTOCOL = "perturbation/1"

# Shares of the removable tokens that are removed.
STEPS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)

# The order of the second axis of `sweep`, and of the first axis of what `summary` takes.
SIGNS = ("negative", "positive")

Steps = Sequence[int | float]
Relevance = Float[Array | np.ndarray, "batch tokens"]
# Shapes and dtype are told apart here so that a wrong one meets our own error.
Removable = Shaped[Array | np.ndarray, "examples positions"]
Measure = Callable[[Bool[Array, "batch tokens"]], Shaped[Array, "..."]]
MeasureOfIndices = Callable[[Int[Array, "batch kept"]], Shaped[Array, "..."]]


def keep_masks(
    relevance: Relevance, removable: Removable, *, positive: bool, steps: Steps = STEPS
) -> Bool[Array, "steps batch tokens"]:
    """The tokens that are kept at each step of the test.

    At step p an example with n removable tokens keeps int((1 - p) * n) of them: those with the
    highest score. The score is the relevance in the negative test and the negative of it in the
    positive test. Of equal scores the token with the lower index is kept first, in both tests.
    The counts are those of Python's float64, rounding included: int((1 - 0.8) * 5) is 0, since
    1 - 0.8 is a little less than 0.2.

    Args:
      relevance: finite relevance, float; that of tokens which are not removable is not used.
      removable: bool of the same shape; False for tokens that always stay (CLS, BOS, EOT) and
        for padding, which is kept as it is.
      positive: remove the most relevant tokens first, rather than the least.
      steps: shares of the removable tokens to remove, rising from 0 to 1 at most; static.

    Returns:
      True where a token is kept. Pure, and made for `jax.jit`.

    Raises:
      ValueError: the shapes differ, `removable` is not bool, `steps` do not rise or leave
        [0, 1], or the relevance of a removable token is not finite. Values cannot be looked at
        under `jax.jit`; there, masks of an example with NaN mean nothing.
    """
    _check_steps("keep_masks", steps)
    _check_tokens("keep_masks", relevance.shape, removable)
    _check_finite("keep_masks", relevance, removable)
    relevance, removable = jnp.asarray(relevance), jnp.asarray(removable)
    return _keep(-relevance if positive else relevance, removable, tuple(steps))


def sweep(
    measure: Measure,
    relevance: Float[Array | np.ndarray, "methods batch tokens"],
    removable: Removable,
    *,
    steps: Steps = STEPS,
    batch_size: int | None = None,
) -> Float[Array, "methods signs steps batch"]:
    """Measure a model at every step of both tests, for several methods.

    One program whatever the number of methods and steps: `jax.jit` the call, with the model's
    parameters among the arguments, and call it again for each batch. The masks of all steps are
    made first: a byte per method, test, step, example and token.

        @jax.jit
        def run(params, inputs, relevance, removable):
            return sweep(lambda keep: score(params, inputs, keep), relevance, removable)

    Args:
      measure: a JAX function from the kept tokens, bool `[batch, tokens]`, to one number (or
        bool) per example, `[batch]`.
      relevance: one map per method, of the same examples.
      removable: as in `keep_masks`.
      steps: as in `keep_masks`.
      batch_size: how many masks are measured at a time (vmapped); None for one after another,
        which needs the least memory.

    Returns:
      Values in float32 (float64 for float64 measures), the negative test first. An example's
      values are NaN for a method whose relevance is not finite where that could not be told in
      advance (under `jax.jit`); `summary` refuses them.

    Raises:
      ValueError: as `keep_masks`, or `measure` does not return one number per example.
    """
    _check_steps("sweep", steps)
    _check_tokens("sweep", relevance.shape[1:], removable)
    _check_finite("sweep", relevance, removable)
    relevance, removable = jnp.asarray(relevance), jnp.asarray(removable)
    _check_measure("sweep", measure, jax.ShapeDtypeStruct(removable.shape, jnp.bool_))
    keep = _keep_by_method(relevance, removable, steps)
    return _usable(_measured(measure, keep, steps, batch_size), relevance, removable)


def sweep_indices(
    measure: MeasureOfIndices,
    relevance: Float[Array | np.ndarray, "methods batch tokens"],
    removable: Shaped[np.ndarray, " tokens"],
    *,
    steps: Steps = STEPS,
) -> Float[Array, "methods signs steps batch *measured"]:
    """As `sweep`, for a model that leaves tokens out in the place of hiding them.

    What is left out costs nothing: at the protocol's steps two tokens of three are not there.
    The program has a part for each step, since each has a size of its own.

    Args:
      measure: a JAX function from the indices of the kept tokens, ascending, `[batch, kept]`, to
        one number (or bool) per example, `[batch]`, or one array, `[batch, ...]`, such as the
        ids of the words that the model writes.
      relevance: one map per method, of the same examples.
      removable: bool, the same for all examples, as when these are images; a NumPy array, since
        how many tokens are kept must be known when the program is made.
      steps: as in `keep_masks`.

    Returns:
      As `sweep`; an array's own axes are the last.

    Raises:
      ValueError: as `sweep`.
    """
    what = "sweep_indices"
    _check_steps(what, steps)
    shared = np.broadcast_to(removable, (relevance.shape[1], *removable.shape))
    _check_tokens(what, relevance.shape[1:], shared)
    _check_finite(what, relevance, shared)
    relevance = jnp.asarray(relevance)
    free = int(removable.sum())
    kept = removable.size - free + _counts(steps, free)[:, free]
    for count in kept:
        tokens = jax.ShapeDtypeStruct((len(shared), count), jnp.int32)
        _check_measure(what, measure, tokens, arrays=True)
    keep = _keep_by_method(relevance, jnp.asarray(shared), steps)
    found = []
    for step, count in enumerate(kept):
        masks = keep[:, :, step] if steps[step] not in (0, 1) else keep[:1, :1, step]
        # Stable: the tokens that are kept come first, in their own order.
        indices = jnp.argsort(~masks, axis=-1, stable=True)[..., :count]
        values = jax.lax.map(measure, indices.reshape(-1, *indices.shape[-2:]))
        values = values.reshape(*masks.shape[:2], *values.shape[1:])
        found.append(jnp.broadcast_to(values, (*keep.shape[:2], *values.shape[2:])))
    return _usable(jnp.stack(found, axis=2), relevance, jnp.asarray(shared))


def auc(
    values: Float[Array | np.ndarray, "*methods steps examples"], steps: Steps = STEPS
) -> Float[Array | np.ndarray, "*methods examples"]:
    """Area under each example's curve by the trapezoid rule, times 100.

    The x of a step is the share p itself and nothing is normalised, so a measure that is 1 at
    every step of the protocol has the area 100.

    Args:
      values: as `sweep` returns them; NumPy arrays give NumPy arrays.
      steps: the shares p, as in `keep_masks`.

    Raises:
      ValueError: `steps` are fewer than two, do not rise, leave [0, 1], or are not as many as
        those of `values`.
    """
    _check_curve("auc", steps, values.shape[-2])
    widths = np.diff(np.asarray(steps, np.float64))[:, None]
    return (widths * (values[..., 1:, :] + values[..., :-1, :])).sum(-2) * 50


def random_relevance(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The baseline that knows nothing: relevance uniform in [0, 1), a new draw per token."""
    return jax.random.uniform(key, shape)


def summary(
    values: Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    measure: str,
    steps: Steps = STEPS,
    baseline: str | None = "equal",
    cost: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Curves, areas and paired differences with bootstrap 95% intervals over examples.

    Values are used as they are: none is cut, left out or weighted. All methods meet the same
    resamples. Each interval holds for itself: nothing is corrected for how many are compared.

    Args:
      values: `[2, steps, examples]` per method (negative, positive), of the same examples in
        the same order; batches of `sweep` joined along the last axis.
      measure: what was measured, such as "accuracy".
      steps: the shares that `sweep` was given.
      baseline: the method that others are compared with; None to compare with none.
      cost: text per method for the table, such as "1 forward, 1 backward".
      seed: of the resampling.

    Returns:
      What JSON can hold: `protocol`, `measure`, `steps`, `examples`, `baseline`, `methods`. Per
      method, in the order given, and per test: `curve` (`mean`, `low`, `high`, a list over
      steps each), `auc` (`mean`, `low`, `high`) and, for all but the baseline, `difference` (of
      AUC on the same examples, less the baseline's); `cost` where one was given.

    Raises:
      ValueError: no methods, shapes that do not fit, values that are not finite, an unknown
        baseline, or a cost of a method that has no values.
    """
    arrays = {name: np.asarray(one, np.float64) for name, one in values.items()}
    _check_values(arrays, steps)
    _check_known("baseline", [] if baseline is None else [baseline], arrays)
    _check_known("cost", list(cost or {}), arrays)
    stacked = np.stack(list(arrays.values()))
    areas = np.asarray(auc(stacked, steps))
    curves, aucs = bootstrap_many(stacked, seed=seed), bootstrap_many(areas, seed=seed)
    result: dict[str, Any] = {
        "protocol": PROTOCOL,
        "measure": measure,
        "steps": [float(step) for step in steps],
        "examples": stacked.shape[-1],
        "baseline": baseline,
        "methods": {
            name: {
                sign: {"curve": _curve(curves, i, j), "auc": aucs.at(i, j)._asdict()}
                for j, sign in enumerate(SIGNS)
            }
            for i, name in enumerate(arrays)
        },
    }
    methods = result["methods"]
    if baseline is not None:
        differences = bootstrap_many(areas - areas[list(arrays).index(baseline)], seed=seed)
        for i, name in enumerate(arrays):
            for j, sign in enumerate(SIGNS):
                if name != baseline:
                    methods[name][sign]["difference"] = differences.at(i, j)._asdict()
    for name, text in (cost or {}).items():
        methods[name]["cost"] = text
    return result


@functools.partial(jax.jit, static_argnames="steps")
def _keep(
    score: Float[Array, "batch tokens"],
    removable: Bool[Array, "batch tokens"],
    steps: tuple[int | float, ...],
) -> Bool[Array, "steps batch tokens"]:
    """Keep the highest scores; ties go to the lower index, since the sort is stable."""
    order = jnp.argsort(jnp.where(removable, -score, jnp.inf), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)
    kept = jnp.asarray(_counts(steps, score.shape[-1]))[:, removable.sum(-1)]
    return ~removable | (place < kept[..., None])


def _keep_by_method(
    relevance: Float[Array, "methods batch tokens"],
    removable: Bool[Array, "batch tokens"],
    steps: Steps,
) -> Bool[Array, "methods signs steps batch tokens"]:
    signed = jnp.stack([relevance, -relevance], axis=1)
    return jax.vmap(jax.vmap(lambda score: _keep(score, removable, tuple(steps))))(signed)


def _usable(
    values: Shaped[Array, "methods signs steps batch *measured"],
    relevance: Float[Array, "methods batch tokens"],
    removable: Bool[Array, "batch tokens"],
) -> Float[Array, "methods signs steps batch *measured"]:
    """Values as floats, NaN where the relevance is not finite."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    usable = (jnp.isfinite(relevance) | ~removable).all(axis=-1)
    usable = jnp.expand_dims(usable[:, None, None], range(4, values.ndim))
    return jnp.where(usable, values, jnp.nan)


def _measured(
    measure: Measure,
    keep: Bool[Array, "methods signs steps batch tokens"],
    steps: Steps,
    batch_size: int | None,
) -> Shaped[Array, "methods signs steps batch"]:
    """Measure all masks; at p = 0 and 1 they are the same for all, and are measured once."""
    ends = np.asarray([i for i, p in enumerate(steps) if p in (0, 1)], int)
    between = np.asarray([i for i, p in enumerate(steps) if p not in (0, 1)], int)
    own = keep[:, :, between]
    flat = jnp.concatenate([own.reshape(-1, *keep.shape[-2:]), keep[0, 0, ends]])
    found = jax.lax.map(measure, flat, batch_size=batch_size)
    split = len(flat) - len(ends)
    values = jnp.zeros(keep.shape[:-1], found.dtype)
    values = values.at[:, :, between].set(found[:split].reshape(own.shape[:-1]))
    return values.at[:, :, ends].set(found[split:])


def _counts(steps: Steps, tokens: int) -> Int[np.ndarray, "steps {tokens}+1"]:
    """How many are kept of 0, 1, ... tokens: int((1 - p) * n) in float64, on the host."""
    shares = 1 - np.asarray(steps, np.float64)
    return (shares[:, None] * np.arange(tokens + 1)).astype(np.int32)


def _check_steps(what: str, steps: Steps) -> None:
    if not len(steps) or not (np.diff(steps) > 0).all() or not 0 <= steps[0] <= steps[-1] <= 1:
        raise ValueError(
            f"{what}: steps must rise within [0, 1], as {STEPS} do, got {tuple(steps)}"
        )


def _check_curve(what: str, steps: Steps, found: int) -> None:
    _check_steps(what, steps)
    if len(steps) < 2:
        raise ValueError(f"{what}: an area needs at least two steps, got {tuple(steps)}")
    if len(steps) != found:
        raise ValueError(
            f"{what}: values at {found} steps, but {len(steps)} steps; give the steps of the sweep"
        )


def _check_tokens(what: str, shape: tuple[int, ...], removable: Removable) -> None:
    if shape != removable.shape:
        raise ValueError(
            f"{what}: relevance of [batch, tokens] = {list(shape)} and removable of "
            f"{list(removable.shape)} differ; give both for the same tokens"
        )
    if removable.dtype != np.bool_:
        raise ValueError(
            f"{what}: removable must be bool, True where a token may go, got {removable.dtype}"
        )


def _check_measure(
    what: str, measure: Callable, tokens: jax.ShapeDtypeStruct, *, arrays: bool = False
) -> None:
    found = jax.eval_shape(measure, tokens)
    shape = getattr(found, "shape", None)
    if shape is None or (shape[:1] if arrays else shape) != tokens.shape[:1]:
        kind, more = ("number or array", ", ...") if arrays else ("number", "")
        raise ValueError(
            f"{what}: measure must return one {kind} per example, [{tokens.shape[0]}{more}], got "
            f"{type(found).__name__ if shape is None else shape}"
        )


def _check_finite(
    what: str, relevance: Float[Array | np.ndarray, "*methods batch tokens"], removable: Removable
) -> None:
    if isinstance(relevance, jax.core.Tracer) or isinstance(removable, jax.core.Tracer):
        return
    bad = np.asarray(~np.isfinite(relevance) & np.asarray(removable)).any(-1)
    if bad.any():
        raise ValueError(
            f"{what}: relevance is not finite in {bad.sum()} of {bad.size} maps, first at index "
            f"{tuple(np.argwhere(bad)[0].tolist())}; a token without a number has no place in "
            "the order"
        )


def _check_values(values: Mapping[str, np.ndarray], steps: Steps) -> None:
    if not values:
        raise ValueError("summary: expected values per method, got no methods")
    first = next(iter(values.values()))
    for name, one in values.items():
        if one.ndim != 3 or len(one) != len(SIGNS) or one.shape != first.shape:
            shapes = {name: list(one.shape) for name, one in values.items()}
            raise ValueError(
                "summary: expected values [2 (negative, positive), steps, examples] alike for "
                f"all methods, got {shapes}"
            )
        if not (finite := np.isfinite(one).all((0, 1))).all():
            raise ValueError(
                f"summary: values of {name!r} are not finite for {(~finite).sum()} of "
                f"{finite.size} examples, first at example {int(np.argmin(finite))}; the measure "
                "or the relevance gave NaN or infinity"
            )
    _check_curve("summary", steps, first.shape[1])


def _check_known(what: str, names: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
    for name in names:
        if name not in values:
            raise ValueError(
                f"summary: {what} {name!r} is not among the methods {', '.join(values)}"
            )


def _curve(curves: Intervals, method: int, sign: int) -> dict[str, list[float]]:
    return {name: part[method, sign].tolist() for name, part in curves._asdict().items()}


__getattr__ = renamed(__name__, {"markdown": "jaxrel.train.evaluate.perturbation.markdown"})
