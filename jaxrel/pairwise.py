"""Relevance of pairs: how much a part of one input and a part of another matter together.

A model that compares two inputs, such as CLIP, embeds each by itself, and its score is the product
of the embeddings. A part of one matters only together with parts of the other, so the relevance is
of second order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, everything
from jaxrel.propagation.lrp import lrp_vjp

_GRADIENT = Composite([(everything(), rules.Gradient())])


def pairwise_relevance(
    first: Callable,
    second: Callable,
    *,
    at: tuple[str, str],
    method: str = "lrp",
    lrp: Any = None,
    at_once: int | None = None,
) -> Callable:
    """Make two functions that embed inputs return the relevance of pairs of their tokens.

    The score is `sum_e first_e second_e`. With 'lrp' it is BiLRP (Eberle et al. 2020, "Building and
    Interpreting Deep Similarity Models"): `R_ij = sum_e R(first_e)_i R(second_e)_j`, one LRP for
    each feature e of the embeddings. With 'input_x_gradient' it is `x_i J^T K y_j`, with the
    Jacobians J and K of the two at their inputs: the second-order attributions of Moeller, Tilli,
    Vu and Pado (TMLR 2025, exCLIP, eq. 10) with their integrals (eq. 9) read at the input alone and
    zeros as reference.

    The relevance of all pairs sums to the score as far as the method conserves: with LRP to the
    product of what reaches the tokens of each side, feature by feature, which rules without bias
    and stabiliser make the score itself.

    Args:
      first: a JAX function that returns an embedding of each example, `[batch, features]`.
      second: another, of as many features.
      at: the tag of the tokens of each, `[batch, tokens, width]`.
      method: 'lrp' or 'input_x_gradient'.
      lrp: other rules for 'lrp': see `jaxrel.lrp`; AttnLRP by default.
      at_once: how many backward passes go together; all, by default. Fewer need less memory.

    Returns:
      A function `(first's arguments, second's arguments) -> (score, relevance)`, two tuples in:
      the score `[batch]` and `[batch, tokens, tokens]`, the first's tokens by the second's, signed,
      float32. It costs a backward pass of `second` for each feature, and one of `first` for each
      token of `second`: let `second` be the text.

    Raises:
      ValueError: an unknown method, at_once below 1; (when called) embeddings that do not fit.
      TypeError, ValueError, NotImplementedError: (when called) see `jaxrel.lrp`.
    """
    if method not in ("lrp", "input_x_gradient"):
        raise ValueError(
            f"pairwise_relevance: unknown method {method!r}; there are 'lrp' and 'input_x_gradient'"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"pairwise_relevance: at_once must be 1 or more, got {at_once}")
    chosen = _GRADIENT if method == "input_x_gradient" else lrp
    propagated = functools.partial(
        lrp_vjp, rules=composites.attn_lrp() if chosen is None else chosen, argnums=None
    )

    def explained(first_args: tuple, second_args: tuple) -> tuple[Array, Array]:
        mine, explain_first = propagated(first, at=at[0])(*first_args)
        theirs, explain_second = propagated(second, at=at[1])(*second_args)
        if mine.ndim != 2 or mine.shape != theirs.shape:
            raise ValueError(
                "pairwise_relevance: expected two embeddings [batch, features] of one shape, got "
                f"{mine.shape} and {theirs.shape}"
            )
        # [features, batch, tokens]: what reaches each token of the second from each feature.
        by_feature = _tokens(explain_second, at[1], _seeds(theirs), at_once)
        # By token of the second, seeds for all features of the first at once: LRP is linear in
        # the relevance that it begins with.
        seeds = jnp.moveaxis(by_feature, 0, -1).swapaxes(0, 1) * mine
        found = _tokens(explain_first, at[0], seeds, at_once)
        return (mine * theirs).sum(-1), jnp.moveaxis(found, 0, -1)

    return explained


def _seeds(embedding: Float[Array, "batch features"]) -> Float[Array, "features batch features"]:
    """Each feature alone, as relevance."""
    eye = jnp.eye(embedding.shape[-1], dtype=embedding.dtype)
    return eye[:, None] * embedding


def _tokens(
    explain: Callable, tag: str, seeds: Float[Array, "seeds batch features"], at_once: int | None
) -> Float[Array, "seeds batch tokens"]:
    """The relevance of each token for each seed, summed over its features."""

    def tokens(seed: Array) -> Array:
        return explain(seed)[tag].sum(-1)

    if at_once is None or at_once >= len(seeds):
        return jax.vmap(tokens)(seeds)
    return lax.map(tokens, seeds, batch_size=at_once)
