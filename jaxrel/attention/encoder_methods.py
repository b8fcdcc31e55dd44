"""Methods for encoders that tell more than their maps: LeGrad and Grad-ECLIP.

LeGrad needs a score of every layer's own tokens, Grad-ECLIP the queries, keys and values.
"""

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.maps import (
    FloatArray,
    Selection,
    indices,
    prepare,
    relevance_dtype,
    require_finite,
    take,
)

# What `grad_eclip` reads, by the end of its tag; of the last the gradient.
PROJECTIONS = ("query", "key", "value", "mixed")


def legrad(
    grad: FloatArray, *, layers: Selection = None, heads: Selection = None
) -> Float[Array, "batch query key"]:
    """LeGrad: where the score of each layer's own tokens is sensitive to its own attention.

    Bousselham, Boggust, Chaybouti, Strobelt and Kuehne, ICCV 2025, "LeGrad": the positive part of
    the gradient, averaged over queries, heads and layers. Theirs is scaled to 0 to 1 at the end,
    which this is not.

    Args:
      grad: `[layers, batch, heads, query, key]`: the gradient of each layer's score, which the
        model's head gives its mean token after that layer, with respect to its own map alone.
      layers: as in `equal`.
      heads: as in `equal`.

    Returns:
      `[batch, query, key]`: the relevance of token j, 0 or more, the same for every token i; in
      float32 (float64 for a float64 gradient).

    Raises:
      ValueError: as in `equal`.
      TypeError: as in `equal`.
    """
    (grad,) = prepare("legrad", {"grad": grad}, layers=layers, heads=heads)
    dtype = relevance_dtype(grad)
    by_key = jnp.maximum(grad.astype(dtype), 0).mean(axis=(0, 2, 3))
    # A sum with zeros of the map's shape is sharded as the map is.
    return jnp.zeros_like(grad[0, :, 0], dtype=dtype) + by_key[:, None]


def grad_eclip(
    attn: FloatArray,
    *,
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    mixed_grad: FloatArray,
    layers: Selection = None,
    heads: Selection = None,
) -> Float[Array, "batch query key"]:
    """Grad-ECLIP: `max(sum_c w_c v_jc, 0) * s_ij`, of the last layer.

    Zhao, Wang, Zeng, Zhao and Chan, ICML 2024, "Gradient-based Visual Explanation for
    Transformer-based CLIP". The channels' weights `w` are the gradient with respect to what token
    i takes from the attention, before the output projection. The loosened attention `s` is the
    cosine of i's query and j's key, scaled to 0 to 1 over the other tokens that i attends to (1
    where all are alike); the token itself has none. The authors' code runs the last layer with one
    head in its place; here the model stays as it is, and the channels of its heads are summed.

    Args:
      attn: attention maps `[layers, batch, heads, query, key]`; only where they are 0 is read.
      query: the queries, `[layers, batch, tokens, heads, features]`.
      key: the keys, of the same shape.
      value: the values, of the same shape.
      mixed_grad: the gradient with respect to the values as attention mixes them, of the same
        shape.
      layers: as in `equal`; the last of them is read.
      heads: the heads whose channels are summed; None for all.

    Returns:
      `[batch, query, key]`, 0 or more, in float32 (float64 for float64 maps).

    Raises:
      ValueError: a shape does not fit the maps, a layer or a head does not exist, or a value is NaN
        or infinite (not seen under `jax.jit`).
      TypeError: as in `equal`.
    """
    given = {"query": query, "key": key, "value": value, "mixed_grad": mixed_grad}
    chosen = _projections(np.shape(attn), given, layers, heads)
    (attn,) = prepare("grad_eclip", {"attn": attn}, layers=layers, heads=heads)
    dtype = relevance_dtype(attn, *chosen)
    # A head that does not count has a map of zeros.
    counts = (attn[-1] != 0).any(axis=(-2, -1))[:, None, :, None]
    q, k, v, w = (jnp.where(counts, x.astype(dtype), 0) for x in chosen)
    strength = jnp.einsum("bihc,bjhc->bij", w, v, precision="highest")
    cosine = jnp.einsum("bihc,bjhc->bij", _unit(q), _unit(k), precision="highest")
    seen = (attn[-1] > 0).any(axis=1) & ~jnp.eye(attn.shape[-1], dtype=bool)
    low = jnp.where(seen, cosine, jnp.inf).min(axis=-1, keepdims=True)
    high = jnp.where(seen, cosine, -jnp.inf).max(axis=-1, keepdims=True)
    alike = high <= low
    share = jnp.where(alike, 1, (cosine - low) / jnp.where(alike, 1, high - low))
    return jnp.maximum(strength, 0) * jnp.where(seen, share, 0)


def _unit(x: Array) -> Array:
    length = jnp.sqrt(jnp.square(x).sum(axis=(-2, -1), keepdims=True))
    return x / jnp.where(length == 0, 1, length)


def _projections(
    maps_shape: tuple[int, ...], given: dict, layers: Selection, heads: Selection
) -> list[Array]:
    """Queries, keys, values and the gradient of the last chosen layer, of the chosen heads."""
    shapes = {name: np.shape(x) for name, x in given.items()}
    count, batch, heads_there, tokens, _ = maps_shape if len(maps_shape) == 5 else (0,) * 5
    wanted = (count, batch, tokens, heads_there)
    fits = all(len(s) == 5 and s[:4] == wanted for s in shapes.values())
    if not fits or len(set(shapes.values())) > 1:
        raise ValueError(
            f"grad_eclip: expected maps [layers, batch, heads, query, key] and [layers, batch, "
            f"tokens, heads, features] of one shape, got attn {maps_shape}, "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    last = indices(layers, count, "layers")[-1]
    some_heads = indices(heads, heads_there, "heads")
    for name, x in given.items():
        require_finite(f"grad_eclip: {name}", x, layers=[last])
    return [take(jnp.asarray(x)[last], some_heads, 2) for x in given.values()]
