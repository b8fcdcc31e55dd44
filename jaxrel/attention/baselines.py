"""The baselines: raw attention, rollout, attention Grad-CAM, and gradient times attention.

Chefer, Gur and Wolf 2021 and Huang, Jia, Zhang and Zhang 2023 compare accumulation with these.
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.maps import (
    FloatArray,
    Selection,
    head_mean,
    matmul,
    prepare,
    relevance_dtype,
)
from jaxrel.tracing.sharding import shaped_like, zeros


def raw(
    attn: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """Raw attention: the last layer's map, the mean over its heads.

    Args:
      attn: attention maps `[layers, batch, heads, query, key]`, also between two streams.
      layers: as in `equal`; the last of them is read.
      heads: the heads to average; None for all.

    Returns:
      The map, in float32 (float64 for float64 maps).

    Raises:
      ValueError: as in `equal`.
      TypeError: as in `equal`.
    """
    (attn,) = prepare("raw", {"attn": attn}, layers=layers, heads=heads, square=False)
    return attn[-1].astype(relevance_dtype(attn)).mean(axis=1)


def rollout(
    attn: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """Attention rollout: the product over the layers of `A + I` with rows that sum to 1.

    Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers"; `A` is the mean
    over the heads. It uses no gradient, so it is the same for every target.

    Args:
      attn: attention maps `[layers, batch, heads, query, key]`.
      layers: as in `equal`.
      heads: as in `equal`.

    Returns:
      The product, the last layer leftmost, in float32 (float64 for float64 maps).

    Raises:
      ValueError: as in `equal`.
      TypeError: as in `equal`.
    """
    return _product(_mixed, *prepare("rollout", {"attn": attn}, layers=layers, heads=heads))


def _mixed(attn: Array) -> Float[Array, "batch query key"]:
    """The mean over the heads plus the identity, each row as shares of its sum."""
    mean = attn.astype(relevance_dtype(attn)).mean(axis=1)
    mixed = mean + jnp.eye(mean.shape[-1], dtype=mean.dtype)
    return mixed / mixed.sum(axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _product(matrix: Callable, *maps: Array) -> Float[Array, "batch query key"]:
    """The product over the layers of `matrix(*maps of a layer)`, the last layer leftmost."""
    batch, tokens, dtype = maps[0].shape[1], maps[0].shape[-1], relevance_dtype(*maps)
    like = shaped_like(maps[0], (1, None, None), shape=(batch, tokens, tokens), dtype=dtype)

    def layer(product, maps):
        return matmul(matrix(*maps), product), None

    start = zeros(like) + jnp.eye(tokens, dtype=dtype)
    return jax.lax.scan(layer, start, maps)[0]


def grad_cam(
    attn: FloatArray, grad: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """Grad-CAM of the last attention layer: its maps, each head weighted by its mean gradient.

    `max(mean over heads of (mean(grad) * attn), 0)`: Selvaraju et al. 2017, in the form that
    Chefer, Gur and Wolf 2021 compare with (their code clips the mean over the heads, not each
    head).

    Args:
      attn: attention maps `[layers, batch, heads, query, key]`, also between two streams.
      grad: gradient of the explained scalar with respect to them.
      layers: as in `equal`; the last of them is read.
      heads: the heads to average; None for all.

    Returns:
      The map, 0 or more, in float32 (float64 for float64 maps).

    Raises:
      ValueError: as in `equal`.
      TypeError: as in `equal`.
    """
    maps = {"attn": attn, "grad": grad}
    attn, grad = prepare("grad_cam", maps, layers=layers, heads=heads, square=False)
    dtype = relevance_dtype(attn, grad)
    weight = grad[-1].astype(dtype).mean(axis=(-2, -1), keepdims=True)
    return jnp.maximum((weight * attn[-1].astype(dtype)).mean(axis=1), 0)


def no_aggregation(
    attn: FloatArray, grad: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """Gradient times attention, rolled out: `R = I`, then `R = A R` for every layer.

    Equal accumulation without the part that the residual branch carries: the ablation of
    Chefer, Gur and Wolf 2021. `A` is `head_mean`.

    Args:
      attn: as in `equal`.
      grad: as in `equal`.
      layers: as in `equal`.
      heads: as in `equal`.

    Returns:
      The product, in float32 (float64 for float64 maps).

    Raises:
      ValueError: as in `equal`.
      TypeError: as in `equal`.
    """
    maps = {"attn": attn, "grad": grad}
    prepared = prepare("no_aggregation", maps, layers=layers, heads=heads)
    return _product(head_mean, *prepared)


def cross_rollout(
    s_self: FloatArray, cross: FloatArray, q_self: FloatArray
) -> Float[Array, "batch s q"]:
    """Rollout between two streams: `rollout(s)^T A rollout(q)`.

    `A` is the last cross-attention from s to q, the mean over its heads. This is the baseline
    of Chefer, Gur and Wolf 2021; the transpose is theirs.

    Args:
      s_self: self-attention maps of stream s, `[layers, batch, heads, s, s]`.
      cross: cross-attention maps, queries from s and keys from q,
        `[layers, batch, heads, s, q]`.
      q_self: self-attention maps of stream q, `[layers, batch, heads, q, q]`.

    Returns:
      The relevance of q's tokens for s's, in float32 (float64 for float64 maps).

    Raises:
      ValueError: the shapes are not as above.
    """
    between = raw(cross)
    of_s, of_q = rollout(s_self), rollout(q_self)
    if between.shape != (len(of_s), of_s.shape[-1], of_q.shape[-1]):
        raise ValueError(
            "cross_rollout: expected maps of one batch, with s queries and q keys in cross, "
            f"got s_self {s_self.shape}, cross {cross.shape}, q_self {q_self.shape}"
        )
    return matmul(of_s.mT, matmul(between, of_q))
