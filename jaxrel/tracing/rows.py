"""Rows of an attention map, some at a time: what of a graph computes them, and from what.

A map [..., query, key] that a product weighs values by is not needed whole: its rows are computed
from their queries and from all keys. `find_rows` goes back from the product to the values that
have only one of the two axes, and `Rows.compute` evaluates what lies between for a block of
queries after the other, again in the backward pass. Masks and biases made of positions are
computed block by block too, wherever in the program they stand.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from jaxrel.tracing import primitives
from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.facts import is_elementwise
from jaxrel.tracing.flow import Backward, operands
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value
from jaxrel.tracing.primitives import (
    BROADCAST,
    COMPARISONS,
    DOT,
    ELEMENTWISE,
    IOTA,
    RESHAPES,
    STOP_GRADIENT,
    TAG,
    TRANSPOSE,
)

_IN_PLACE = ELEMENTWISE | COMPARISONS | TAG | STOP_GRADIENT


class NotByRows(Exception):
    """A map's rows cannot be computed apart; the message says why."""


class Operand(NamedTuple):
    """A value that rows are computed from.

    Attributes:
      atom: the value, of the graph or of one around it.
      axis: which of its axes is the queries'; None if it is the same for all.
      whole: whether it has the keys' axis too, so that it is cut where it is read.
    """

    atom: Atom
    axis: int | None
    whole: bool


class Applied(NamedTuple):
    """An operation on rows: what it reads and computes, each by value and queries' axis."""

    node: Node
    ins: tuple[tuple[Atom, int | None], ...]
    out: tuple[Value, int]
    step: Step | None


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What computes the product of a map with values, row by row of the map.

    Attributes:
      ins: what is read.
      nodes: the operations in order, the product last.
      map: the map and its queries' axis.
      length: how many queries there are.
    """

    ins: tuple[Operand, ...]
    nodes: tuple[Applied, ...]
    map: tuple[Value, int]
    length: int

    @property
    def product(self) -> Node:
        """The product of the map with the values."""
        return self.nodes[-1].node

    def compute(
        self, values: Sequence, block: int, visit: Callable = lambda x: (None, x)
    ) -> tuple[Any, Any]:
        """The product, and what was seen of the map.

        Args:
          values: one for each of `ins`.
          block: how many queries at a time.
          visit: given some rows of the map, `visit(rows) -> (seen, rows)`. `seen` is arrays whose
            last axis is the queries', or None.

        Returns:
          The product and `seen`, of all queries.
        """
        block = min(block, self.length)
        count, rest = divmod(self.length, block)
        split = [one.axis is not None and not one.whole for one in self.ins]
        fixed = [x for x, apart in zip(values, split, strict=True) if not apart]
        pairs = zip(self.ins, values, strict=True)
        cut = [(x, one.axis) for one, x in pairs if one.axis is not None and not one.whole]

        def part(size: int, prevent_cse: bool) -> Callable:
            def run(start, some, fixed):
                some, fixed = iter(some), iter(fixed)
                given = [next(some) if apart else next(fixed) for apart in split]
                return self._run(given, start, size, visit)

            return jax.checkpoint(run, prevent_cse=prevent_cse)

        def step(carry, x):
            return carry, part(block, False)(*x, fixed)

        blocks = [_split(x, axis, count, block) for x, axis in cut]
        starts = jnp.arange(0, count * block, block)
        _, (out, seen) = lax.scan(step, None, (starts, blocks))
        axis = self.nodes[-1].out[1]
        out, seen = _join(out, axis), jax.tree.map(lambda x: _join(x, x.ndim - 2), seen)
        if rest:
            end = [lax.slice_in_dim(x, count * block, None, axis=axis) for x, axis in cut]
            last = part(rest, True)(jnp.asarray(count * block, starts.dtype), end, fixed)
            out = jnp.concatenate([out, last[0]], axis)
            seen = jax.tree.map(lambda *x: jnp.concatenate(x, -1), seen, last[1])
        return out, seen

    def _run(self, given: Sequence, start: Any, size: int, visit: Callable) -> tuple[Any, Any]:
        env: dict[tuple[Atom, int | None], Any] = {}
        for one, x in zip(self.ins, given, strict=True):
            if one.whole and one.axis is not None:
                x = lax.dynamic_slice_in_dim(x, start, size, one.axis)
            env[one.atom, one.axis] = x
        seen = None
        if self.map in env:
            seen, env[self.map] = visit(env[self.map])
        for node, ins, (out, axis), step in self.nodes:
            xs = [a.value if isinstance(a, Constant) else env[a, at] for a, at in ins]
            if step is None:
                outs = primitives.bind_part(node.equation, xs, axis, start, size)
            else:
                outs = step.function(*xs)
            env[out, axis] = outs[node.outs.index(out)]
            if (out, axis) == self.map:
                seen, env[self.map] = visit(env[self.map])
        return env[self.nodes[-1].out], seen


def _split(x: Any, axis: int, count: int, size: int) -> Any:
    """The first blocks of an axis, [blocks, ..., size, ...]."""
    x = lax.slice_in_dim(x, 0, count * size, axis=axis)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: Any, axis: int) -> Any:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class Places:
    """Where values are computed and used, in a graph and in its bodies."""

    def __init__(self, graph: Graph):
        self.producers: dict[Value, Node] = {}
        self.users: dict[Value, list[Node]] = {}
        self.order: dict[Node, int] = {}
        self.homes: dict[Node, Graph] = {}
        # What a body is given, the same in every iteration, is outside.
        self.outside: dict[Value, Atom] = {}
        self.live = _Live()
        self.live.run(graph, [True] * len(graph.outs))
        self._enter(graph)

    def _enter(self, graph: Graph) -> None:
        for node in graph.nodes:
            self.order[node], self.homes[node] = len(self.order), graph
            for out in node.outs:
                self.producers[out] = node
            for atom in node.ins:
                if isinstance(atom, Value):
                    self.users.setdefault(atom, []).append(node)
            for body in node.bodies if node.is_open else ():
                given = operands(node, node.ins).fixed
                self.outside.update(zip(body.ins, given, strict=False))
                self._enter(body)


class _Live(Backward):
    """The values that something reads in the end, and those that a graph returns for it."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: set[Value] = set()

    def carries(self, value: Value) -> bool:
        return True

    def run(self, graph: Graph, wanted: Sequence[bool]) -> list[bool]:
        outs = zip(graph.outs, wanted, strict=True)
        self.returned.update(v for v, on in outs if on and isinstance(v, Value))
        return super().run(graph, wanted)


