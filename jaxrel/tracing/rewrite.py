"""Rewrites of a graph that leave what it computes unchanged.

Calls are opened, scans cut, and the factors of products brought into one order.
"""

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.tracing import primitives
from jaxrel.tracing.facts import Facts, active_ins
from jaxrel.tracing.graph import Atom, Graph, Node, Value, build
from jaxrel.tracing.patterns import Late, Varies, late_softmaxes
from jaxrel.tracing.primitives import DIV, SCALES, TAG, TRANSPOSE


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


def associate(graph: Graph, facts: Facts, kept: Collection[Value]) -> Graph:
    """(h * g) * f(g) as h * (g * f(g)): functions of one value are one, in any order of factors.

    `kept` are values that must stay what they are. Without a change the graph itself is returned.
    """
    return _Association(graph, facts, kept).run()


class _Association:
    """One graph whose products are put into order; `roots` as in `facts.Fact`."""

    def __init__(self, graph: Graph, facts: Facts, kept: Collection[Value]):
        self.graph, self.facts, self.kept = graph, facts, kept
        self.users = graph.users()
        self.nodes: list[Node] = []
        self.producers: dict[Value, Node] = {}
        self.roots = {out: facts[out].root for node in graph.nodes for out in node.outs}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            inner = node.bodies if node.is_open else ()
            bodies = tuple(associate(body, self.facts, self.kept) for body in inner)
            if any(map(operator.is_not, bodies, inner)):
                node = dataclasses.replace(node, bodies=bodies)
            found = self._apart(node) if node.name in SCALES else None
            for made in [node] if found is None else self._together(node, *found):
                self.nodes.append(made)
                self.producers.update((out, made) for out in made.outs)
        return _of_nodes(self.graph, self.nodes)

    def _apart(self, node: Node) -> tuple[Value, list[tuple[Node, int]]] | None:
        """The factor that is moved, and the way down to the one it belongs to."""
        active = active_ins(self.facts, node)
        if len(active) != 2 or self.roots[node.outs[0]] is not node.outs[0]:
            return None
        for product, factor in [active] if node.name in DIV else [active, active[::-1]]:
            root = self.roots.get(factor, factor)
            way = self._way(product, root) if factor.shape == node.outs[0].shape else None
            if way is not None:
                return factor, way
        return None

    def _way(self, value: Value, root: Value | None) -> list[tuple[Node, int]] | None:
        """From a product, used once, to its factor that is a function of the root."""
        node = self.producers.get(value)
        alone = len(self.users.get(value, ())) == 1 and value not in self.graph.outs
        if node is None or node.name not in SCALES or not alone or value in self.kept:
            return None
        for i, atom in enumerate(node.ins[:1] if node.name in DIV else node.ins):
            if isinstance(atom, Value) and atom.shape == value.shape:
                if self.roots.get(atom, atom) is root:
                    return [(node, i)]
                deeper = self._way(atom, root)
                if deeper is not None:
                    return [(node, i), *deeper]
        return None

    def _together(self, node: Node, factor: Value, way: list[tuple[Node, int]]) -> list[Node]:
        """The factor multiplied first, then what is on the way, up to the node's own output."""
        last, place = way[-1]
        both = Value(node.outs[0].aval)
        self.roots[both] = self.roots.get(factor, factor)
        old = last.ins[place]
        ins = tuple(factor if atom is factor else old for atom in node.ins)
        made = [dataclasses.replace(node, ins=ins, outs=(both,))]
        for step, i in reversed(way):
            self.nodes.remove(step)
            ins = tuple(both if j == i else atom for j, atom in enumerate(step.ins))
            both = node.outs[0] if step is way[0][0] else step.outs[0]
            made.append(dataclasses.replace(step, ins=ins, outs=(both,)))
        return made


def _of_nodes(graph: Graph, nodes: Sequence[Node]) -> Graph:
    """The graph with these nodes; itself where they are its own."""
    same = len(nodes) == len(graph.nodes) and all(map(operator.is_, nodes, graph.nodes))
    return graph if same else dataclasses.replace(graph, nodes=tuple(nodes))


def divide_first(graph: Graph, varies: Varies | None = None) -> Graph:
    """(exp(s) @ v) / sum(exp(s)) as (exp(s) / sum(exp(s))) @ v, in bodies too.

    `varies` says whether a value depends on the data, as in `patterns.softmaxes`. Without a
    change the graph itself is returned.
    """
    used = graph.users()
    late = {one.last: one for one in late_softmaxes(graph, varies)}
    late = {last: one for last, one in late.items() if _alone(one, used)}
    gone = {node for one in late.values() for node in (one.product, *one.moves)}
    nodes: list[Node] = []
    for node in graph.nodes:
        inner = node.bodies if node.is_open else ()
        bodies = tuple(divide_first(body, varies) for body in inner)
        if node in late:
            nodes += _divided_first(late[node])
        elif any(map(operator.is_not, bodies, inner)):
            nodes.append(dataclasses.replace(node, bodies=bodies))
        elif node not in gone:
            nodes.append(node)
    return _of_nodes(graph, nodes)


