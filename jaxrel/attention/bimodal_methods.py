"""All methods for a model of two streams, from the attention maps that it tags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.attention.accumulate import equal, head_mean, row
from jaxrel.attention.baselines import cross_rollout, grad_cam, raw, rollout
from jaxrel.attention.importance import Measure, measure
from jaxrel.attention.maps import TargetToken, matmul
from jaxrel.attention.schedules import Layers, two_streams
from jaxrel.attention.transformation import check_methods
from jaxrel.propagation.composites import attn_lrp
from jaxrel.propagation.lrp import lrp
from jaxrel.tracing.capture import capture_with_grad

TagSchedule = Sequence[Sequence[Sequence[tuple[str, str]]]]
Rows = tuple[Float[Array, "batch tokens"], Float[Array, "batch others"]]

BY_LRP = ("transformer_attribution", "equal_lrp", "partial_lrp")
TWO_STREAM_METHODS = ("equal", "weighted", "raw", "rollout", "grad_cam", *BY_LRP)


def value_and_two_stream_relevance(
    fun: Callable,
    schedule: TagSchedule,
    *,
    method: str | Sequence[str],
    target_token: TargetToken,
    importance: str | Measure = "grad_value",
    rules: Any = None,
) -> Callable:
    """Make a function of two streams return the relevance of both for what is read out.

    One forward and one backward pass give all methods but those that need the relevance of the
    maps by LRP ('transformer_attribution', 'equal_lrp', 'partial_lrp'), which share another.

    'equal' and 'weighted' accumulate (see `two_streams`), 'equal_lrp' with R(A) in place of A.
    'raw', 'grad_cam' and 'partial_lrp' (signed) look at the last attention of stream s to
    itself and to stream q. 'rollout' and 'transformer_attribution' roll out each stream's own
    attention, and join the streams by the last attention from s to q (see `cross_rollout`):
    the first by the maps themselves, the second by max(dA R(A), 0) (Chefer et al. 2021 CVPR).

    Args:
      fun: a JAX function that tags its attention maps, and returns one scalar per example.
      schedule: as `two_streams` takes it, with the maps' tags in the place of `Layers`, and
        pairs of (streams, tag) in the place of mappings.
      method: of `TWO_STREAM_METHODS`, or several.
      target_token: the token of stream s that the scalar is read from, one or one per example.
      importance: the measure of 'weighted'. It needs the tags "<tag>/before" (the residual
        stream) and "<tag>/after" (what attention adds to it).
      rules: for the methods by LRP: see `jaxrel.lrp`; AttnLRP by default.

    Returns:
      A function `(*args) -> (fun(*args), {method: (relevance of s, relevance of q)})`,
      `[batch, tokens]` each; one pair where `method` is one name.

    Raises:
      ValueError: unknown method or measure; (when called) a tag that the function lacks, or,
        for other methods than 'equal', 'weighted' and 'equal_lrp', a schedule in which s does
        not attend to itself and to q, or q not to itself.
    """
    methods = check_methods(method, TWO_STREAM_METHODS)
    used = measure(importance)
    tags = _tags(schedule)
    rules = attn_lrp() if rules is None else rules
    captured = value_and_layers(fun, schedule, values="weighted" in methods)

    def explained(*args):
        out, plain = captured(*args)
        found = lrp(fun, rules, argnums=None, at=tuple(tags))(*args) if _by_lrp(methods) else {}
        found = {tag: _with_layers(tag, x) for tag, x in found.items()}
        # Relevance in the place of the maps: max(dA R(A), 0) instead of max(dA A, 0).
        by_lrp = {tag: Layers(found[tag], plain[tag].grad) for tag in tags} if found else {}

        def accumulated(layers, importance=None):
            blocks = [
                [{pair: layers[tag] for pair, tag in stage} for stage in block]
                for block in schedule
            ]
            return two_streams(blocks, importance=importance, residual=False)

        def rows(name):
            layers = by_lrp if name in BY_LRP else plain
            if name in ("equal", "equal_lrp", "weighted"):
                maps = accumulated(layers, used if name == "weighted" else None)
                of_s, of_q = maps.ss, maps.sq
            else:
                of_s, of_q = _BASELINES[name](*_kinds(schedule, layers))
            return row(of_s, target_token), row(of_q, target_token)

        result = {name: rows(name) for name in methods}
        return out, result[method] if isinstance(method, str) else result

    return explained


def value_and_layers(fun: Callable, schedule: TagSchedule, *, values: bool = True) -> Callable:
    """Make a function of two streams return its attention layers, as `two_streams` takes them.

    One forward and one backward pass.

    Args:
      fun: as in `value_and_two_stream_relevance`.
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


