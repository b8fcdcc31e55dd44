"""Relevance that rides in the backward pass.

The row of accumulated relevance of one target token can be computed by walking the layers
backward, as gradients do. So the row travels as the cotangent of an extra value, the carrier,
that a model threads through its layers; no map and no gradient of a map outlives its layer. In
each layer, in the order of the forward pass:

    carrier, attn = accumulate(carrier, attn)             # at the softmax output
    carrier, after = weigh(carrier, before, after)        # weighted accumulation only
    x = before + after

Both are the identity forward. Backward they make `r <- alpha r + (beta r) A`.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrel.attention.importance import Measure, layer_weights
from jaxrel.attention.maps import TargetToken, head_mean, matmul, token_index
from jaxrel.attention.reweighing import open_entries
from jaxrel.tracing import sharding
from jaxrel.tracing.evaluate import kept
from jaxrel.tracing.sharding import shaped_like


class Carrier(NamedTuple):
    """A value, always 0, whose cotangent is relevance `[batch, tokens]`.

    The cotangent has two parts, for the two branches that meet at the residual sum: `keep`
    is carried past the attention, `move` goes through it. They are equal except between
    `weigh` and `accumulate`.
    """

    keep: Float[Array, "batch tokens"]
    move: Float[Array, "batch tokens"]


def zeros(batch: int, tokens: int, dtype: Any = jnp.float32, *, like: Any = None) -> Carrier:
    """The carrier that enters the first layer.

    Args:
      batch: how many examples.
      tokens: how many tokens.
      dtype: the dtype relevance is accumulated in.
      like: an array, or its type, whose first axis is the batch: the carrier is sharded as that.
        Needed for a batch that is sharded over an explicit mesh.

    Returns:
      The carrier.
    """
    if like is None:
        row = jnp.zeros((batch, tokens), dtype)
    else:
        row = sharding.zeros(shaped_like(like, (0, None), shape=(batch, tokens), dtype=dtype))
    return Carrier(row, row)


def seed(
    target_token: TargetToken,
    *,
    batch: int,
    tokens: int,
    dtype: Any = jnp.float32,
    like: Any = None,
) -> Carrier:
    """The cotangent of the carrier that leaves the last layer: the target token alone.

    Args:
      target_token: the target token, one index or one per example; negative ones count from
        the end.
      batch: how many examples.
      tokens: how many tokens.
      dtype: the dtype relevance is accumulated in.
      like: as in `zeros`.

    Returns:
      The cotangent.

    Raises:
      ValueError: the index does not exist (not seen under `jax.jit`).
      TypeError: the index is not an integer.
    """
    index = token_index(target_token, batch=batch, tokens=tokens)
    row = jax.nn.one_hot(index, tokens, dtype=dtype)
    # The sum has the sharding of the carrier.
    row = row if like is None else row + zeros(batch, tokens, dtype, like=like).keep
    return Carrier(row, row)


def accumulate(
    carrier: Carrier,
    attn: Float[Array, "batch heads query key"],
    sinks: Bool[Array, "examples tokens"] | None = None,
) -> tuple[Carrier, Float[Array, "batch heads query key"]]:
    """Mark an attention map: backward, relevance moves through it.

    Forward nothing changes. Backward the carrier's cotangent becomes `keep + move A`, with
    `A` the mean over the heads of `max(attn * cotangent of attn, 0)`: the row form of
    equal accumulation (Chefer, Gur and Wolf 2021, eq. 5 and 6). The cotangent of the map
    passes unchanged.

    Args:
      carrier: the carrier.
      attn: the softmax output, before it multiplies the values.
      sinks: the tokens whose columns relevance does not move through, but for their own entries;
        of all examples `[1, tokens]`, or of each `[batch, tokens]`. None for none.

    Returns:
      The carrier and the map, to be used in place of those given.

    Raises:
      ValueError: the map is not square, or does not fit the carrier.
    """
    batch, _, query, key = attn.shape
    if query != key or carrier.keep.shape != (batch, key):
        raise ValueError(
            f"accumulate: expected a map (batch, heads, tokens, tokens) and a carrier "
            f"(batch, tokens), got map {attn.shape} and carrier {carrier.keep.shape}"
        )
    return _accumulate(carrier, attn, sinks)


@jax.custom_vjp
def _accumulate(carrier, attn, sinks):
    return carrier, attn


def _accumulate_forward(carrier, attn, sinks):
    return (carrier, attn), (attn, sinks)


def _accumulate_backward(kept, cotangents):
    (attn, sinks), (relevance, attn_grad) = kept, cotangents
    abar = head_mean(attn, attn_grad).astype(relevance.move.dtype)
    if sinks is not None:
        abar = jnp.where(open_entries(sinks), abar, 0)
    new = relevance.keep + matmul(relevance.move[:, None], abar)[:, 0]
    return Carrier(new, new), attn_grad, None


_accumulate.defvjp(_accumulate_forward, _accumulate_backward)


@jax.custom_vjp
def joined(carrier: Carrier) -> Float[Array, "batch tokens"]:
    """One value for both parts: what relevance it gets backward, both get."""
    return carrier.keep


joined.defvjp(
    lambda carrier: (carrier.keep, None), lambda _, relevance: (Carrier(relevance, relevance),)
)


@jax.custom_vjp
def accumulate_rows(
    row: Float[Array, "batch tokens"], attn: Float[Array, "batch heads rows tokens"]
) -> tuple[Float[Array, "batch rows"], Float[Array, "batch heads rows tokens"]]:
    """`accumulate` for some of a map's rows.

    Args:
      row: the carrier of all tokens (`joined`).
      attn: these rows of the softmax output.

    Returns:
      The part of `Carrier.move` that goes through these rows, and the rows. Backward the relevance
      of that part moves through them to all tokens.
    """
    return row[:, : attn.shape[2]], attn


def _rows_forward(row, attn):
    return accumulate_rows(row, attn), attn


def _rows_backward(attn, cotangents):
    move, attn_grad = cotangents
    abar = head_mean(attn, attn_grad).astype(move.dtype)
    return matmul(move[:, None], abar)[:, 0], attn_grad


accumulate_rows.defvjp(_rows_forward, _rows_backward)


def weigh(
    carrier: Carrier,
    before: Float[Array, "batch tokens width"],
    after: Float[Array, "batch tokens width"],
    importance: str | Measure = "grad_value",
) -> tuple[Carrier, Float[Array, "batch tokens width"]]:
    """Mark what attention adds to the residual stream: backward, relevance is weighed there.

    Forward nothing changes. Backward the relevance splits into `alpha r`, carried over, and
    `beta r`, moved by the attention (`importance.weights`): the row form of `weighted`. The
    gradient at the residual sum is the cotangent of `after`, so `after` must go into that
    sum and nowhere else. Where that is not so, mark the sum: `weigh_sum`.

    Args:
      carrier: the carrier.
      before: the residual stream.
      after: the attention output that is about to be added to it.
      importance: the measure's name, or a function `(value, grad) -> importance`.

    Returns:
      The carrier and `after`, to be used in place of those given.

    Raises:
      ValueError: the shapes do not fit each other, or no measure has that name.
    """
    return weigh_sum(carrier, after, before, after, importance)


def weigh_sum(
    carrier: Carrier,
    total: Float[Array, "batch tokens width"],
    before: Float[Array, "batch tokens width"],
    after: Float[Array, "batch tokens width"],
    importance: str | Measure = "grad_value",
) -> tuple[Carrier, Float[Array, "batch tokens width"]]:
    """Like `weigh`, but marks the residual sum `total` itself; the other two are only read.

    Returns:
      The carrier and the sum, to be used in place of those given.
    """
    if before.shape != after.shape or before.shape[:2] != carrier.keep.shape:
        raise ValueError(
            f"weigh: expected values (batch, tokens, width) of one shape and a carrier "
            f"(batch, tokens), got before {before.shape}, after {after.shape} and carrier "
            f"{carrier.keep.shape}"
        )
    return _weigh(carrier, total, before, after, importance)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weigh(carrier, total, before, after, importance):
    return carrier, kept(total)


def _weigh_forward(carrier, total, before, after, importance):
    return (carrier, kept(total)), (before, after)


def _weigh_backward(importance, values, cotangents):
    (before, after), (relevance, grad) = values, cotangents
    grad = kept(grad)
    alpha, beta = layer_weights(before, after, grad, importance)
    dtype = relevance.keep.dtype
    weighed = Carrier(alpha.astype(dtype) * relevance.keep, beta.astype(dtype) * relevance.move)
    return weighed, grad, jnp.zeros_like(before), jnp.zeros_like(after)


_weigh.defvjp(_weigh_forward, _weigh_backward)
