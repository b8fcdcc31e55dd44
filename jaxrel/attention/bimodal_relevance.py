"""Relevance of a function of two streams of tokens, whose attention is found or tagged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.accumulate import Layers, equal
from jaxrel.attention.baselines import cross_rollout, rollout
from jaxrel.attention.bimodal_schedules import bimodal_accumulation
from jaxrel.attention.discovery import data_values, find_sites, trace_attention
from jaxrel.attention.followed import of_streams
from jaxrel.attention.importance import Measure, measure
from jaxrel.attention.lrp_of_maps import lrp_from_maps
from jaxrel.attention.maps import TargetToken, head_mean, matmul, row
from jaxrel.attention.methods import BIMODAL_METHODS, TABLE, Method, check_methods
from jaxrel.attention.stacks import Site
from jaxrel.attention.streams import find_streams, layers_of, maps_of
from jaxrel.propagation.composites import attn_lrp
from jaxrel.propagation.lrp import lrp
from jaxrel.renamed import renamed_keywords
from jaxrel.tracing.capture import capture_with_grad
from jaxrel.tracing.pullback import check_output, leaf_paths

TagSchedule = Sequence[Sequence[Sequence[tuple[str, str]]]]
Rows = tuple[Float[Array, "batch tokens"], Float[Array, "batch others"]]


@renamed_keywords(readout="target_token")
def value_and_bimodal_relevance(
    fun: Callable,
    schedule: TagSchedule | None = None,
    *,
    method: str | Sequence[str],
    target_token: TargetToken,
    importance: str | Measure = "grad_value",
    rules: Any = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Make a function of two streams return the relevance of both for the target token.

    One forward and one backward pass give all methods but those that need the relevance of the
    maps by LRP ('transformer_attribution', 'equal_lrp', 'partial_lrp'), which share another.

    'equal' and 'weighted' accumulate (see `bimodal_accumulation`), 'equal_lrp' with R(A) in
    place of A. 'raw', 'grad_cam' and 'partial_lrp' (signed) look at the last attention of
    stream s to itself and to stream q. 'rollout' and 'transformer_attribution' roll out each
    stream's own attention, and join the streams by the last attention from s to q (see
    `cross_rollout`): the first by the maps themselves, the second by max(dA R(A), 0) (Chefer et
    al. 2021 CVPR). `methods.TABLE` names the sources.

    The model is not changed: its streams are told apart by what their tokens are, and the order in
    which they attend by what depends on what (see `attention.streams`). Stream s is the one that
    the output is read from, as the decoder's tokens or queries; q is the other. A `schedule` says
    the same for a function that tags its maps.

    Args:
      fun: a JAX function that returns one scalar per example.
      schedule: None to find the streams; else as `bimodal_accumulation` takes it, with the maps'
        tags in the place of `Layers`, and pairs of (streams, tag) in the place of mappings.
      method: one of `BIMODAL_METHODS`, or several.
      target_token: the token of stream s that the scalar is read from, one index or one per
        example; or its weights, as in `row`.
      importance: the measure of 'weighted'. It needs the tags "<tag>/before" (the residual
        stream) and "<tag>/after" (what attention adds to it).
      rules: for the methods by LRP: see `jaxrel.lrp`; AttnLRP by default.
      argnums: without a schedule, which arguments hold the data; see `attention.relevance`.

    Returns:
      A function `(*args) -> (fun(*args), {method: (relevance of s, relevance of q)})`,
      `[batch, tokens]` each, float32 (float64 for float64 maps); one pair where `method` is one
      name.

    Raises:
      ValueError: unknown method or measure; (when called) a tag that the function lacks, or,
        for other methods than 'equal', 'weighted' and 'equal_lrp', a schedule in which s does
        not attend to itself and to q; no two streams, or an output that is read from both.
      NotImplementedError: (when called) without a schedule, attention that is not recognised, or
        an order that a schedule cannot say.
    """
    return _explained(fun, schedule, method, target_token, importance, rules, argnums, False)


def covered_bimodal_relevance(
    fun: Callable,
    schedule: TagSchedule | None = None,
    *,
    method: str | Sequence[str],
    target_token: TargetToken,
    importance: str | Measure = "grad_value",
    rules: Any = None,
    argnums: int | Sequence[int] | None = None,
) -> Callable:
    """Like `value_and_bimodal_relevance`, with each method's coverage as a third result.

    With a schedule, all attention that structure tells counts, tagged or not.
    """
    return _explained(fun, schedule, method, target_token, importance, rules, argnums, True)


