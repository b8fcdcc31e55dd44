"""How important a token's value is: the measures that weighted accumulation weighs by.

A measure is a plain function `(value, grad) -> importance`: token values and the gradients of
the explained scalar with respect to them, `[..., tokens, width]`, in; one importance per token,
`[..., tokens]`, 0 or more, out.
"""

from collections.abc import Callable

from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.maps import FloatArray, relevance_dtype

Measure = Callable[[Array, Array], Array]


def grad_value(
    value: Float[Array, "*tokens width"], grad: Float[Array, "*tokens width"]
) -> Float[Array, "*tokens"]:
    """Sum over the width of `max(grad * value, 0)`.

    The analogue, for values, of Chefer, Gur and Wolf 2021, eq. 5.
    """
    return jnp.maximum(grad * value, 0).sum(axis=-1)


def norm(
    value: Float[Array, "*tokens width"], grad: Float[Array, "*tokens width"]
) -> Float[Array, "*tokens"]:
    """Euclidean norm of the value (Kobayashi et al. 2020); the gradient is not used."""
    return jnp.sqrt(jnp.square(value).sum(axis=-1))


def abs_grad_value(
    value: Float[Array, "*tokens width"], grad: Float[Array, "*tokens width"]
) -> Float[Array, "*tokens"]:
    """Magnitude of the sum over the width of `grad * value`, a token's first-order effect."""
    return jnp.abs((grad * value).sum(axis=-1))


MEASURES: dict[str, Measure] = {m.__name__: m for m in (grad_value, norm, abs_grad_value)}


def measure(importance: str | Measure) -> Measure:
    """The measure of that name; a function is passed through.

    Args:
      importance: "grad_value", "norm", "abs_grad_value", or a function
        `(value, grad) -> importance`.

    Returns:
      The function.

    Raises:
      ValueError: no measure has that name.
    """
    if callable(importance):
        return importance
    if importance not in MEASURES:
        raise ValueError(
            f"importance: {importance!r} is unknown; expected one of {', '.join(MEASURES)}, "
            "or a function (value, grad) -> importance per token"
        )
    return MEASURES[importance]


def weights(
    before: Float[Array, "*tokens"], after: Float[Array, "*tokens"]
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Weights of the two branches that meet at a residual sum, from their importances.

    `alpha = 2 u / (u + v)` and `beta = 2 v / (u + v)` for importances `u` before and `v`
    after the attention. Their sum is 2, so that relevance keeps its scale; where both
    importances are 0 both weights are 1, as in equal accumulation. This is our reading of
    Huang, Jia, Zhang and Zhang 2023: their premise is that the token values of the two
    branches are not equally important.

    Args:
      before: importance of the residual stream, 0 or more.
      after: importance of what attention adds to it, 0 or more.

    Returns:
      `alpha` for the relevance carried over and `beta` for the relevance moved.
    """
    total = before + after
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    return jnp.where(nothing, 1, 2 * before / total), jnp.where(nothing, 1, 2 * after / total)


def layer_weights(
    before: FloatArray, after: FloatArray, value_grad: FloatArray, importance: str | Measure
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """`weights` of one layer, from its values and their gradient.

    Args:
      before: the residual stream before attention is added, `[batch, tokens, width]`.
      after: the attention output that is added to it, of the same shape.
      value_grad: gradient of the explained scalar with respect to the sum of the two.
      importance: the measure's name, or a function `(value, grad) -> importance`.

    Returns:
      `alpha` and `beta`, `[batch, tokens]`, in float32 (float64 for float64 values).

    Raises:
      ValueError: the three shapes differ, no measure has that name, or the measure does
        not return one number per token.
    """
    if not before.shape == after.shape == value_grad.shape:
        raise ValueError(
            "importance: expected values and gradient of one shape, got "
            f"before {before.shape}, after {after.shape}, value_grad {value_grad.shape}"
        )
    dtype = relevance_dtype(before, after, value_grad)
    grad = jnp.asarray(value_grad, dtype)
    function = measure(importance)
    of_before, of_after = (function(jnp.asarray(x, dtype), grad) for x in (before, after))
    if of_before.shape != before.shape[:-1]:
        raise ValueError(
            f"importance: expected one number per token, {before.shape[:-1]}, from the measure "
            f"{function!r} for values {before.shape}, got {of_before.shape}"
        )
    return weights(of_before, of_after)
