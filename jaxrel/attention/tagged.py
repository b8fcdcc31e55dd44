"""Attention that a model names itself: maps with a tag, and the residual sums around them."""

from collections.abc import Iterator
from typing import Any

from jaxrel.attention.residual import Residual
from jaxrel.attention.stacks import Site, Stack, Step
from jaxrel.tracing.graph import Graph, Traced, Value, tag_name
from jaxrel.tracing.primitives import ADD, MOVES


def tagged_stack(traced: Traced, name: str) -> Stack | None:
    """The stack of maps tagged `name`, [batch, heads, query, key] each, or None.

    The residual stream before the attention and the attention's output are the values tagged
    `name/before` and `name/after`; they must be added in the same scan body.
    """
    found = list(_tagged_sites(traced.graph, name, ()))
    return Stack(name, tuple(found)) if found else None


def _tagged_sites(graph: Graph, name: str, place: tuple[Step, ...]) -> Iterator[Site]:
    tags = [(tag_name(node), node) for node in graph.nodes]
    # One map, one residual and one output per layer, in the same order.
    before = [node.outs[0] for tag, node in tags if tag == f"{name}/before"]
    after = [node.outs[0] for tag, node in tags if tag == f"{name}/after"]
    sums = [_sum_of(graph, *pair) for pair in zip(before, after, strict=False)]
    complete = len(before) == len(after) == sum(tag == name for tag, _ in tags)
    residuals = iter(sums if complete else ())
    for number, node in enumerate(graph.nodes):
        if node.is_control:
            for body in node.bodies:
                yield from _tagged_sites(body, name, (*place, Step(number, node)))
        if tag_name(node) != name:
            continue
        rank = len(node.outs[0].shape)
        if rank not in (3, 4):
            raise ValueError(
                f"the value tagged {name!r} at {node.where()} has shape {node.outs[0].shape}; "
                "an attention map is [batch, heads, query, key], or [heads, query, key] for one "
                "example"
            )
        yield Site(
            value=node.outs[0],
            batch=0 if rank == 4 else None,
            heads=(rank - 3,),
            query=rank - 2,
            key=rank - 1,
            where=node.where(),
            place=(*place, Step(number)),
            name=name,
            residual=next(residuals, None),
        )


def _sum_of(graph: Graph, before: Value, after: Value) -> Residual | None:
    """The addition of two tagged values, which may have been moved or retyped in between."""
    producers = graph.producers()

    def leads_back(atom: Any, target: Value) -> bool:
        while isinstance(atom, Value) and atom is not target:
            node = producers.get(atom)
            if node is None or node.name not in MOVES:
                return False
            atom = node.ins[0]
        return atom is target

    for node in graph.nodes:
        if node.name in ADD:
            for x, y in (node.ins, node.ins[::-1]):
                if leads_back(x, before) and leads_back(y, after):
                    return Residual(before, after, node.outs[0])
    return None
