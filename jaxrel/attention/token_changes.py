"""TokenTM: attention weighted by how layers change the tokens that it mixes."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.maps import (
    FloatArray,
    Selection,
    matmul,
    prepare,
    prepare_values,
    relevance_dtype,
)


def token_tm(
    attn: FloatArray,
    grad: FloatArray,
    *,
    before: FloatArray,
    after: FloatArray,
    following: FloatArray | None = None,
    layers: Selection = None,
    heads: Selection = None,
) -> Float[Array, "batch query key"]:
    """TokenTM: `C = diag(|x_1|)`, then `C = (I + W') (I + (A W) * G) C` for every layer.

    Wu, Duan, Kang, Tang and Yan, CVPR 2024, "Token Transformation Matters". We had no copy of the
    paper's equations, and take them as Mehri, Baghshah and Pilehvar (LibraGrad, CVPR 2025) compute
    them to compare with. `A` is the mean over the heads of the maps, `G` that of the positive part
    of their gradient, and `W` and `W'` are diagonal: how the layer's attention, and its MLP, change
    each token, `token_change`. The last layer's MLP multiplies each row by one number, which
    compares no tokens, and is left out.

    Args:
      attn: attention maps, as in `equal`.
      grad: their gradient, as in `equal`.
      before: the residual stream before each layer's attention is added,
        `[layers, batch, tokens, width]`.
      after: the attention output that is added to it.
      following: the residual stream after each layer's MLP; by default the stream before the next
        layer's attention. Where it is zeros the MLP is left out.
      layers: as in `equal`; the lengths that relevance begins with are those before the first.
      heads: as in `equal`.

    Returns:
      `C[b, i, j]`, the relevance of token j for token i, 0 or more, in float32 (float64 for
      float64 maps).

    Raises:
      ValueError: as in `weighted`.
      TypeError: as in `equal`.
    """
    maps = prepare("token_tm", {"attn": attn, "grad": grad}, layers=layers, heads=heads)
    if following is None:
        following = followed_by(before)
    given = {"before": before, "after": after, "following": following}
    values = prepare_values("token_tm", attn.shape, given, layers=layers)
    return _accumulated(*maps, *values)


def followed_by(
    before: FloatArray,
) -> Float[Array, "layers batch tokens width"]:
    """What `before` is in the next layer; zeros after the last."""
    before = jnp.asarray(before)
    return jnp.concatenate([before[1:], jnp.zeros_like(before[:1])])


def token_change(
    before: Float[Array, "*batch tokens width"], after: Float[Array, "*batch tokens width"]
) -> Float[Array, "*batch tokens"]:
    """How much a transformation changes each token, in length and in direction.

    The ratio of the lengths after and before, times the share of `exp(cosine)` of the two in the
    sum over the tokens.

    Args:
      before: the tokens before the transformation.
      after: the same tokens after it.

    Returns:
      A number for each token, 0 or more; 0 where a length is 0.
    """
    of_before, of_after = (_length(x) for x in (before, after))
    nothing = of_before * of_after == 0
    product = jnp.where(nothing, 1, of_before * of_after)
    cosine = jnp.where(nothing, 0, (before * after).sum(-1) / product)
    ratio = jnp.where(nothing, 0, of_after / jnp.where(of_before == 0, 1, of_before))
    return ratio * jax.nn.softmax(cosine, axis=-1)


@jax.jit
def _accumulated(
    attn: Array, grad: Array, before: Array, after: Array, following: Array
) -> Float[Array, "batch query key"]:
    dtype = relevance_dtype(attn, grad, before, after)
    lengths = _length(before.astype(dtype))
    # Layers that do not count are zeros, and come first.
    first = jnp.argmax((lengths > 0).any(axis=(1, 2)))
    start = lengths[first][:, :, None] * jnp.eye(lengths.shape[-1], dtype=dtype)

    def layer(relevance, values):
        attn, grad, before, after, following = (x.astype(dtype) for x in values)
        total = before + after
        # A head that does not count has a map of zeros.
        counts = (attn != 0).any(axis=(-2, -1), keepdims=True)
        heads = jnp.maximum(counts.sum(axis=1), 1)
        positive = jnp.where(counts, jnp.maximum(grad, 0), 0).sum(axis=1) / heads
        moved = attn.mean(axis=1) * token_change(before, total)[:, None] * positive
        relevance = relevance + matmul(moved, relevance)
        return relevance * (1 + token_change(total, following))[..., None], None

    return jax.lax.scan(layer, start, (attn, grad, before, after, following))[0]


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.square(x).sum(axis=-1))