def find_rows(
    places: Places,
    value: Value,
    query: int,
    key: int,
    steps: Mapping[Node, Step] | None = None,
) -> Rows:
    """How to compute an attention map, and its product with values, row by row.

    Args:
      places: of the graph.
      value: the map.
      query: its axis of queries.
      key: its axis of keys.
      steps: how some nodes are computed instead.

    Raises:
      NotByRows: the map is used otherwise too, or something on the way does not keep rows apart
        or is not known to.
    """
    return _Finder(places, steps or {}).find(value, query, key)


class _Finder:
    """The way back from a product; `seen` has the nodes by what they compute."""

    def __init__(self, places: Places, steps: Mapping[Node, Step]):
        self.places, self.steps = places, steps
        self.ins: dict[tuple[Atom, int | None], Operand] = {}
        self.seen: dict[tuple[Value, int], Applied] = {}

    def find(self, value: Value, query: int, key: int) -> Rows:
        """See the function."""
        product, weights, last = self._product(value, query, key)
        step = self.steps.get(product)
        ins = product.ins if step is None else step.ins
        reads = tuple((atom, last[0] if atom is weights else None) for atom in ins)
        axis = _leads_to(product, ins.index(weights), last[0], step)
        if axis is None or len(ins) != len(product.ins):
            raise self._unknown(product)
        whole: list[tuple[Atom, int, int]] = [(weights, *last)]
        small: list[tuple[Atom, int | None]] = [read for read in reads if read[1] is None]
        self._walk(whole, small)
        made = self._made(product)
        while small:
            atom, at = small.pop()
            if not isinstance(atom, Value) or atom not in made:
                self.ins[atom, at] = Operand(atom, at, False)
            elif at is None:
                raise self._unknown(self.places.producers[atom], "takes its queries together")
            elif (atom, at) not in self.seen:
                self._expand(atom, at, None, whole, small)
                self._walk(whole, small)
        if (value, query) not in self.seen and (value, query) not in self.ins:
            raise NotByRows("the map's queries are not those of the product")
        done = Applied(product, reads, (product.outs[0], axis), step)
        order = self.places.order
        nodes = sorted(self.seen.values(), key=lambda one: order[one.node])
        return Rows(tuple(self.ins.values()), (*nodes, done), (value, query), value.shape[query])

    def _product(self, value: Value, query: int, key: int) -> tuple[Node, Value, tuple[int, int]]:
        """The product that sums over a map's keys, what it multiplies them with, and both axes."""
        live = self.places.live
        while True:
            users = self.places.users.get(value, ())
            users = [node for node in users if any(out in live.found for out in node.outs)]
            if value in live.returned or len(users) != 1 or users[0].ins.count(value) != 1:
                raise NotByRows("the map is used in more than one place, or returned")
            (node,) = users
            side = node.ins.index(value)
            if node.name in DOT and key in primitives.contraction(node.equation)[0][side]:
                return node, value, (query, key)
            step = self.steps.get(node)
            if step is not None:
                if value not in step.ins:
                    raise self._unknown(node)
                side = step.ins.index(value)
            rows, columns = (_leads_to(node, side, axis, step) for axis in (query, key))
            if len(node.outs) != 1 or rows is None or columns is None:
                raise self._unknown(node)
            value, query, key = node.outs[0], rows, columns

    def _walk(self, whole: list, small: list) -> None:
        """Expand values with both axes until none is left; others are put aside."""
        while whole:
            atom, at, key = whole.pop()
            atom = self._outside(atom)
            if (atom, at) in self.seen or (atom, at) in self.ins:
                continue
            if atom not in self.places.producers:
                self.ins[atom, at] = Operand(atom, at, True)
            else:
                self._expand(atom, at, key, whole, small)

    def _outside(self, atom: Atom) -> Atom:
        while isinstance(atom, Value) and atom in self.places.outside:
            atom = self.places.outside[atom]
        return atom

    def _expand(self, value: Value, at: int, key: int | None, whole: list, small: list) -> None:
        """Note the operation that computes a value, and put what it reads on the lists."""
        node = self.places.producers[value]
        step = self.steps.get(node)
        ins = sources(node, at, value, step)
        keys = None if key is None else sources(node, key, value, step, moved=True)
        if ins is None or (key is not None and keys is None):
            raise self._unknown(node)
        atoms = [self._outside(atom) for atom in (node.ins if step is None else step.ins)]
        reads = []
        for i, (atom, place) in enumerate(zip(atoms, ins, strict=True)):
            # A reduction takes the keys together.
            reduced = primitives.reduced_axes(node.equation) or (None,)
            place_of_keys = reduced[0] if keys is None else keys[i]
            if isinstance(atom, Constant) and atom.shape and place is not None:
                raise NotByRows(f"a constant {atom.shape} has an axis of queries")
            if isinstance(atom, Value) and place is not None and place_of_keys is not None:
                whole.append((atom, place, place_of_keys))
            elif isinstance(atom, Value):
                small.append((atom, place))
            reads.append((atom, place))
        self.seen[value, at] = Applied(node, tuple(reads), (value, at), step)

    def _made(self, product: Node) -> set[Atom]:
        """What the product's graph makes of the scores: of where queries and keys meet last."""
        order, applied = self.places.order, self.seen.values()
        births = [one for one in applied if not any(map(self._is_whole, one.ins))]
        births = [one for one in births if one.node.name in DOT] or births
        if not births:
            return set()
        root = max(births, key=lambda one: order[one.node])
        made: set[Atom] = {root.out[0]}
        for node in self.places.homes[product].nodes:
            if order[root.node] < order[node] < order[product] and made.intersection(node.ins):
                made.update(node.outs)
        return made

    def _is_whole(self, read: tuple[Atom, int | None]) -> bool:
        atom, at = read
        return at is not None and ((atom, at) in self.seen or (atom, at) in self.ins)

    def _unknown(
        self, node: Node, why: str = "is not known to keep its queries apart"
    ) -> NotByRows:
        return NotByRows(f"{node.name} at {node.where()} {why}")