def _explained(
    fun: Callable,
    schedule: TagSchedule | None,
    method: str | Sequence[str],
    target_token: TargetToken,
    importance: str | Measure,
    rules: Any,
    argnums: Any,
    covered: bool,
) -> Callable:
    methods = check_methods(method, BIMODAL_METHODS)
    used = measure(importance)
    rules = attn_lrp() if rules is None else rules
    needs_lrp = any(TABLE[name].by_lrp for name in methods)
    if schedule is None:
        layers_of_call = _found(fun, argnums, "weighted" in methods, needs_lrp, rules)
    else:
        layers_of_call = _tagged(fun, schedule, "weighted" in methods, needs_lrp, rules)

    def explained(*args):
        out, order, plain, maps = layers_of_call(*args)
        # Relevance in the place of the maps: max(dA R(A), 0) instead of max(dA A, 0).
        by_lrp = {name: Layers(relevance, plain[name].grad) for name, relevance in maps.items()}

        def rows(name):
            layers = by_lrp if TABLE[name].by_lrp else plain
            return tuple(row(x, target_token) for x in _matrices(name, order, layers, used))

        result = {name: rows(name) for name in methods}
        found = result[method] if isinstance(method, str) else result
        if not covered:
            return out, found
        others = () if schedule is None else _untagged(fun, args, _tags(schedule))
        kinds = _kinds(order, plain)
        return out, found, {name: of_streams(TABLE[name], kinds, others) for name in methods}

    return explained


def _kinds(schedule: TagSchedule, layers: Mapping[str, Layers]) -> list[str]:
    """The kind of every single layer."""
    pairs = [pair for block in schedule for stage in block for pair in stage]
    return [kind for kind, tag in pairs for _ in range(len(layers[tag].attn))]


def _tagged(
    fun: Callable, schedule: TagSchedule, values: bool, needs_lrp: bool, rules: Any
) -> Callable:
    """By tags: the output, the schedule, layers by name, and the relevance of maps by name."""
    tags = _tags(schedule)
    captured = value_and_layers(fun, schedule, values=values)

    def layers_of_call(*args):
        out, plain = captured(*args)
        found = {}
        if needs_lrp:
            found = lrp(fun, rules, argnums=None, at=tuple(tags))(*args)
        return out, schedule, plain, {tag: _with_layers(tag, x) for tag, x in found.items()}

    return layers_of_call


def _found(fun: Callable, argnums: Any, values: bool, needs_lrp: bool, rules: Any) -> Callable:
    """The same, for a function whose streams are found."""

    def layers_of_call(*args):
        traced = trace_attention(fun, *args)
        check_output("attention.value_and_bimodal_relevance", traced)
        streams = find_streams(traced, args, argnums)
        out, plain = layers_of(traced, streams, values=values)
        maps: dict[str, Any] = {}
        if needs_lrp:
            names = {site.value: str(i) for i, site in enumerate(streams.sites)}
            paths = [path for _, path in leaf_paths(fun, args)]
            found = lrp_from_maps(traced, names, rules=rules, paths=paths)
            maps = maps_of(streams, found, names)
        return out, streams.schedule, plain, maps

    return layers_of_call


def _untagged(fun: Callable, args: tuple, tags: Sequence[str]) -> list[Site] | None:
    """The attention of a function that has none of the tags; None if not all is recognised."""
    traced = trace_attention(fun, *args)
    try:
        found = find_sites(traced, data_values(traced, args, None))
    except (NotImplementedError, ValueError):
        return None
    return None if found.hidden else [site for site in found.sites if site.name not in tags]


def value_and_layers(fun: Callable, schedule: TagSchedule, *, values: bool = True) -> Callable:
    """Make a function of two streams return its attention layers, as schedules hold them.

    One forward and one backward pass.

    Args:
      fun: as in `value_and_bimodal_relevance`.
      schedule: as there.
      values: whether to return the token values too, which weighted accumulation needs, and
        which need the tags "<tag>/before" and "<tag>/after".

    Returns:
      A function `(*args) -> (fun(*args), {tag: Layers})`.

    Raises:
      ValueError: (when called) a tag that the function lacks.
    """
    tags = _tags(schedule)
    extra = [f"{tag}/{end}" for tag in tags for end in ("before", "after")]

    def captured(*args):
        out, *both = capture_with_grad(fun, [*tags, *(extra if values else ())])(*args)
        found, grads = ({name: _with_layers(name, x) for name, x in d.items()} for d in both)

        def layers(tag):
            if not values:
                return Layers(found[tag], grads[tag])
            # What attention adds is used in the sum alone, so its gradient is the sum's.
            before, after = found[f"{tag}/before"], found[f"{tag}/after"]
            return Layers(found[tag], grads[tag], before, after, grads[f"{tag}/after"])

        return out, {tag: layers(tag) for tag in tags}

    return captured


