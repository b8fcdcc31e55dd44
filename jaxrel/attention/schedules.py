"""Relevance accumulated over two streams of tokens that attend to each other.

The rules of Chefer, Gur and Wolf 2021, eq. 5 to 11, and our weighted form of them. A stream
holds the relevance of its own tokens and of the other stream's tokens for each of its
tokens; a layer is a function from streams to streams; a model is a scan over layers.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.accumulate import head_mean, prepare_values
from jaxrel.attention.importance import Measure, layer_weights, measure
from jaxrel.attention.maps import TargetToken, matmul, prepare, relevance_dtype, token_index
from jaxrel.tracing.sharding import shaped_like, zeros


class Layers(NamedTuple):
    """The attention layers of one kind, stacked in the order in which the model runs them.

    `attn` and `grad` are `[layers, batch, heads, query, key]`. Weighted accumulation needs
    the other three, `[layers, batch, query, width]`: the residual stream before attention is
    added, what is added, and the gradient with respect to their sum.
    """

    attn: Any
    grad: Any
    before: Any = None
    after: Any = None
    value_grad: Any = None


class CoAttention(NamedTuple):
    """Layers in which two streams attend to each other, and then each to itself.

    `s_cross` has its queries in stream s and its keys in stream q, `q_cross` the reverse;
    both read the same input. s is the stream that is read out: what the last layer does to
    stream q reaches no output, so `q_cross` and `q_self` may lack the last layer.
    """

    s_cross: Layers
    s_self: Layers
    q_cross: Layers
    q_self: Layers


Schedule = Sequence[Sequence[Mapping[str, Layers]]]
_PAIRS = ("ss", "sq", "qq", "qs")


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
    paper's `R - I`. It is held apart because that difference cancels in float32 where
    relevance is small, and because in weighted accumulation `R - I` can be negative, and
    then no longer says what share of the relevance came from where.
    """

    kept: Float[Array, "batch tokens"]
    moved: Float[Array, "batch tokens tokens"]
    other: Float[Array, "batch tokens others"]


def start(
    batch: int, tokens: int, others: int, dtype: Any = jnp.float32, *, like: Any = None
) -> Stream:
    """A stream before its first layer: every token relevant for itself alone.

    Args:
      batch: how many examples.
      tokens: how many tokens it has.
      others: how many tokens the other stream has.
      dtype: the dtype to accumulate in.
      like: maps of any layers, `[layers, batch, ...]`: the stream is sharded as their batch is.

    Returns:
      The stream.
    """

    def nothing(*sizes: int) -> Array:
        shape = (batch, *sizes)
        if like is None:
            return jnp.zeros(shape, dtype)
        axes = (1, *(None for _ in sizes))
        return zeros(shaped_like(like, axes, shape=shape, dtype=dtype))

    return Stream(
        kept=nothing(tokens) + 1, moved=nothing(tokens, tokens), other=nothing(tokens, others)
    )


def own(stream: Stream) -> Float[Array, "batch tokens tokens"]:
    """The relevance of a stream's tokens for themselves: `R_ss`."""
    return stream.moved + stream.kept[..., None] * _eye(stream)


def normalised(stream: Stream) -> Float[Array, "batch tokens tokens"]:
    """What attention moved, each row as shares of its sum, plus the identity: eq. 8 and 9.

    Args:
      stream: the stream.

    Returns:
      `R_ss` normalised; a row to which nothing moved is the identity's row.
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
    moved = abar * stream.kept[:, None, :] + matmul(abar, stream.moved)
    return _add(stream, moved, matmul(abar, stream.other), alpha, beta)


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
      alpha: weight of the relevance carried over, one number or `[batch, tokens]`.
      beta: weight of the relevance moved.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).

    Returns:
      The stream after.
    """
    abar = abar.astype(stream.moved.dtype)
    mine, theirs = (normalised(x) if normalise else own(x) for x in (stream, source))
    others = matmul(mine.mT, matmul(abar, theirs))
    return _add(stream, matmul(abar, source.other), others, alpha, beta)