def _leads_to(node: Node, number: int, axis: int, step: Step | None) -> int | None:
    """The axis of a node's output that an axis of an input becomes."""
    for i in range(len(node.outs[0].shape)):
        found = sources(node, i, node.outs[0], step)
        if found is not None and len(found) > number and found[number] == axis:
            return i
    return None


def sources(
    node: Node, axis: int, out: Value, step: Step | None = None, *, moved: bool = False
) -> list[int | None] | None:
    """By input, the axis of it that an axis of an output is; None for one without that axis.

    With `moved` the entries may be in another order, or some of them. None in the place of the
    list where it is not known.
    """
    equation, name, shape = node.equation, node.name, out.shape
    if step is not None and step.ins != node.ins:
        if {*step.ins} == {*node.ins} and len(step.ins) == len(node.ins):
            found = sources(node, axis, out, moved=moved)
            return found and [found[node.ins.index(atom)] for atom in step.ins]
        return _in_place(step.ins, axis, shape) if is_elementwise(node) else None
    if name in TRANSPOSE:
        return [primitives.permutation(equation)[axis]]
    if name in RESHAPES:
        place = _same_place(node.ins[0].shape, shape, axis)
        return None if place is None else [place]
    if name in BROADCAST:
        places = primitives.broadcast_axes(equation)
        if axis not in places:
            return [None] * len(node.ins)
        place = places.index(axis)
        return [place if node.ins[0].shape[place] == shape[axis] else None]
    if name in DOT:
        return _of_product(node, axis)
    if name in IOTA:
        return []
    reduced = primitives.reduced_axes(equation)
    if reduced is not None:
        kept = [i for i in range(len(node.ins[0].shape)) if i not in reduced]
        return [kept[axis]]
    if primitives.picked_along(equation) is not None:
        picked = primitives.index_axes(equation, len(shape))[axis]
        return None if picked is None else [None, picked]
    along = primitives.acts_along(equation)
    if along is not None and (moved or axis not in along):
        return [axis if atom.shape else None for atom in node.ins]
    return _in_place(node.ins, axis, shape) if name in _IN_PLACE else None


