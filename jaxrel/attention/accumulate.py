"""Relevance accumulated over the self-attention layers of one stream, equally or weighted."""

import functools
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.importance import Measure, layer_weights, measure
from jaxrel.attention.maps import (
    FloatArray,
    Selection,
    TargetToken,
    indices,
    matmul,
    prepare,
    relevance_dtype,
    require_finite,
    take,
    token_index,
)
from jaxrel.tracing.sharding import shaped_like, zeros


def head_mean(attn: FloatArray, grad: FloatArray) -> Float[Array, "*batch query key"]:
    """Mean over the heads of `max(grad * attn, 0)`: Chefer, Gur and Wolf 2021, eq. 5.

    Args:
      attn: attention maps, `[..., heads, query, key]`; or the LRP relevance of the maps,
        which gives the variants "with LRP".
      grad: gradient of the explained scalar with respect to the maps.

    Returns:
      `[..., query, key]`, 0 or more, in float32 (float64 for float64 maps).
    """
    dtype = relevance_dtype(attn, grad)
    product = jnp.maximum(grad.astype(dtype) * attn.astype(dtype), 0)
    # A sum written out fuses with the product; XLA's reduction on a CPU first stores all maps.
    heads = [product[..., head, :, :] for head in range(product.shape[-3])]
    return functools.reduce(jnp.add, heads) / len(heads)


def identity(attn: FloatArray, dtype: Any) -> Float[Array, "batch tokens tokens"]:
    """Every token relevant for itself alone: where accumulation over stacked maps starts."""
    batch, tokens = attn.shape[1], attn.shape[-1]
    like = shaped_like(attn, (1, None, None), shape=(batch, tokens, tokens), dtype=dtype)
    return zeros(like) + jnp.eye(tokens, dtype=dtype)


