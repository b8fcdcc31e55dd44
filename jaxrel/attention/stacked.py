"""Relevance from stacked maps: all maps and gradients of all layers, and every method from them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.attention.choice import choose_stacks
from jaxrel.attention.discovery import Site, Stack, find_stacks, trace_attention
from jaxrel.attention.encoder_methods import PROJECTIONS
from jaxrel.attention.maps import as_indices, is_mask, only, row
from jaxrel.attention.methods import TABLE, Method
from jaxrel.attention.pooling import pooled_row
from jaxrel.attention.reweighing import reweighed, weights_of_layers
from jaxrel.attention.token_changes import followed_by
from jaxrel.tracing.capture import find_tags, gather, tap_names, taps_with_grad
from jaxrel.tracing.graph import Traced, Value, tag_name


@dataclasses.dataclass(frozen=True)
class How:
    """What is asked of stacked maps: the arguments of `attention.relevance` of these names."""

    methods: tuple[str, ...]
    layers: Any = None
    heads: Any = None
    layer_weights: Any = None
    importance: Any = "grad_value"


def stacked_relevance(
    traced: Traced,
    stacks: Sequence[Stack],
    target_tokens: Mapping[str, Any],
    sinks: Mapping[str, Any],
    how: How,
    *,
    by_lrp: Callable | None = None,
    by_layer: Callable | None = None,
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Every method's rows or matrices.

    Args:
      traced: the call.
      stacks: the stacks that are explained.
      target_tokens: by stack, the token of each example; None for whole matrices.
      sinks: by stack, as `reweighing.sink_tokens` returns them.
      how: what is asked.
      by_lrp: maps taps to the relevance of the maps; None where no method needs it.
      by_layer: maps stacks to the gradients of layer scores, by stack; None as well.

    Returns:
      The function's value, and {method: {stack: relevance}}.
    """
    rows = [TABLE[name] for name in how.methods]
    needs = {need for method in rows for need in method.needs}
    sites = [site for stack in stacks for site in stack.sites]
    taps: dict[Any, str] = {}
    for what in ("value", "before", "after", "total") if "values" in needs else ("value",):
        for site in sites:
            # One value may serve twice: a stream is often the sum of the layer before.
            taps.setdefault(_value(site, what), f"{len(taps)}:{what}")
    for pooled in (one for one in target_tokens.values() if isinstance(one, Site)):
        taps.setdefault(pooled.value, f"{len(taps)}:value")
    tagged = _projections(traced, stacks) if "projections" in needs else []
    out, values, grads = taps_with_grad(
        traced, {**taps, **tap_names(tagged)}, "attention.relevance"
    )
    maps = {"maps": values}
    if by_lrp is not None:
        names = {value: name for value, name in taps.items() if name.endswith(":value")}
        maps["LRP"] = by_lrp(names)
    projections = tuple(gather(tagged, found) for found in (values, grads))
    of_layers = {} if by_layer is None else by_layer(stacks)
    result: dict[str, dict[str, Any]] = {name: {} for name in how.methods}
    for stack in stacks:
        given: dict[str, Any] = {"importance": how.importance}
        if "values" in needs:
            given |= _token_values(stack, taps, values, grads)
        if "projections" in needs:
            given |= _by_projection(stack, *projections)
        weights = weights_of_layers(how.layer_weights, stack)
        for method in rows:
            if "layer scores" in method.needs:
                own = of_layers[stack.name]
            else:
                own = _layers(stack, taps, maps["LRP" if method.by_lrp else "maps"], "value")
            own = reweighed(own, sinks[stack.name], weights)
            chosen = {what: _of_stack(getattr(how, what), stack) for what in ("layers", "heads")}
            grad = _layers(stack, taps, grads, "value")
            matrix = functools.partial(_matrix, method, own, grad, given, chosen)
            index = target_tokens[stack.name]
            if isinstance(index, Site):
                read = maps["LRP" if method.by_lrp else "maps"]
                pooling, by_map = (index.standard(x[taps[index.value]]) for x in (read, grads))
                relevance = pooled_row(method, matrix, pooling, by_map, last=how.layers is None)
            else:
                relevance = matrix() if index is None else row(matrix(), index)
            result[method.name][stack.name] = relevance
    return out, result


