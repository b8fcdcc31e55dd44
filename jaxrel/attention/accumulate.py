"""Relevance accumulated over attention layers, of one stream of tokens or of two.

The rules of Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", eq. 5 to 11,
and our weighted form of them. A `Stream` holds the relevance of all tokens for the tokens of one
modality; an attention layer is a function from streams to streams; a model is a scan over its
layers. A model of one modality is a bimodal one whose other stream has no tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.importance import Measure, layer_weights, measure
from jaxrel.attention.maps import (
    FloatArray,
    Selection,
    head_mean,
    matmul,
    prepare,
    prepare_values,
    relevance_dtype,
)
from jaxrel.tracing.sharding import shaped_like, zeros


class Layers(NamedTuple):
    """The attention layers of one kind, stacked in the order in which the model runs them.

    `attn` and `grad` are `[layers, batch, heads, query, key]`: the softmax outputs, and the
    gradient of the explained scalar with respect to them. Weighted accumulation needs the other
    three, `[layers, batch, query, width]`: the residual stream before attention is added, what
    is added, and the gradient with respect to their sum.
    """

    attn: Any
    grad: Any
    before: Any = None
    after: Any = None
    value_grad: Any = None


class Maps(NamedTuple):
    """Four relevance maps; `sq[b, i, j]` is the relevance of q's token j for s's token i."""

    ss: Array
    sq: Array
    qq: Array
    qs: Array


class Stream(NamedTuple):
    """The relevance of all tokens for one stream's tokens, in the parts the rules need.

    The relevance of its own tokens is `diag(kept) + moved`: what the residual branch alone
    carries, and what attention moved. Equal accumulation has `kept = 1`, so `moved` is the
    paper's `R - I`. The two parts are kept separate because that difference cancels in float32
    where relevance is small, and because in weighted accumulation `R - I` can be negative and
    then no longer says which share of the relevance came from which token.
    """

    kept: Float[Array, "batch tokens"]
    moved: Float[Array, "batch tokens tokens"]
    other: Float[Array, "batch tokens others"]


def start(
    batch: int, tokens: int, others: int, dtype: Any = jnp.float32, *, like: Any = None
) -> Stream:
    """A stream before its first layer: every token is relevant for itself alone.

    Where maps `like` `[layers, batch, ...]` are given it is sharded as their batch is.
    """

    def nothing(*sizes: int) -> Array:
        shape = (batch, *sizes)
        if like is None:
            return jnp.zeros(shape, dtype)
        axes = (1, *(None for _ in sizes))
        return zeros(shaped_like(like, axes, shape=shape, dtype=dtype))

    return Stream(nothing(tokens) + 1, nothing(tokens, tokens), nothing(tokens, others))


def own(stream: Stream) -> Float[Array, "batch tokens tokens"]:
    """The relevance of a stream's tokens for themselves: `R_ss`."""
    return stream.moved + stream.kept[..., None] * _eye(stream)


def normalised(stream: Stream) -> Float[Array, "batch tokens tokens"]:
    """What attention moved, each row as shares of its sum, plus the identity: eq. 8 and 9.

    A row to which nothing moved is the identity's row.
    """
    total = stream.moved.sum(axis=-1, keepdims=True)
    return stream.moved / jnp.where(total == 0, 1, total) + _eye(stream)


def self_attention(
    stream: Stream, abar: Float[Array, "batch tokens tokens"], alpha: Any = 1.0, beta: Any = 1.0
) -> Stream:
    """A stream after it attended to itself: eq. 6 and 7.

    Args:
      stream: the stream before.
      abar: `head_mean` of the layer.
      alpha: weight of the relevance carried over, one number or `[batch, tokens]`.
      beta: weight of the relevance moved.

    Returns:
      The stream after.
    """
    abar = abar.astype(stream.moved.dtype)
    return _add(stream, matmul(abar, own(stream)), matmul(abar, stream.other), alpha, beta)


def cross_attention(
    stream: Stream,
    source: Stream,
    abar: Float[Array, "batch tokens others"],
    alpha: Any = 1.0,
    beta: Any = 1.0,
    *,
    normalise: bool = True,
) -> Stream:
    """A stream after it attended to another: eq. 10 and 11.

    A layer in which two streams attend to each other is two calls, both from the streams as
    they are before the layer.

    Args:
      stream: the stream that the queries come from, before.
      source: the stream that the keys come from.
      abar: `head_mean` of the layer.
      alpha: as in `self_attention`.
      beta: as in `self_attention`.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).

    Returns:
      The stream after.
    """
    abar = abar.astype(stream.moved.dtype)
    mine, theirs = (normalised(x) if normalise else own(x) for x in (stream, source))
    others = matmul(mine.mT, matmul(abar, theirs))
    return _add(stream, matmul(abar, source.other), others, alpha, beta)


