"""Maps before they are accumulated: without the columns of sinks, and layers by weights."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrel.attention.maps import indices, is_mask
from jaxrel.attention.stacks import Stack


def sink_tokens(sinks: Any, stack: Stack) -> Bool[Array, "examples tokens"] | None:
    """Which tokens of a stack are sinks.

    Args:
      sinks: as in `attention.relevance`.
      stack: the stack.

    Returns:
      `[1, tokens]`, or `[batch, tokens]` where they differ between examples; None for none.

    Raises:
      ValueError: a token does not exist, or a bool array has another shape.
      TypeError: the tokens are neither indices nor a bool array.
    """
    if isinstance(sinks, Mapping):
        sinks = sinks.get(stack.name)
    if sinks is None:
        return None
    batch, _, tokens, _ = stack.sites[0].shape
    if is_mask(sinks):
        if sinks.shape not in ((tokens,), (batch, tokens)):
            raise ValueError(
                f"sinks: a bool array is [{tokens}] or [{batch}, {tokens}] for the tokens of "
                f"{stack.name!r}, got shape {sinks.shape}"
            )
        return jnp.atleast_2d(jnp.asarray(sinks))
    if not np.size(sinks):
        return None
    chosen = indices(np.atleast_1d(sinks).tolist(), tokens, "tokens that are sinks")
    return jnp.asarray(np.isin(np.arange(tokens), chosen)[None])


def open_entries(sinks: Bool[Array, "examples tokens"]) -> Bool[Array, "examples query key"]:
    """The entries of a map that stay: all but the sinks' columns, of which their own entries do."""
    tokens = sinks.shape[-1]
    return ~sinks[:, None] | jnp.eye(tokens, dtype=bool)[None]


def weights_of_layers(layer_weights: Any, stack: Stack) -> Float[Array, " layers"] | None:
    """The weight of each layer of a stack; None where all are 1.

    Args:
      layer_weights: as in `attention.relevance`.
      stack: the stack.

    Raises:
      ValueError: there are not as many weights as layers, or one is negative or not finite (not
        seen under `jax.jit`).
    """
    if isinstance(layer_weights, Mapping):
        layer_weights = layer_weights.get(stack.name)
    if layer_weights is None:
        return None
    shape = np.shape(layer_weights)
    if shape != (stack.layers,):
        raise ValueError(
            f"layer_weights: expected a weight for each of the {stack.layers} layers of "
            f"{stack.name!r}, got shape {shape}"
        )
    if not isinstance(layer_weights, jax.core.Tracer):
        given = np.asarray(layer_weights)
        wrong = given[~(np.isfinite(given) & (given >= 0))]
        if wrong.size:
            raise ValueError(
                f"layer_weights: weights are 0 or more, got {wrong[0]}; a negative one would turn "
                "what speaks for the score into what speaks against it"
            )
    return jnp.asarray(layer_weights)


def reweighed(
    maps: Float[Array, "layers batch heads query key"],
    sinks: Bool[Array, "examples tokens"] | None,
    layer_weights: Float[Array, " layers"] | None,
) -> Float[Array, "layers batch heads query key"]:
    """Maps without the sinks' columns, each layer's multiplied by its weight."""
    if sinks is not None:
        maps = jnp.where(open_entries(sinks)[:, None], maps, 0)
    if layer_weights is not None:
        maps = maps * layer_weights.astype(maps.dtype).reshape(-1, 1, 1, 1, 1)
    return maps
