"""Contrastive explanations: what speaks for one class and against another, or the others.

A contrast is a scalar like any other, so that every method explains it. Of methods that are linear
in the gradient, such as input x gradient, the relevance for a class against another is the
difference of the two; of others, which clip or multiply, it is not.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

Classes = Any


def contrast(
    logits: Float[Array | np.ndarray, "*batch classes"], target: Classes, against: Classes = None
) -> Float[Array, "*batch"]:
    """The logit of a class less that of another, or less the log of the sum of the others'.

    `logit_t - log(sum_j exp(logit_j))` over the classes j it is contrasted with: of one class its
    logit, of all others the logarithm of the odds of `t` (its probability is the sigmoid). Its
    derivative is exact, and LRP gives each of the others its logit times its share in the sum; the
    logarithm's remaining constant, the entropy of the shares, carries no relevance.

    Args:
      logits: the classes along the last axis.
      target: the class, an index, or one for each example.
      against: the class it is contrasted with, an index or one for each example; or a bool array
        `[..., classes]` of several. All others, by default.

    Returns:
      The contrast of each example.

    Raises:
      ValueError: a class does not exist, or is contrasted with itself (not seen under `jax.jit`).
      TypeError: a class is no index.
    """
    logits = jnp.asarray(logits)
    count = logits.shape[-1]
    chosen = _class(target, logits, "target")
    mask = others(chosen, count, against)
    shares = jax.nn.softmax(jnp.where(mask, jax.lax.stop_gradient(logits), -jnp.inf), axis=-1)
    shares = jax.lax.stop_gradient(shares)
    entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1))).sum(axis=-1)
    own = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    return own - (shares * logits).sum(axis=-1) - entropy


def others(target: Any, classes: int, against: Classes = None) -> Bool[Array, "*batch classes"]:
    """Which classes a target is contrasted with; arguments and errors as of `contrast`."""
    known = jnp.arange(classes)
    own = known == jnp.asarray(target)[..., None]
    if against is None:
        if classes < 2:
            raise ValueError("contrast: there is one class, and no other to contrast it with")
        return ~own
    if isinstance(against, jax.Array | np.ndarray) and against.dtype == bool:
        mask = jnp.broadcast_to(jnp.asarray(against), own.shape)
    else:
        mask = known == _index(against, classes, "against")[..., None]
        mask = jnp.broadcast_to(mask, own.shape)
    if not isinstance(mask & own, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            itself, none = np.asarray((mask & own).any()), np.asarray((~mask.any(-1)).any())
        if itself or none:
            raise ValueError(
                "contrast: a class is contrasted with "
                + ("itself; leave the target out of against=" if itself else "no other")
            )
    return mask


def contrastive(fun: Callable, target: Classes, against: Classes = None) -> Callable:
    """Make a function of logits return the contrast of a class, for any method to explain.

        attention.relevance(contrastive(model, 3, against=5))(x)

    Args:
      fun: a JAX function that returns logits `[..., classes]`.
      target, against: as in `contrast`.

    Returns:
      A function of the same arguments that returns `[...]`; errors as of `contrast`.
    """

    def contrasted(*args: Any, **kwargs: Any) -> Any:
        return contrast(fun(*args, **kwargs), target, against)

    return contrasted


def _class(target: Any, logits: Array, what: str) -> Array:
    return jnp.broadcast_to(_index(target, logits.shape[-1], what), logits.shape[:-1])


def _index(chosen: Any, classes: int, what: str) -> Array:
    given = chosen if isinstance(chosen, jax.core.Tracer) else np.asarray(chosen)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"contrast: {what} is the index of a class, got {chosen!r:.80}")
    index = jnp.asarray(chosen)
    if not isinstance(given, jax.core.Tracer):
        wrong = given[(given < -classes) | (given >= classes)]
        if wrong.size:
            raise ValueError(
                f"contrast: {what} {wrong.flat[0]} does not exist; there are {classes} classes, 0 "
                f"to {classes - 1} (or -{classes} to -1 from the end)"
            )
    return jnp.where(index < 0, index + classes, index)
