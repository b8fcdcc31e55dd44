"""Rewrites of a graph that leave what it computes unchanged: calls opened, scans cut."""

import dataclasses
from collections.abc import Callable, Collection

from jaxrel.tracing.graph import Atom, Graph, Node, Value


def open_calls(graph: Graph, opens: Callable[[Node], bool]) -> Graph:
    """Put the bodies of the calls that `opens` names in their places, at every depth.

    Meant for `custom_jvp_call` and `custom_vjp_call`: what they compute is kept, the derivative
    written by hand is not.
    """
    nodes: list[Node] = []
    constants = dict(graph.constants)
    env: dict[Value, Atom] = {}

    def read(atom: Atom) -> Atom:
        return env.get(atom, atom) if isinstance(atom, Value) else atom

    def inline(inner: Graph) -> None:
        for node in inner.nodes:
            ins = tuple(map(read, node.ins))
            if opens(node):
                (body,) = node.bodies
                constants.update(body.constants)
                env.update(zip(body.ins, ins, strict=True))
                inline(body)
                env.update(zip(node.outs, map(read, body.outs), strict=True))
            else:
                bodies = tuple(open_calls(body, opens) for body in node.bodies)
                nodes.append(dataclasses.replace(node, ins=ins, bodies=bodies))

    inline(graph)
    return Graph(graph.ins, tuple(nodes), tuple(map(read, graph.outs)), constants)


def cut_scans(graph: Graph, cuts: Callable[[Node], Collection[int]]) -> Graph:
    """Cut scans into segments, so that their iterations can be edited apart.

    `cuts(node)` are the inner bounds (indices along the scanned axis, none to leave the scan
    whole). Every segment gets a copy of the body with values of its own.
    """
    nodes = []
    for node in graph.nodes:
        inner = sorted(set(cuts(node))) if node.scan else []
        bodies = tuple(cut_scans(body, cuts) for body in node.bodies)
        if node.scan and inner:
            bounds = (0, *inner, node.scan.length)
            bodies = tuple(copy_graph(bodies[0]) for _ in bounds[1:])
            nodes.append(dataclasses.replace(node, bodies=bodies, cuts=bounds))
        else:
            nodes.append(dataclasses.replace(node, bodies=bodies))
    return Graph(graph.ins, tuple(nodes), graph.outs, graph.constants)


def copy_graph(graph: Graph) -> Graph:
    """The same program with values and nodes of its own, bodies included."""
    env: dict[Value, Value] = {}

    def new(value: Value) -> Value:
        env[value] = Value(value.aval)
        return env[value]

    def read(atom: Atom) -> Atom:
        return env[atom] if isinstance(atom, Value) else atom

    ins = tuple(map(new, graph.ins))
    constants = {new(value): array for value, array in graph.constants.items()}
    nodes = []
    for node in graph.nodes:
        read_ins = tuple(map(read, node.ins))
        outs = tuple(map(new, node.outs))
        bodies = tuple(map(copy_graph, node.bodies))
        nodes.append(dataclasses.replace(node, ins=read_ins, outs=outs, bodies=bodies))
    return Graph(ins, tuple(nodes), tuple(map(read, graph.outs)), constants)
