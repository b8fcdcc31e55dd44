"""The relevance of attention maps themselves: LRP from the output, read at the maps."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from jaxrel.propagation.assignment import Prepared, prepare
from jaxrel.propagation.composites import as_composite
from jaxrel.tracing.capture import gather, tap_names, taps_with_grad
from jaxrel.tracing.facts import Fact
from jaxrel.tracing.flow import dependents, looked_up
from jaxrel.tracing.graph import Graph, Node, Traced, Value
from jaxrel.tracing.sharding import shaped_like, zeros


def lrp_of_maps(
    traced: Traced,
    taps: Mapping[Value, str],
    *,
    rules: Any,
    data: Sequence[Value],
    paths: Sequence[str],
) -> dict[str, Any]:
    """R(A) = A * c at each tapped map, where c is the cotangent that the rules of LRP give.

    Args:
      traced: the call.
      taps: names by attention map.
      rules: a composite, or what makes one.
      data: the inputs that are explained; of integer inputs (tokens), the embeddings they select.
      paths: the name of each input, for the rules.

    Returns:
      By name, the relevance of the map, stacked over scans.

    Raises:
      NotImplementedError: an operation without a rule, or rules that differ between the layers
        of a scan (those give every layer maps of its own).
    """
    graph = traced.graph
    explained = {value for value in data if jnp.issubdtype(value.aval.dtype, jnp.floating)}
    ins = [
        Fact(active=True, fresh=True) if value in explained else Fact(paths=frozenset({path}))
        for value, path in zip(graph.ins, paths, strict=True)
    ]
    known = dependents(graph, [value for value in data if value not in explained])
    prepared = prepare(
        graph,
        as_composite(rules),
        ins,
        tags=lambda graph: [("tokens", row) for row in looked_up(graph, known)],
        whole=taps,
    )
    there = {out for node in prepared.graph.walk() for out in node.outs}
    if not set(taps) <= there:
        raise NotImplementedError(
            "attention.relevance: the rules cut the scan over layers (first() or layer() in the "
            "composite), and the maps' relevance is read from the whole scan; use rules that are "
            "the same for all layers"
        )
    return _relevance(traced, prepared, taps)


def lrp_from_maps(
    traced: Traced, taps: Mapping[Value, str], *, rules: Any, paths: Sequence[str]
) -> dict[str, Any]:
    """The same where the maps, and not the data, are explained, as if each were tagged.

    Raises:
      NotImplementedError: an operation without a rule.
    """
    graph = traced.graph
    names = {_key(node, i): taps[v] for node, i, v in _outs(graph) if v in taps}

    def tags(graph: Graph) -> list[tuple[str, Value]]:
        # Of a scan that was cut, every segment has a map of its own.
        found = ((names.get(_key(node, i)), value) for node, i, value in _outs(graph))
        return [(name, value) for name, value in found if name is not None]

    ins = [Fact(paths=frozenset({path})) for path in paths]
    prepared = prepare(graph, as_composite(rules), ins, tags=tags)
    tagged = tags(prepared.graph)
    found = _relevance(traced, prepared, tap_names(tagged))
    return gather(tagged, found)


def _relevance(traced: Traced, prepared: Prepared, taps: Mapping[Value, str]) -> dict[str, Any]:
    channels = tuple(zeros(shaped_like(value.aval)) for value in prepared.explained)
    ruled = dataclasses.replace(traced, graph=prepared.graph, args=(*traced.args, *channels))
    _, values, c = taps_with_grad(ruled, taps, "attention.relevance", prepared.steps)
    return {name: values[name] * c[name] for name in taps.values()}


def _outs(graph: Graph) -> Iterator[tuple[Node, int, Value]]:
    for node in graph.walk():
        for number, value in enumerate(node.outs):
            yield node, number, value


def _key(node: Node, number: int) -> tuple[int, ...]:
    """The same for an operation and its copies, in the segments of a scan."""
    return id(node.equation), *map(id, node.callers), number
