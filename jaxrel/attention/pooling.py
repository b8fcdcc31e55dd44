"""Scores that are read from no token, but from what an attention pools of all tokens.

Some image encoders end with an attention of one query that is a parameter, the probe: the pooling
head of SigLIP, for one. The relevance of the tokens is then the row that one more layer of
accumulation would add for the probe: R(probe) = p R, where R accumulates over the encoder's
self-attention and p is the pooling map, as the method reads maps. The probe itself is no token of
the stream, and has no relevance.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxrel.attention.maps import head_mean, relevance_dtype, row
from jaxrel.attention.methods import Method
from jaxrel.attention.stacks import Site, Stack
from jaxrel.attention.streaming import Carrier
from jaxrel.attention.tagged import tagged_stack
from jaxrel.tracing.graph import Traced


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pooling:
    """A target that is no token: what an attention with a query of its own reads of all tokens.

    Args:
      tag: the name of the tag of the attention's map, [batch, heads, 1, tokens].
    """

    tag: str


def find_pooling(traced: Traced, pooling: Pooling, stack: Stack) -> Site:
    """The map of an attention that pools a stack's tokens.

    Raises:
      ValueError: no map has the tag, or several; or it is not of one query and these tokens.
    """
    found = tagged_stack(traced, pooling.tag)
    sites = () if found is None else found.sites
    if len(sites) != 1 or sites[0].loops or sites[0].in_cond:
        raise ValueError(
            f"target_token: Pooling({pooling.tag!r}) needs one map with that tag, outside of loops "
            f"and branches, and there are {len(sites)}; tag the pooling attention's map, attn = "
            f"jaxrel.tag(attn, {pooling.tag!r})"
        )
    batch, _, _, tokens = stack.sites[0].shape
    shape = sites[0].shape
    if shape != (batch, shape[1], 1, tokens):
        raise ValueError(
            f"target_token: the map tagged {pooling.tag!r} must be [batch {batch}, heads, 1, "
            f"tokens {tokens}], a query and the tokens of {stack.name!r}, got {shape}"
        )
    return sites[0]


def pooled_row(
    method: Method,
    matrix: Callable[[], Array],
    maps: Float[Array, "batch heads 1 tokens"],
    grad: Float[Array, "batch heads 1 tokens"],
    *,
    last: bool,
) -> Float[Array, "batch tokens"]:
    """The relevance of tokens for what is pooled of them.

    Args:
      method: a row of `methods.TABLE`.
      matrix: returns the method's relevance matrix of the tokens, [batch, tokens, tokens].
      maps: the pooling map, or its relevance by LRP where the method reads that.
      grad: the gradient of the explained scalar by the pooling map.
      last: whether the pooling map is the last layer, which is all that some methods read.
    """
    if last and method.layers == "last":
        return method.relevance_matrix(maps[None], grad[None], {})[:, 0]
    if "gradients" in method.needs:
        return row(matrix(), head_mean(maps, grad)[:, 0])
    return row(matrix(), maps.astype(relevance_dtype(maps)).mean(1)[:, 0])


@jax.custom_vjp
def start_row(carrier: Carrier, attn: Array) -> tuple[Carrier, Array]:
    """Mark a pooling map: backward, the row of relevance begins here; see `streaming`."""
    return carrier, attn


def _forward(carrier: Carrier, attn: Array) -> tuple[tuple[Carrier, Array], Array]:
    return (carrier, attn), attn


def _backward(attn: Array, cotangents: Any) -> tuple[Carrier, Array]:
    relevance, grad = cotangents
    new = relevance.keep + head_mean(attn, grad)[:, 0].astype(relevance.keep.dtype)
    return Carrier(new, new), grad


start_row.defvjp(_forward, _backward)
