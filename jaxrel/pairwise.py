"""Relevance of pairs: how much a part of one input and a part of another matter together.

A model that compares two inputs, such as CLIP, embeds each by itself, and its score is the product
of the embeddings. A part of one matters only together with parts of the other, so the relevance is
of second order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.gradients import integrated_gradients
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, everything
from jaxrel.propagation.lrp import lrp_vjp

METHODS = ("lrp", "input_x_gradient", "integrated_gradients")

_GRADIENT = Composite([(everything(), rules.Gradient())])


def pairwise_relevance(
    first: Callable,
    second: Callable,
    *,
    at: tuple[str, str],
    method: str = "lrp",
    lrp: Any = None,
    steps: int = 32,
    baseline: Sequence[Any] = (0.0, 0.0),
    at_once: int | None = None,
) -> Callable:
    """Make two functions that embed inputs return the relevance of pairs of their tokens.

    The score is `sum_e first_e second_e`. With 'lrp' it is BiLRP (Eberle et al. 2020, "Building and
    Interpreting Deep Similarity Models"): `R_ij = sum_e R(first_e)_i R(second_e)_j`, one LRP for
    each feature e of the embeddings. 'integrated_gradients' is the second-order attribution of
    Moeller, Tilli, Vu and Pado (TMLR 2025, exCLIP, eq. 10): `(x_i - a_i) J^T K (y_j - b_j)`, with
    the Jacobians J and K of the two integrated on the straight lines from the baselines a and b
    (eq. 9), which is BiLRP with integrated gradients in place of LRP. 'input_x_gradient' has
    the Jacobians at the inputs alone, and zeros as baselines.

    The relevance of all pairs sums to the score as far as the method conserves: with LRP to the
    product of what reaches the tokens of each side, feature by feature, which rules without bias
    and stabiliser make the score itself; with integrated gradients to the score of the inputs, less
    those of each with the other's baseline, plus that of the two baselines.

    Args:
      first: a JAX function that returns an embedding of each example, `[batch, features]`.
      second: another, of as many features.
      at: the tag of the tokens of each, `[batch, tokens, width]`.
      method: one of `METHODS`.
      lrp: other rules for 'lrp': see `jaxrel.lrp`; AttnLRP by default.
      steps: of 'integrated_gradients', on each of the two lines.
      baseline: of 'integrated_gradients', for the tokens of each: see `integrated_gradients`.
      at_once: how many backward passes go together; all, by default. Fewer need less memory.

    Returns:
      A function `(first's arguments, second's arguments) -> (score, relevance)`, two tuples in:
      the score `[batch]` and `[batch, tokens, tokens]`, the first's tokens by the second's, signed,
      float32. It costs a backward pass of `second` for each feature, and one of `first` for each
      token of `second`: let `second` be the text. Integrated gradients cost this `steps` times.

    Raises:
      ValueError: an unknown method, at_once or steps below 1, a baseline that is no pair; (when
        called) embeddings or a baseline that do not fit.
      TypeError, ValueError, NotImplementedError: (when called) see `jaxrel.lrp`.
    """
    if method not in METHODS:
        raise ValueError(
            f"pairwise_relevance: unknown method {method!r}; there are {', '.join(METHODS)}"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"pairwise_relevance: at_once must be 1 or more, got {at_once}")
    if not isinstance(baseline, tuple | list) or len(baseline) != 2:
        raise ValueError(
            "pairwise_relevance: baseline must be a pair, one for the tokens of each function, as "
            f"in (0.0, 0.0), got {baseline!r}"
        )
    if method == "integrated_gradients":
        sides = [
            _integrated(fun, tag, steps, start)
            for fun, tag, start in zip((first, second), at, baseline, strict=True)
        ]
    else:
        chosen = composites.attn_lrp() if lrp is None else lrp
        chosen = chosen if method == "lrp" else _GRADIENT
        sides = [
            _propagated(fun, tag, chosen) for fun, tag in zip((first, second), at, strict=True)
        ]

    def explained(first_args: tuple, second_args: tuple) -> tuple[Array, Array]:
        mine, explain_first = sides[0](*first_args)
        theirs, explain_second = sides[1](*second_args)
        if mine.ndim != 2 or mine.shape != theirs.shape:
            raise ValueError(
                "pairwise_relevance: expected two embeddings [batch, features] of one shape, got "
                f"{mine.shape} and {theirs.shape}"
            )
        # [features, batch, tokens]: what reaches each token of the second from each feature.
        each = jnp.eye(theirs.shape[-1], dtype=theirs.dtype)[:, None]
        by_feature = _map(
            explain_second, jnp.broadcast_to(each, (len(each), *theirs.shape)), at_once
        )
        # By token of the second, weights for all features of the first at once: the methods are
        # linear in the relevance that they begin with.
        weights = jnp.moveaxis(by_feature, 0, -1).swapaxes(0, 1).astype(mine.dtype)
        found = _map(explain_first, weights, at_once)
        return (mine * theirs).sum(-1), jnp.moveaxis(found, 0, -1)

    return explained


def _propagated(fun: Callable, tag: str, composite: Any) -> Callable:
    """The embedding, and the relevance of each token for weights of its features, by rules."""

    def side(*args) -> tuple[Array, Callable]:
        embedding, explain = lrp_vjp(fun, composite, at=tag, argnums=None)(*args)
        return embedding, lambda weights: explain(weights * embedding)[tag].sum(-1)

    return side


def _integrated(fun: Callable, tag: str, steps: int, baseline: Any) -> Callable:
    """The same by integrated gradients."""
    explain = integrated_gradients(fun, argnums=None, at=tag, steps=steps, baseline=baseline)

    def side(*args) -> tuple[Array, Callable]:
        return fun(*args), lambda weights: explain(*args, seed=weights)[tag].sum(-1)

    return side


def _map(
    explain: Callable, weights: Float[Array, "maps batch features"], at_once: int | None
) -> Float[Array, "maps batch tokens"]:
    if at_once is None or at_once >= len(weights):
        return jax.vmap(explain)(weights)
    return lax.map(explain, weights, batch_size=at_once)