def layer_gradients(
    layer_scores: Callable, args: tuple, argnums: Any, stacks: Iterable[Stack]
) -> dict[str, Array]:
    """The gradients of layer scores with respect to the maps, by stack.

    Args:
      layer_scores: as in `attention.relevance`.
      args: its arguments.
      argnums: which hold the data.
      stacks: the stacks of the function that is explained.

    Raises:
      ValueError: the function has no stack of that name, layers and sizes.
    """
    traced = trace_attention(layer_scores, *args)
    wanted = {stack.name: stack for stack in stacks}
    own = choose_stacks(traced, find_stacks(traced, args, argnums), list(wanted), ())
    for stack in own:
        there = wanted[stack.name]
        if (stack.layers, stack.sites[0].shape) != (there.layers, there.sites[0].shape):
            raise ValueError(
                f"attention.relevance: layer_scores has {stack}, and the function that is "
                f"explained {there}; both must run the same layers on the same examples"
            )
    sites = [site for stack in own for site in stack.sites]
    taps = {site.value: f"{i}:value" for i, site in enumerate(sites)}
    _, _, grads = taps_with_grad(traced, taps, "attention.relevance")
    return {stack.name: _layers(stack, taps, grads, "value") for stack in own}


def _token_values(stack: Stack, taps: Mapping, values: Mapping, grads: Mapping) -> dict[str, Array]:
    """The token values around each layer's residual sum."""
    before = _layers(stack, taps, values, "before")
    return {
        "before": before,
        "after": _layers(stack, taps, values, "after"),
        "value_grad": _layers(stack, taps, grads, "total"),
        "following": followed_by(before),
    }


def _projections(traced: Traced, stacks: Iterable[Stack]) -> list[tuple[str, Value]]:
    """The tagged queries, keys, values and mixed values of stacks."""
    names = [f"{stack.name}/{end}" for stack in stacks for end in PROJECTIONS]
    known = {tag_name(node) for node in traced.graph.walk()}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            "attention.relevance: method 'grad_eclip' reads the queries, keys and values of each "
            "layer, and the values as its attention mixes them, [batch, tokens, heads, features] "
            f"each; tag them with jaxrel.tag(x, name). Nothing is tagged {', '.join(missing)}"
        )
    return find_tags(traced.graph, names, "attention.relevance")


def _by_projection(stack: Stack, values: Mapping, grads: Mapping) -> dict[str, Array]:
    def stacked(found, end):
        x = found[f"{stack.name}/{end}"]
        return x if x.ndim == 5 else x[None]

    found = {end: stacked(values, end) for end in PROJECTIONS[:-1]}
    return found | {"mixed_grad": stacked(grads, PROJECTIONS[-1])}


def _of_stack(chosen: Any, stack: Stack) -> Any:
    return chosen[stack.name] if isinstance(chosen, Mapping) else chosen


def _matrix(method: Method, maps: Any, grad: Any, given: Mapping, chosen: Mapping) -> Any:
    """A method's relevance matrix, of layers and heads that are named or masked."""
    masks = {what: x for what, x in chosen.items() if is_mask(x)}
    named = {what: as_indices(x, what) for what, x in chosen.items() if what not in masks}
    values = {name: given[name] for name in method.takes if name != "importance"}
    counts = None
    if masks:
        kept, counts = only({"attn": maps, "grad": grad, **values}, **masks)
        maps, grad = kept.pop("attn"), kept.pop("grad")
        values = kept
    if counts is not None and not method.residual:
        # Without a residual stream a layer of zeros would take all; the identity changes nothing.
        counts = counts[:, None, None, None, None]
        maps = jnp.where(counts, maps, jnp.eye(maps.shape[-1], dtype=maps.dtype))
        grad = jnp.where(counts, grad, 1)
    if counts is not None and method.averages:
        maps = maps * (len(counts) / jnp.maximum(counts.sum(), 1)).astype(maps.dtype)
    options = {"importance": given["importance"]} if "importance" in method.takes else {}
    return method.relevance_matrix(maps, grad, {**values, **options}, **named)


def _value(site: Site, what: str) -> Any:
    return site.value if what == "value" else getattr(site.residual, what)


def _layers(stack: Stack, taps: Mapping, found: Mapping, what: str) -> Any:
    """Tapped values of a stack as [layers, batch, ...], in order of execution."""
    values, stages = [], []
    for site in stack.sites:
        value = _value(site, what)
        x = found[taps[value]]
        values.append(site.stacked(x) if what == "value" else site.stacked_values(x))
        stages += list(site.stages())
    stacked = jnp.concatenate(values)
    order = sorted(range(len(stages)), key=stages.__getitem__)
    return stacked if order == list(range(len(order))) else stacked[np.asarray(order)]