@functools.partial(jax.jit, static_argnames=("importance", "normalise", "residual"))
def accumulate_blocks(
    blocks: Sequence[Sequence[Mapping[str, Layers]]],
    *,
    importance: Measure | None = None,
    normalise: bool = True,
    residual: bool = True,
) -> Maps:
    """Accumulate relevance over blocks of attention layers: the one loop behind every form.

    Args:
      blocks: a schedule as `bimodal_accumulation` takes it, already checked. Blocks of "ss"
        alone are a model of one modality.
      importance: the measure of weighted accumulation; None for equal accumulation.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).
      residual: whether `ss` and `qq` hold what the residual branch alone carries.

    Returns:
      The four maps, in float32 (float64 where any input is float64).
    """
    leaves = jax.tree.leaves(blocks)
    batch, dtype = leaves[0].shape[1], relevance_dtype(*leaves)
    sizes = {"s": 0, "q": 0}
    for pair, layers in (item for block in blocks for stage in block for item in stage.items()):
        sizes[pair[0]], sizes[pair[1]] = layers.attn.shape[-2:]
    tokens, others = sizes.values()
    streams = {
        "s": start(batch, tokens, others, dtype, like=leaves[0]),
        "q": start(batch, others, tokens, dtype, like=leaves[0]),
    }

    def layer(streams, stages):
        for stage in stages:
            streams = streams | _after_stage(streams, stage, importance, normalise)
        return streams, None

    for block in blocks:
        counts = [layers.attn.shape[0] for stage in block for layers in stage.values()]
        first, last = _split(block, min(counts))
        streams, _ = jax.lax.scan(layer, streams, first)
        if min(counts) < max(counts):
            streams, _ = layer(streams, last)
    s, q = streams["s"], streams["q"]
    ss, qq = (own(s), own(q)) if residual else (s.moved, q.moved)
    return Maps(ss=ss, sq=s.other, qq=qq, qs=q.other)


def _after_stage(
    streams: Mapping[str, Stream],
    stage: Mapping[str, Layers],
    importance: Measure | None,
    normalise: bool,
) -> dict[str, Stream]:
    """The streams that attend in a stage, after it; all of them read the streams before it."""
    changed = {}
    for pair, layer in stage.items():
        stream, source = (streams[name] for name in pair)
        weights = () if importance is None else layer_weights(*layer[2:], importance)
        update = (head_mean(layer.attn, layer.grad), *weights)
        if pair[0] == pair[1]:
            changed[pair[0]] = self_attention(stream, *update)
        else:
            changed[pair[0]] = cross_attention(stream, source, *update, normalise=normalise)
    return changed


def _split(block: Any, count: int) -> tuple[Any, Any]:
    """The first `count` layers of a block, and the one after them without what it lacks."""
    first = jax.tree.map(lambda x: x[:count], block)
    last = [
        {
            pair: jax.tree.map(lambda x: x[-1], layers)
            for pair, layers in stage.items()
            if layers.attn.shape[0] > count
        }
        for stage in block
    ]
    return first, last


def _eye(stream: Stream) -> Array:
    return jnp.eye(stream.moved.shape[-1], dtype=stream.moved.dtype)[None]


def _add(stream: Stream, moved: Array, other: Array, alpha: Any, beta: Any) -> Stream:
    dtype, shape = stream.kept.dtype, stream.kept.shape
    alpha, beta = (jnp.broadcast_to(jnp.asarray(w, dtype), shape) for w in (alpha, beta))
    return Stream(
        kept=alpha * stream.kept,
        moved=alpha[..., None] * stream.moved + beta[..., None] * moved,
        other=alpha[..., None] * stream.other + beta[..., None] * other,
    )


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
    maps = prepare("equal", {"attn": attn, "grad": grad}, layers=layers, heads=heads)
    return accumulate_blocks([[{"ss": Layers(*maps)}]]).ss


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
    given = {"before": before, "after": after, "value_grad": value_grad}
    values = prepare_values("weighted", attn.shape, given, layers=layers)
    blocks = [[{"ss": Layers(*maps, *values)}]]
    return accumulate_blocks(blocks, importance=measure(importance)).ss