def bimodal(
    s: Layers | None,
    q: Layers | None,
    cross: CoAttention,
    *,
    importance: str | Measure | None = None,
    normalise: bool = True,
    target_token: TargetToken | None = None,
) -> Maps:
    """Relevance in a model of two streams that attend to each other, LXMERT's form.

    First each stream attends to itself, then come the layers of co-attention. In the last of
    them only stream s is followed. Chefer, Gur and Wolf 2021, eq. 5 to 11; weighted, our
    reading of Huang, Jia, Zhang and Zhang 2023: alpha and beta of the query stream multiply
    the old and the added part of both its maps (see `weighted`).

    Args:
      s: the self-attention layers of the stream that is read out; None if it has none.
      q: the same for the other stream.
      cross: the layers of co-attention, at least one.
      importance: None for equal accumulation; for weighted accumulation the measure, and
        then every `Layers` holds its token values.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).
      target_token: when given, this token of s (one index, or one per example) gets relevance 0
        for itself, as in the reference. None leaves the map as it is.

    Returns:
      The four maps, in float32 (float64 for float64 maps). Read `sq` and `ss` with `row`.

    Raises:
      ValueError: shapes do not fit, token values are missing, a value is NaN or infinite
        (named with its layer; not seen under `jax.jit`), or the target token does not exist.
    """
    where, values = "bimodal", importance is not None
    count, batch, tokens, others = _sizes(where, "cross.s_cross", cross.s_cross)
    ss, qq = (batch, tokens, tokens), (batch, others, others)
    sq, qs = (batch, tokens, others), (batch, others, tokens)
    # What the last layer does to stream q is not used, and may be absent.
    some = (count, count - 1)
    s = None if s is None else _checked(where, "s", s, ss, values=values)
    q = None if q is None else _checked(where, "q", q, qq, values=values)
    cross = CoAttention(
        _checked(where, "cross.s_cross", cross.s_cross, sq, values=values),
        _checked(where, "cross.s_self", cross.s_self, ss, (count,), values=values),
        _checked(where, "cross.q_cross", cross.q_cross, qs, some, values=values),
        _checked(where, "cross.q_self", cross.q_self, qq, some, values=values),
    )
    q_cross, q_self = (
        jax.tree.map(lambda x: x[: count - 1], layers) for layers in (cross.q_cross, cross.q_self)
    )
    schedule = (
        () if s is None else ({"ss": s},),
        () if q is None else ({"qq": q},),
        (
            {"sq": cross.s_cross, "qs": q_cross},
            {"ss": cross.s_self, "qq": q_self},
        ),
    )
    importance = importance if importance is None else measure(importance)
    maps = _accumulate(tuple(filter(None, schedule)), tokens, others, importance, normalise)
    if target_token is None:
        return maps
    token = token_index(target_token, batch=batch, tokens=tokens)
    own = token[:, None] == jnp.arange(tokens)
    return maps._replace(ss=jnp.where(own[:, :, None] & own[:, None], 0, maps.ss))


def encoder_decoder(
    encoder: Layers | None,
    decoder: Layers,
    cross: Layers,
    *,
    importance: str | Measure | None = None,
    normalise: bool = True,
) -> Maps:
    """Relevance in an encoder-decoder model: a captioner, or a detector such as DETR.

    The encoder's tokens (stream q) attend to themselves. Then in every decoder layer the
    decoder's tokens (stream s) attend to themselves and to the encoder's output. Chefer, Gur
    and Wolf 2021, eq. 5 to 10; weighted as in `bimodal`. A row of the normaliser that is 0
    stays 0; the reference's code drops the whole layer's addition in that case.

    Args:
      encoder: the encoder's self-attention layers; None if it has none.
      decoder: the decoder's self-attention layers.
      cross: the decoder's cross-attention layers, one for each of them.
      importance: as in `bimodal`.
      normalise: as in `bimodal`.

    Returns:
      The four maps, in float32 (float64 for float64 maps): `sq` the relevance of the
      encoder's tokens for the decoder's, `ss` of the decoder's own, `qq` of the encoder's
      own; `qs` is 0. For a causal captioner read the row of the position that predicts the
      word: `sq` for the image, `ss` for the words before.

    Raises:
      ValueError: as in `bimodal`.
    """
    where, values = "encoder_decoder", importance is not None
    count, batch, tokens, others = _sizes(where, "cross", cross)
    ss, sq, qq = (batch, tokens, tokens), (batch, tokens, others), (batch, others, others)
    if encoder is not None:
        encoder = _checked(where, "encoder", encoder, qq, values=values)
    decoder = _checked(where, "decoder", decoder, ss, (count,), values=values)
    cross = _checked(where, "cross", cross, sq, values=values)
    schedule = ((),) if encoder is None else (({"qq": encoder},),)
    schedule = (*schedule, ({"ss": decoder}, {"sq": cross}))
    importance = importance if importance is None else measure(importance)
    return _accumulate(tuple(filter(None, schedule)), tokens, others, importance, normalise)


