"""Accumulation over two streams of tokens, in the order in which a model lets them attend.

A schedule says in which order. `bimodal` (LXMERT) and `encoder_decoder` (DETR, captioners) are
the two usual ones. Stream s holds the target token; q is the other stream.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.attention.accumulate import Layers, Maps, accumulate_blocks
from jaxrel.attention.importance import Measure, measure
from jaxrel.attention.maps import TargetToken, prepare, prepare_values, token_index
from jaxrel.renamed import renamed_keywords

PAIRS = ("ss", "sq", "qq", "qs")
Schedule = Sequence[Sequence[Mapping[str, Layers]]]
# Each attention with its name in error messages; None for attention that a model lacks.
NamedSchedule = Sequence[Sequence[Mapping[str, tuple[str, Layers | None]]]]


class CoAttention(NamedTuple):
    """Layers in which two streams attend to each other, and then each to itself.

    `s_cross` has its queries in stream s and its keys in stream q, `q_cross` the reverse;
    both read the same input. The target token is in stream s: the last layer's changes to stream q
    reach no output, so `q_cross` and `q_self` may lack the last layer.
    """

    s_cross: Layers
    s_self: Layers
    q_cross: Layers
    q_self: Layers


def bimodal_accumulation(
    schedule: Schedule,
    *,
    importance: str | Measure | None = None,
    normalise: bool = True,
    residual: bool = True,
) -> Maps:
    """Relevance in any model of two streams, from the order in which they attend.

    Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability", eq. 5 to 11; weighted,
    our reading of Huang, Jia, Zhang and Zhang 2023: alpha and beta of the query stream multiply
    the old and the added part of both its maps (see `weighted`).

    Args:
      schedule: a sequence of blocks, which run one after the other. A block is a sequence of
        stages; its layers run one after the other, and each goes through all stages. A stage
        is a mapping from a pair, "ss", "qq", "sq" or "qs" (queries of the first letter's
        stream, keys of the second's), to the `Layers` of that attention. All attention of a
        stage reads the streams as they were before it. Attention that no longer reaches
        stream s, in the last layer of a block, may be absent there.
      importance: None for equal accumulation; for weighted accumulation the measure, and
        then every `Layers` holds its token values.
      normalise: whether eq. 10 normalises the streams' own relevance (eq. 8 and 9).
      residual: whether `ss` and `qq` include what the residual branch alone carries. That is
        the relevance of each token for itself (the identity, in equal accumulation), which
        outweighs the rest; without it the target token compares with the preceding tokens.

    Returns:
      The four maps, in float32 (float64 for float64 maps). Read `sq` and `ss` with `row`.

    Raises:
      ValueError: an unknown pair, no attention between the streams (no "sq" or "qs"), shapes
        that do not fit, token values that are missing, an unknown measure, or a value that is
        NaN or infinite (named with its layer; not seen under `jax.jit`).
    """
    where = "bimodal_accumulation"
    for stage in (stage for block in schedule for stage in block):
        if not stage or set(stage) - set(PAIRS) or len({p[0] for p in stage}) < len(stage):
            raise ValueError(
                f"{where}: a stage maps pairs of streams, one for each stream that attends, "
                f"to Layers; the pairs are {', '.join(PAIRS)}; got {', '.join(stage) or 'none'}"
            )
    named = [
        [{pair: (pair, layers) for pair, layers in stage.items()} for stage in block]
        for block in schedule
    ]
    return _accumulate(where, named, PAIRS, importance, normalise, residual)


@renamed_keywords(readout="target_token")
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
    them only stream s is followed. Chefer, Gur and Wolf 2021, eq. 5 to 11; weighted as in
    `bimodal_accumulation`.

    Args:
      s: the self-attention layers of the stream of the target token; None if it has none.
      q: the same for the other stream.
      cross: the layers of co-attention, at least one.
      importance: as in `bimodal_accumulation`.
      normalise: as in `bimodal_accumulation`.
      target_token: when given, this token of s (one index, or one per example) gets relevance 0
        for itself, as in the reference. None leaves the map as it is.

    Returns:
      The four maps, as in `bimodal_accumulation`.

    Raises:
      ValueError: as in `bimodal_accumulation`; also a target token that does not exist.
      TypeError: the target token is not an integer.
    """
    count = len(cross.s_cross.attn)
    q_cross, q_self = (_without_layer(x, count) for x in (cross.q_cross, cross.q_self))
    schedule: NamedSchedule = (
        ({"ss": ("s", s)},),
        ({"qq": ("q", q)},),
        (
            {"sq": ("cross.s_cross", cross.s_cross), "qs": ("cross.q_cross", q_cross)},
            {"ss": ("cross.s_self", cross.s_self), "qq": ("cross.q_self", q_self)},
        ),
    )
    maps = _accumulate("bimodal", schedule, ("qs", "qq"), importance, normalise)
    if target_token is None:
        return maps
    batch, tokens, _ = maps.ss.shape
    token = token_index(target_token, batch=batch, tokens=tokens)
    chosen = token[:, None] == jnp.arange(tokens)
    return maps._replace(ss=jnp.where(chosen[:, :, None] & chosen[:, None], 0, maps.ss))


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
    and Wolf 2021, eq. 5 to 10; weighted as in `bimodal_accumulation`. A row of the normaliser
    that is 0 stays 0; the reference's code drops the whole layer's addition in that case.

    Args:
      encoder: the encoder's self-attention layers; None if it has none.
      decoder: the decoder's self-attention layers.
      cross: the decoder's cross-attention layers, one for each of them.
      importance: as in `bimodal_accumulation`.
      normalise: as in `bimodal_accumulation`.

    Returns:
      The four maps, in float32 (float64 for float64 maps): `sq` the relevance of the
      encoder's tokens for the decoder's, `ss` of the decoder's own, `qq` of the encoder's
      own; `qs` is 0. For a causal captioner read the row of the position that predicts the
      word: `sq` for the image, `ss` for the preceding tokens.

    Raises:
      ValueError: as in `bimodal_accumulation`.
    """
    schedule: NamedSchedule = (
        ({"qq": ("encoder", encoder)},),
        ({"ss": ("decoder", decoder)}, {"sq": ("cross", cross)}),
    )
    return _accumulate("encoder_decoder", schedule, (), importance, normalise)


def _without_layer(layers: Layers, count: int) -> Layers:
    """Layers without their last where there are `count` of them."""
    return jax.tree.map(lambda x: x[:-1], layers) if len(layers.attn) == count else layers


def _accumulate(
    where: str,
    schedule: NamedSchedule,
    shorter: Sequence[str],
    importance: str | Measure | None,
    normalise: bool,
    residual: bool = True,
) -> Maps:
    """Check a schedule, in which the pairs `shorter` may lack a block's last layer, and run it."""
    importance = importance if importance is None else measure(importance)
    given: list[list[dict[str, tuple[str, Layers]]]] = [
        [{p: (name, x) for p, (name, x) in stage.items() if x is not None} for stage in block]
        for block in schedule
    ]
    given = [block for block in given if any(block)]
    batch, tokens = _sizes(where, given)

    def checked(pair: str, name: str, layers: Layers, counts: Sequence[int]) -> Layers:
        sizes = (batch, tokens[pair[0]], tokens[pair[1]])
        return _checked(f"{where}: {name}", layers, sizes, counts, importance is not None)

    blocks = []
    for block in given:
        lengths = [len(layers.attn) for stage in block for _, layers in stage.values()]
        count = max(lengths)
        # What is alone in its block may have any number of layers.
        full, short = ((count,), (count, count - 1)) if len(lengths) > 1 else ((), ())
        blocks.append(
            [
                {p: checked(p, *x, short if p in shorter else full) for p, x in stage.items()}
                for stage in block
            ]
        )
    return accumulate_blocks(blocks, importance=importance, normalise=normalise, residual=residual)


def _sizes(where: str, blocks: Any) -> tuple[int, dict[str, int]]:
    """The batch and each stream's tokens, from the first cross-attention; the rest must fit."""
    pairs = (item for block in blocks for stage in block for item in stage.items())
    for (query, key), (name, layers) in pairs:
        if query != key:
            shape = np.shape(layers.attn)
            if len(shape) != 5 or not shape[0]:
                raise ValueError(
                    f"{where}: {name}: expected maps [layers, batch, heads, query, key] of at "
                    f"least one layer, got {shape}"
                )
            return shape[1], {query: shape[3], key: shape[4]}
    raise ValueError(f"{where}: no stream attends to the other; use equal or weighted")


def _checked(
    where: str,
    layers: Layers,
    sizes: tuple[int, int, int],
    counts: Sequence[int],
    values: bool,
) -> Layers:
    """Layers that have the given batch, queries and keys, with their values only if needed."""
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
    named = dict(zip(Layers._fields[2:], layers[2:], strict=True))
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise ValueError(
            f"{where}: weighted accumulation needs {', '.join(missing)}; give it, or leave "
            "importance=None for equal accumulation"
        )
    return Layers(attn, grad, *prepare_values(where, attn.shape, named))