def _by_lrp(methods: Sequence[str]) -> bool:
    return any(name in BY_LRP for name in methods)


def _with_layers(name: str, x: Array) -> Array:
    """[layers, ...]; what is tagged once and outside a scan, as by a single layer, is one."""
    rank = 4 if name.endswith(("/before", "/after")) else 5
    return x if x.ndim == rank else x[None]


def _kinds(schedule: TagSchedule, layers: Mapping[str, Layers]) -> list[list[Layers]]:
    """The single layers of each kind, ss, sq and qq, in the order in which they run."""
    return [_in_order(schedule, layers, kind) for kind in ("ss", "sq", "qq")]


def _in_order(schedule: TagSchedule, layers: Mapping[str, Layers], kind: str) -> list[Layers]:
    found = []
    for block in schedule:
        tags = [tag for stage in block for pair, tag in stage if pair == kind]
        for i in range(max((len(layers[tag].attn) for tag in tags), default=0)):
            there = [layers[tag] for tag in tags if i < len(layers[tag].attn)]
            found += [Layers(one.attn[i : i + 1], one.grad[i : i + 1]) for one in there]
    if not found:
        raise ValueError(f"the schedule has no attention of the kind {kind!r}")
    return found


def _last(method: Callable) -> Callable:
    def relevance(ss: list[Layers], sq: list[Layers], qq: list[Layers]) -> tuple[Array, Array]:
        return method(ss[-1]), method(sq[-1])

    return relevance


def _rollout(ss: list[Layers], sq: list[Layers], qq: list[Layers]) -> tuple[Array, Array]:
    # The streams' numbers of heads may differ between the stages; only their mean is used.
    of_s, cross, of_q = (
        jnp.concatenate([one.attn.mean(axis=2, keepdims=True) for one in kind])
        for kind in (ss, sq[-1:], qq)
    )
    # The transpose in `cross_rollout` goes over all of s's tokens. Those that what is explained
    # does not depend on (padding, the words after it) have no gradient, and are left out.
    reached = (sq[-1].grad != 0).any(axis=(2, 4))[:, :, None, :, None]
    cross = jnp.where(reached, cross, 0)
    return rollout(of_s), cross_rollout(of_s, cross, of_q)


def _attribution(ss: list[Layers], sq: list[Layers], qq: list[Layers]) -> tuple[Array, Array]:
    of_s, of_q = (_equal(kind) for kind in (ss, qq))
    between = head_mean(sq[-1].attn[0], sq[-1].grad[0])
    return of_s, matmul(of_s.mT, matmul(between, of_q))


def _equal(layers: list[Layers]) -> Array:
    means = jnp.stack([head_mean(one.attn[0], one.grad[0])[:, None] for one in layers])
    return equal(means, jnp.ones_like(means))


_BASELINES: dict[str, Callable] = {
    "raw": _last(lambda x: raw(x.attn)),
    "partial_lrp": _last(lambda x: raw(x.attn)),
    # What is hidden has no attention, but a gradient, which must not count in a head's weight.
    "grad_cam": _last(lambda x: grad_cam(x.attn, jnp.where(x.attn > 0, x.grad, 0))),
    "rollout": _rollout,
    "transformer_attribution": _attribution,
}