def two_streams(
    schedule: Schedule,
    *,
    importance: str | Measure | None = None,
    normalise: bool = True,
    residual: bool = True,
) -> Maps:
    """Relevance in any model of two streams, from the order in which they attend.

    `bimodal` and `encoder_decoder` are two such orders. A schedule is a sequence of blocks,
    which run one after the other. A block is a sequence of stages; its layers run one after
    the other, and each goes through all stages. A stage is a mapping from a pair, "ss", "qq",
    "sq" or "qs" (queries of the first letter's stream, keys of the second's), to the `Layers`
    of that attention; all of a stage read the streams as they were before it. Chefer, Gur and
    Wolf 2021, eq. 5 to 11; weighted as in `bimodal`.

    Args:
      schedule: the blocks. What does not reach stream s any more, in the last layer of a block,
        may be absent there.
      importance: as in `bimodal`.
      normalise: as in `bimodal`.
      residual: whether `ss` and `qq` hold what the residual branch alone carries. It is each
        token's own (the identity, in equal accumulation) and outweighs the rest; without it, a
        word that is itself read out compares with the words before it.

    Returns:
      The four maps, as in `bimodal`.

    Raises:
      ValueError: as in `bimodal`; also an unknown pair, or a stream whose tokens are never
        told (no "sq" or "qs").
    """
    blocks = tuple(tuple(dict(stage) for stage in block) for block in schedule if block)
    stages = [stage for block in blocks for stage in block]
    for stage in stages:
        if not stage or set(stage) - set(_PAIRS) or len({p[0] for p in stage}) < len(stage):
            raise ValueError(
                "two_streams: a stage maps pairs of streams, one for each stream that attends, "
                f"to Layers; the pairs are {', '.join(_PAIRS)}; got {', '.join(stage) or 'none'}"
            )
    cross = [(p, stage[p]) for stage in stages for p in stage if p in ("sq", "qs")]
    if not cross:
        raise ValueError("two_streams: no stream attends to the other; use equal or weighted")
    pair, layers = cross[0]
    _, batch, queries, keys = _sizes("two_streams", pair, layers)
    size = {pair[0]: queries, pair[1]: keys}
    for block in blocks:
        count = max(np.shape(x.attn)[0] for stage in block for x in stage.values())
        for stage in block:
            for pair, layers in stage.items():
                sizes = (batch, size[pair[0]], size[pair[1]])
                stage[pair] = _checked(
                    "two_streams",
                    pair,
                    layers,
                    sizes,
                    (count, count - 1),
                    values=importance is not None,
                )
    importance = importance if importance is None else measure(importance)
    return _accumulate(blocks, size["s"], size["q"], importance, normalise, residual)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _accumulate(blocks, tokens, others, importance, normalise, residual=True):
    leaves = jax.tree.leaves(blocks)
    batch, dtype = leaves[0].shape[1], relevance_dtype(*leaves)
    streams = {
        "s": start(batch, tokens, others, dtype, like=leaves[0]),
        "q": start(batch, others, tokens, dtype, like=leaves[0]),
    }

    def layer(streams, stages):
        for stage in stages:
            changed = {}
            for pair, maps in stage.items():
                mine, theirs = (streams[name] for name in pair)
                update = _update(maps, importance)
                changed[pair[0]] = (
                    self_attention(mine, *update)
                    if pair[0] == pair[1]
                    else cross_attention(mine, theirs, *update, normalise=normalise)
                )
            streams = streams | changed
        return streams, None

    for block in blocks:
        counts = [x.attn.shape[0] for stage in block for x in stage.values()]
        first, last = _split(block, min(counts))
        streams, _ = jax.lax.scan(layer, streams, first)
        if min(counts) < max(counts):
            streams, _ = layer(streams, last)
    s, q = streams["s"], streams["q"]
    ss, qq = (own(s), own(q)) if residual else (s.moved, q.moved)
    return Maps(ss=ss, sq=s.other, qq=qq, qs=q.other)


def _split(block: Any, count: int) -> tuple[Any, Any]:
    """The first `count` layers of a block, and the one after them without what it lacks."""
    first = jax.tree.map(lambda x: x[:count], block)
    last = [
        {
            pair: jax.tree.map(lambda x: x[-1], maps)
            for pair, maps in stage.items()
            if maps.attn.shape[0] > count
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


def _update(layer: Layers, importance: str | Measure | None) -> tuple[Any, Any, Any]:
    abar = head_mean(layer.attn, layer.grad)
    if importance is None:
        return abar, 1.0, 1.0
    return abar, *layer_weights(layer.before, layer.after, layer.value_grad, importance)


def _sizes(where: str, name: str, cross: Layers) -> tuple[int, int, int, int]:
    """Layers, batch, queries and keys of the cross-attention, which all the rest must fit."""
    shape = np.shape(cross.attn)
    if len(shape) != 5 or not shape[0]:
        raise ValueError(
            f"{where}: {name}: expected maps [layers, batch, heads, query, key] of at least one "
            f"layer, got {shape}"
        )
    return shape[0], shape[1], shape[3], shape[4]


def _checked(
    where: str,
    name: str,
    layers: Layers,
    sizes: tuple[int, int, int],
    counts: tuple[int, ...] = (),
    *,
    values: bool,
) -> Layers:
    """Layers that have the given batch, queries and keys, with their values only if needed."""
    where = f"{where}: {name}"
    attn, grad = prepare(where, {"attn": layers.attn, "grad": layers.grad}, square=False)
    count, batch, _, query, key = attn.shape
    if (batch, query, key) != sizes or (counts and count not in counts):
        wanted = " or ".join(map(str, counts)) if counts else "layers"
        raise ValueError(
            f"{where}: expected maps ({wanted}, {sizes[0]}, heads, {sizes[1]}, {sizes[2]}) to "
            f"fit the cross-attention, got {attn.shape}"
        )
    if not values:
        return Layers(attn, grad)
    missing = [f for f in ("before", "after", "value_grad") if getattr(layers, f) is None]
    if missing:
        raise ValueError(
            f"{where}: weighted accumulation needs {', '.join(missing)}; give it, or leave "
            "importance=None for equal accumulation"
        )
    return Layers(attn, grad, *prepare_values(where, attn.shape, *layers[2:]))
