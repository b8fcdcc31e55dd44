"""Self-attention over blocks of queries, with relevance in its backward pass.

Memory is tokens x block instead of tokens x tokens, forward and backward. `by_blocks` computes
the attention that was found in a function so; `blockwise` is the same as an operation that a
model calls. The latter's backward pass forms each block of the map again from q, k and the
log-sum-exp of its rows (Dao et al. 2022, "FlashAttention"), has the block's gradient at hand as
`dA = dO V^T`, and adds the block's share to the carrier's relevance before it drops both.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrel.attention.maps import head_mean, matmul, relevance_dtype
from jaxrel.attention.stacks import Site, Stack
from jaxrel.attention.streaming import Carrier, accumulate_rows, joined
from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.graph import Graph, Node
from jaxrel.tracing.rows import NotByRows, Places, Rows, find_rows


def by_blocks(graph: Graph, stacks: Iterable[Stack], block: int) -> dict[Node, Step]:
    """The steps that compute the attention of stacks, and move relevance, by blocks of queries.

    The carrier is a dict by stack.

    Args:
      graph: the graph that holds the stacks.
      stacks: self-attention.
      block: how many queries at a time.

    Raises:
      NotImplementedError: the rows of a map cannot be computed apart.
    """
    places = Places(graph)
    steps = {}
    for stack in stacks:
        for site in stack.sites:
            try:
                if site.windows is not None:
                    raise NotByRows("it is within windows")
                rows = find_rows(places, site.value, site.query, site.key)
            except NotByRows as error:
                raise NotImplementedError(
                    f"form='blockwise': the attention at {site.where} cannot be computed by "
                    f"blocks of queries: {error}. Use form='auto', which holds one whole map at a "
                    "time"
                ) from error
            function = _step_of(stack.name, site, rows, block)
            steps[rows.product] = Step(tuple(one.atom for one in rows.ins), function, carried=True)
    return steps


def _step_of(name: str, site: Site, rows: Rows, block: int) -> Callable:
    def function(carriers, *values):
        row = joined(carriers[name])

        def visit(some):
            move, attn = accumulate_rows(row, site.standard(some))
            return move, site.restore(attn, some)

        out, move = rows.compute(values, block, visit)
        return {**carriers, name: Carrier(row, move)}, [out]

    return function


def blockwise(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch heads tokens width"],
    v: Float[Array, "batch heads tokens value_width"],
    carrier: Carrier,
    *,
    block: int,
    mask: Bool[Array, "batch tokens"] | Bool[np.ndarray, "batch tokens"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads tokens value_width"], Carrier]:
    """`softmax(scale q k^T) v`, and the carrier accumulated over its map.

    It replaces `streaming.accumulate` and the attention that this marks; results agree to
    rounding. The softmax, the gradient of the map and the relevance are computed in float32
    (float64 for float64 inputs) whatever the dtype of q, k and v.

    Args:
      q: queries, heads apart.
      k: keys.
      v: values.
      carrier: the carrier (`streaming.Carrier`).
      block: how many queries at a time; the number of tokens need not be a multiple.
      mask: the keys that may be attended to, True to keep; None for all. A query with no
        key at all gets output 0.
      causal: whether a query sees only the keys up to its own position.
      scale: what scores are multiplied by; `width ** -0.5` by default.

    Returns:
      The attention output in the dtype of v, and the carrier.

    Raises:
      ValueError: `block` is less than 1, or the carrier does not fit.
    """
    batch, _, tokens, width = q.shape
    block = operator.index(block)
    if block < 1:
        raise ValueError(f"blockwise: block must be 1 or more queries, got {block}")
    if carrier.keep.shape != (batch, tokens):
        raise ValueError(
            f"blockwise: expected a carrier (batch, tokens) = ({batch}, {tokens}), got "
            f"{carrier.keep.shape}"
        )
    scale = width**-0.5 if scale is None else scale
    out, *carried = _blockwise(q, k, v, *carrier, mask, min(block, tokens), causal, scale)
    return out, Carrier(*carried)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blockwise(q, k, v, keep, move, mask, block, causal, scale):
    return _attend(q, k, v, mask, block, causal, scale)[0], keep, move


def _forward(q, k, v, keep, move, mask, block, causal, scale):
    out, logsumexp = _attend(q, k, v, mask, block, causal, scale)
    return (out, keep, move), (q, k, v, mask, out, logsumexp)


def _backward(block, causal, scale, residuals, cotangents):
    q, k, v, mask, out, logsumexp = residuals
    out_grad, keep, move = cotangents
    tokens, dtype = q.shape[2], logsumexp.dtype
    # sum over keys of A dA, the term that the softmax's derivative subtracts.
    mean_grad = (out_grad.astype(dtype) * out.astype(dtype)).sum(axis=-1)
    rows = [_split(x, block) for x in (q, out_grad, logsumexp, mean_grad)]

    def step(carry, inputs):
        k_grad, v_grad, relevance = carry
        first, q, out_grad, logsumexp, mean_grad, move = inputs
        scores, allowed = _scores(q, k, mask, first, causal, scale, dtype)
        attn = jnp.where(allowed, jnp.exp(scores - logsumexp[..., None]), 0)
        attn_grad = _einsum("bhtd,bhsd->bhts", out_grad, v, dtype)
        abar = head_mean(attn, attn_grad).astype(move.dtype)
        relevance = relevance + matmul(move[:, None], abar)[:, 0]
        scores_grad = scale * attn * (attn_grad - mean_grad[..., None])
        k_grad = k_grad + _einsum("bhts,bhtd->bhsd", scores_grad, q, dtype)
        v_grad = v_grad + _einsum("bhts,bhtd->bhsd", attn, out_grad, dtype)
        return (k_grad, v_grad, relevance), _einsum("bhts,bhsd->bhtd", scores_grad, k, dtype)

    # Rows that only fill up the last block have gradient 0 and relevance 0: they add nothing.
    start = (jnp.zeros_like(k, dtype), jnp.zeros_like(v, dtype), keep)
    blocks = (_firsts(tokens, block), *rows, _split(move[:, None], block)[:, :, 0])
    (k_grad, v_grad, relevance), q_grad = jax.lax.scan(step, start, blocks)
    q_grad, k_grad, v_grad = (
        g.astype(x.dtype) for g, x in ((_join(q_grad, tokens), q), (k_grad, k), (v_grad, v))
    )
    return q_grad, k_grad, v_grad, relevance, relevance, None


_blockwise.defvjp(_forward, _backward)


def _attend(q, k, v, mask, block, causal, scale):
    """The attention output, and the log-sum-exp of every row of scores."""
    tokens, dtype = q.shape[2], relevance_dtype(q, k, v)

    def step(carry, inputs):
        first, q = inputs
        scores, allowed = _scores(q, k, mask, first, causal, scale, dtype)
        top = scores.max(axis=-1, keepdims=True)
        shares = jnp.where(allowed, jnp.exp(scores - top), 0)
        total = shares.sum(axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        out = _einsum("bhts,bhsd->bhtd", (shares / total).astype(v.dtype), v, dtype)
        return carry, (out.astype(v.dtype), (top + jnp.log(total))[..., 0])

    _, (out, logsumexp) = jax.lax.scan(step, None, (_firsts(tokens, block), _split(q, block)))
    return _join(out, tokens), _join(logsumexp, tokens)


def _scores(q, k, mask, first, causal, scale, dtype):
    """Scores of one block of queries, and which of its pairs may attend."""
    block, tokens = q.shape[2], k.shape[2]
    allowed = jnp.ones((1, 1, block, tokens), bool)
    if causal:
        positions = first + jnp.arange(block)
        allowed = allowed & (jnp.arange(tokens)[None] <= positions[:, None])[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    scores = scale * _einsum("bhtd,bhsd->bhts", q, k, dtype)
    # The lowest finite number, as the difference of two infinities is NaN.
    return jnp.where(allowed, scores, jnp.finfo(dtype).min), allowed


def _einsum(spec: str, x: Array, y: Array, dtype: Any) -> Array:
    return jnp.einsum(spec, x, y.astype(x.dtype), preferred_element_type=dtype)


def _firsts(tokens: int, block: int) -> Array:
    """Position of the first query of each block."""
    return jnp.arange(0, tokens, block)


def _split(x: Array, block: int) -> Array:
    """`[batch, heads, tokens, ...]` to `[blocks, batch, heads, block, ...]`, filled with 0."""
    missing = -x.shape[2] % block
    x = jnp.pad(x, [(0, missing if axis == 2 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, block, *x.shape[3:]), 2, 0)


def _join(x: Array, tokens: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :tokens]