def _in_place(atoms: Iterable[Atom], axis: int, shape: tuple[int, ...]) -> list[int | None] | None:
    found: list[int | None] = []
    for atom in atoms:
        if atom.shape and len(atom.shape) != len(shape):
            return None
        if any(size not in (1, whole) for size, whole in zip(atom.shape, shape, strict=False)):
            return None
        found.append(axis if atom.shape and atom.shape[axis] == shape[axis] else None)
    return found


def _same_place(given: tuple[int, ...], made: tuple[int, ...], axis: int) -> int | None:
    """The axis of a reshaped array that an axis of the result is, neither split nor merged."""
    before = math.prod(made[:axis])
    for i, size in enumerate(given):
        if size == made[axis] and math.prod(given[:i]) == before:
            return i
    return None


def _of_product(node: Node, axis: int) -> list[int | None]:
    """The axes of both factors that an axis of their product is."""
    contracted, batched = primitives.contraction(node.equation)
    if axis < len(batched[0]):
        return [batched[0][axis], batched[1][axis]]
    places: list[tuple[int, int]] = []
    for side in (0, 1):
        taken = {*contracted[side], *batched[side]}
        rank = len(node.ins[side].shape)
        places += [(side, i) for i in range(rank) if i not in taken]
    side, place = places[axis - len(batched[0])]
    return [place, None] if side == 0 else [None, place]