def _alone(late: Late, used: dict[Value, list[Node]]) -> bool:
    """Whether the quotient alone reads the product, whose axes the moves put in order at most."""
    chain = [late.product, *late.moves]
    plain = all(
        move.name in TRANSPOSE or (move.name not in TAG and move.ins[0].shape == move.outs[0].shape)
        for move in late.moves
    )
    rank = len(late.product.outs[0].shape)
    sums = _sums_by_key(late) if plain and len(late.sums.shape) == rank else None
    return sums is not None and all(len(used[node.outs[0]]) == 1 for node in chain)


def _product_axes(equation: Any, side: int) -> dict[int, int]:
    """By axis of an operand that a matrix product keeps, the axis of the result that it is."""
    contracted, batched = primitives.contraction(equation)
    free = [
        [a for a in range(len(atom.aval.shape)) if a not in (*contracted[i], *batched[i])]
        for i, atom in enumerate(equation.invars)
    ]
    kept = {axis: place for place, axis in enumerate(batched[side])}
    start = len(batched[side]) + (len(free[0]) if side else 0)
    return kept | {axis: start + i for i, axis in enumerate(free[side])}


def _sums_by_key(late: Late) -> Callable[[Array], Array] | None:
    """From the sums, along the result's axes, to those along the exponentials'; or None."""
    order = tuple(range(len(late.product.outs[0].shape)))
    for move in late.moves:
        if move.name in TRANSPOSE:
            order = tuple(order[axis] for axis in primitives.permutation(move.equation))
    kept = _product_axes(late.product.equation, late.side)
    places = [order.index(axis) for axis in kept.values()]
    others = set(range(len(order))) - set(places)
    if any(late.sums.shape[axis] != 1 for axis in others):
        return None
    exps = late.product.ins[late.side]
    sizes = [late.sums.shape[place] for place in places]
    shape = [1] * len(exps.shape)
    for axis, size in zip(kept, sizes, strict=True):
        shape[axis] = size

    def moved(sums: Array) -> Array:
        rows = jnp.transpose(sums, (*others, *places)).reshape(sizes)
        rows = jnp.transpose(rows, np.argsort(list(kept)).tolist())
        return rows.reshape(shape).astype(exps.aval.dtype)

    return moved


def _divided_first(late: Late) -> list[Node]:
    """The nodes that divide the exponentials, multiply the values and move the product."""
    moved = _sums_by_key(late)
    assert moved is not None
    exps = late.product.ins[late.side]

    def divide(exps, sums):
        return exps / moved(sums)

    quotient = Value(exps.aval)
    nodes = _in_place(divide, (exps, late.sums), quotient, late.last)
    ins = list(late.product.ins)
    ins[late.side] = quotient
    nodes += [dataclasses.replace(late.product, ins=tuple(ins)), *late.moves]
    nodes[-1] = dataclasses.replace(nodes[-1], outs=late.last.outs)
    return nodes


def multiply(graph: Graph) -> Graph:
    """einsum("bc,c->bc", x, w) as x * w, in bodies too: a sum over nothing is a product.

    Without a change the graph itself is returned.
    """
    used = graph.users()
    nodes: list[Node] = []
    gone: set[Node] = set()
    for node in graph.nodes:
        inner = node.bodies if node.is_open else ()
        bodies = tuple(map(multiply, inner))
        if primitives.is_outer(node.equation):
            moves = _transposes(graph, node, used)
            gone.update(moves)
            nodes += _multiplied(node, moves)
        elif any(map(operator.is_not, bodies, inner)):
            nodes.append(dataclasses.replace(node, bodies=bodies))
        elif node not in gone:
            nodes.append(node)
    return _of_nodes(graph, nodes)


def _transposes(graph: Graph, node: Node, used: dict[Value, list[Node]]) -> list[Node]:
    """The transposes that alone read a node's output, one after the other."""
    moves: list[Node] = []
    out = node.outs[0]
    while out not in graph.outs and [user.name in TRANSPOSE for user in used.get(out, ())] == [
        True
    ]:
        moves += used[out]
        out = moves[-1].outs[0]
    return moves


def _multiplied(node: Node, moves: Sequence[Node]) -> list[Node]:
    """The nodes that multiply the operands, each broadcast along the axes of the other."""
    out = moves[-1].outs[0] if moves else node.outs[0]
    order = tuple(range(len(out.shape)))
    for move in moves:
        order = tuple(order[axis] for axis in primitives.permutation(move.equation))

    def along(x, side):
        kept = _product_axes(node.equation, side)
        places = [order.index(kept[axis]) for axis in range(x.ndim)]
        if places != sorted(places):
            x = jnp.transpose(x, np.argsort(places).tolist())
        others = [axis for axis in range(len(order)) if axis not in places]
        return (jnp.expand_dims(x, others) if others else x).astype(out.aval.dtype)

    def product(left, right):
        return along(left, 0) * along(right, 1)

    return _in_place(product, node.ins, out, node)


def _in_place(function: Callable, ins: Sequence[Atom], out: Value, instead: Node) -> list[Node]:
    """The nodes of a function of these inputs, which compute `out` instead of a node."""
    made = build(primitives.make_program(function, *(atom.aval for atom in ins))[0])
    env: dict[Any, Atom] = dict(zip(made.ins, ins, strict=True))
    within = (instead.equation, *instead.callers)
    nodes = [
        dataclasses.replace(node, ins=tuple(env.get(a, a) for a in node.ins), callers=within)
        for node in made.nodes
    ]
    nodes[-1] = dataclasses.replace(nodes[-1], outs=(out,))
    return nodes


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