def _tags(schedule: TagSchedule) -> list[str]:
    return [tag for block in schedule for stage in block for _, tag in stage]


def _with_layers(name: str, x: Array) -> Array:
    """A tagged value as [layers, ...]; one that is tagged outside a scan is a single layer."""
    rank = 4 if name.endswith(("/before", "/after")) else 5
    return x if x.ndim == rank else x[None]


def _matrices(
    name: str, schedule: TagSchedule, layers: Mapping[str, Layers], importance: Measure
) -> tuple[Array, Array]:
    """The relevance of s's tokens and of q's for s's tokens."""
    if name in ("equal", "weighted", "equal_lrp"):
        blocks = [
            [{pair: layers[tag] for pair, tag in stage} for stage in block] for block in schedule
        ]
        measured = importance if name == "weighted" else None
        maps = bimodal_accumulation(blocks, importance=measured, residual=False)
        return maps.ss, maps.sq
    ss, sq = (_in_order(schedule, layers, kind) for kind in ("ss", "sq"))
    if TABLE[name].layers == "last":
        return _of_layer(TABLE[name], ss[-1]), _of_layer(TABLE[name], sq[-1])
    qq = _in_order(schedule, layers, "qq") if "qq" in _pairs(schedule) else _nothing(sq[-1])
    return _rollout(ss, sq, qq) if name == "rollout" else _attribution(ss, sq, qq)


def _pairs(schedule: TagSchedule) -> set[str]:
    return {pair for block in schedule for stage in block for pair, _ in stage}


def _nothing(cross: Layers) -> list[Layers]:
    """A layer in which every token of q attends to itself alone: of a stream without attention."""
    eye = jnp.eye(cross.attn.shape[-1], dtype=cross.attn.dtype)
    attn = jnp.broadcast_to(eye, (*cross.attn.shape[:2], 1, *eye.shape))
    return [Layers(attn, jnp.zeros_like(attn))]


def _in_order(schedule: TagSchedule, layers: Mapping[str, Layers], kind: str) -> list[Layers]:
    """The single layers of one kind, ss, sq or qq, in the order in which they run."""
    found = []
    for block in schedule:
        tags = [tag for stage in block for pair, tag in stage if pair == kind]
        for i in range(max((len(layers[tag].attn) for tag in tags), default=0)):
            there = [layers[tag] for tag in tags if i < len(layers[tag].attn)]
            found += [Layers(one.attn[i : i + 1], one.grad[i : i + 1]) for one in there]
    if not found:
        raise ValueError(f"the schedule has no attention of the kind {kind!r}")
    return found


def _of_layer(method: Method, layer: Layers) -> Array:
    # A masked key has no attention but has a gradient, which must not count in a head's weight.
    grad = jnp.where(layer.attn > 0, layer.grad, 0)
    return method.relevance_matrix(layer.attn, grad, {})


def _rollout(ss: list[Layers], sq: list[Layers], qq: list[Layers]) -> tuple[Array, Array]:
    # The number of heads may differ between stages; only the mean over heads is used.
    of_s, cross, of_q = (
        jnp.concatenate([one.attn.mean(axis=2, keepdims=True) for one in kind])
        for kind in (ss, sq[-1:], qq)
    )
    # The transpose in `cross_rollout` sums over all tokens of s. Those that the explained scalar
    # does not depend on (padding, later tokens) have no gradient, and are left out.
    reached = (sq[-1].grad != 0).any(axis=(2, 4))[:, :, None, :, None]
    cross = jnp.where(reached, cross, 0)
    return rollout(of_s), cross_rollout(of_s, cross, of_q)


def _attribution(ss: list[Layers], sq: list[Layers], qq: list[Layers]) -> tuple[Array, Array]:
    of_s, of_q = (_by_itself(kind) for kind in (ss, qq))
    between = head_mean(sq[-1].attn[0], sq[-1].grad[0])
    return of_s, matmul(of_s.mT, matmul(between, of_q))


def _by_itself(layers: list[Layers]) -> Array:
    """Equal accumulation of one stream, whose number of heads may differ between stages."""
    means = jnp.stack([head_mean(one.attn[0], one.grad[0])[:, None] for one in layers])
    return equal(means, jnp.ones_like(means))