def equal(
    attn: FloatArray, grad: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """Equal accumulation: `R = I`, then `R = R + A R` for every layer.

    Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", eq. 5 and 6; `A` is
    `head_mean`. With the LRP relevance of the maps in place of `attn` this is Transformer
    attribution (Chefer, Gur and Wolf, CVPR 2021).

    Args:
      attn: softmax outputs before they multiply the values, without dropout,
        `[layers, batch, heads, query, key]`.
      grad: gradient of the explained scalar with respect to them. For a batch, of the sum
        of the examples' scalars.
      layers: a slice or a sequence of layer indices, negative ones from the end; None for
        all. `slice(-1, None)` is the last layer only. It names a set: order and repetition
        do not matter.
      heads: the same for the heads, which are averaged.

    Returns:
      `R[b, i, j]`: the relevance of token j for token i, in float32 (float64 for float64
      maps). See `row`.

    Raises:
      ValueError: the shapes are not as above, a layer or a head does not exist, or a value
        is NaN or infinite (named with its layer; not seen under `jax.jit`).
      TypeError: `layers` or `heads` is neither None, a slice nor a sequence.
    """
    return _equal(*prepare("equal", {"attn": attn, "grad": grad}, layers=layers, heads=heads))


@jax.jit
def _equal(attn, grad):
    def layer(relevance, maps):
        return relevance + matmul(head_mean(*maps), relevance), None

    start = identity(attn, relevance_dtype(attn, grad))
    return jax.lax.scan(layer, start, (attn, grad))[0]


def weighted(
    attn: FloatArray,
    grad: FloatArray,
    *,
    before: FloatArray,
    after: FloatArray,
    value_grad: FloatArray,
    importance: str | Measure = "grad_value",
    layers: Selection = None,
    heads: Selection = None,
) -> Float[Array, "batch query key"]:
    """Weighted accumulation: `R = I`, then `R = alpha R + beta A R` for every layer.

    Our reading of Huang, Jia, Zhang and Zhang 2023, "Generic Attention-model Explainability
    by Weighted Relevance Accumulation": the relevance carried by the residual branch and the
    relevance moved by attention are weighted, per query token, by the importance of the
    token values of the two branches (`importance.weights`). `alpha = beta = 1` is equal
    accumulation.

    Args:
      attn: attention maps, as in `equal`.
      grad: their gradient, as in `equal`.
      before: the residual stream before each layer's attention is added,
        `[layers, batch, tokens, width]`.
      after: the attention output that is added to it.
      value_grad: gradient of the explained scalar with respect to the sum of the two.
      importance: "grad_value", "norm", "abs_grad_value", or a function
        `(value, grad) -> importance`, `[..., tokens, width]` to `[..., tokens]`, 0 or more.
      layers: as in `equal`.
      heads: as in `equal`.

    Returns:
      `R[b, i, j]`, as in `equal`.

    Raises:
      ValueError: as in `equal`; also when no measure has that name, or a measure does not
        return one number per token.
      TypeError: as in `equal`.
    """
    maps = prepare("weighted", {"attn": attn, "grad": grad}, layers=layers, heads=heads)
    values = prepare_values("weighted", np.shape(attn), before, after, value_grad, layers=layers)
    return _weighted(maps, values, measure(importance))


@functools.partial(jax.jit, static_argnums=2)
def _weighted(maps, values, importance):
    dtype = relevance_dtype(*maps, *values)

    def layer(relevance, inputs):
        maps, (before, after, value_grad) = inputs
        alpha, beta = layer_weights(before, after, value_grad, importance)
        moved = matmul(head_mean(*maps).astype(dtype), relevance)
        alpha, beta = alpha.astype(dtype)[..., None], beta.astype(dtype)[..., None]
        return alpha * relevance + beta * moved, None

    start = identity(maps[0], dtype)
    return jax.lax.scan(layer, start, (maps, values))[0]


def row(
    relevance: Float[Array, "batch query key"] | Float[np.ndarray, "batch query key"],
    target_token: TargetToken,
) -> Float[Array, "batch key"]:
    """The relevance of every token for the target token.

    Args:
      relevance: a full relevance map.
      target_token: the target token: 0 for a leading class token, the index of the end token
        for a CLIP text, the predicting position for a causal captioner. One index for all
        examples, or one each; negative ones count from the end. Where the scalar is the mean of
        what is read from several tokens, their weights, float [batch, query].

    Returns:
      One row per example, the target token's own entry included.

    Raises:
      ValueError: the index does not exist, or the weights are not one per token. Under `jax.jit`
        an index is not known, and one that does not exist gives a row of NaN.
      TypeError: the indices are not integers.
    """
    batch, tokens, _ = relevance.shape
    if getattr(target_token, "ndim", 0) == 2:
        weights: Any = jnp.asarray(target_token)
        if weights.shape != (batch, tokens) or not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ValueError(
                f"row: weights of target token tokens must be float [{batch}, {tokens}], got "
                f"{weights.dtype} {list(weights.shape)}"
            )
        # A product over a batch wants both sharded alike.
        like = shaped_like(relevance, (0, None), shape=(batch, tokens), dtype=relevance.dtype)
        weights = weights.astype(relevance.dtype) + zeros(like)
        return matmul(weights[:, None], jnp.asarray(relevance))[:, 0]
    index = token_index(target_token, batch=batch, tokens=tokens)
    return jnp.take_along_axis(
        jnp.asarray(relevance), index[:, None, None], axis=1, mode="fill", fill_value=jnp.nan
    )[:, 0]


def prepare_values(
    where: str,
    maps_shape: tuple[int, ...],
    before: Any,
    after: Any,
    value_grad: Any,
    *,
    layers: Selection = None,
) -> tuple[Array, ...]:
    """The token values of the attention layers, checked, for the asked layers only.

    Args:
      where: the function to name in an error.
      maps_shape: shape of the attention maps, `[layers, batch, heads, query, key]`.
      before: as in `weighted`.
      after: as in `weighted`.
      value_grad: as in `weighted`.
      layers: the layers to keep; None for all.

    Returns:
      `before`, `after`, `value_grad`.

    Raises:
      ValueError: a shape does not fit the maps, or a value is not finite.
    """
    values = {"before": before, "after": after, "value_grad": value_grad}
    shapes = {name: np.shape(x) for name, x in values.items()}
    count, batch, _, tokens, _ = maps_shape
    fits = all(len(s) == 4 and s[:3] == (count, batch, tokens) for s in shapes.values())
    if not fits or len(set(shapes.values())) > 1:
        raise ValueError(
            f"{where}: expected values [layers, batch, tokens, width] of one shape "
            f"({count}, {batch}, {tokens}, width), got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    chosen = indices(layers, count, "layers")
    for name, x in values.items():
        require_finite(f"{where}: {name}", x, layers=layers)
    return tuple(take(jnp.asarray(x), chosen, 0) for x in values.values())
