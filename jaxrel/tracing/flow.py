"""One walk through control flow, forward and backward, that every analysis of a graph uses.

An analysis says what an operation does to the facts of its values. How facts pass through scan,
cond, while and remat, in and out of their bodies and around a loop until nothing changes, is
said here once. `dependents` is the simplest analysis; `facts` has what LRP must know of values.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax import numpy as jnp

from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value
from jaxrel.tracing.primitives import DOT, EQUAL, KEEPS, LOOKUPS, MOVES

Fact = TypeVar("Fact")


class Operands(NamedTuple):
    """What control flow is given, by what it is for, in the order of the node's inputs.

    Attributes:
      test: what chooses a branch, or what only the test of a while loop reads.
      fixed: the same for every branch and every iteration.
      state: what the first iteration starts from; the others get it from the one before.
      scanned: arrays of which each iteration gets a slice.
    """

    test: list
    fixed: list
    state: list
    scanned: list


def operands(node: Node, values: Sequence[Any]) -> Operands:
    """Sort the inputs of control flow.

    Args:
      node: a scan, a while loop, a cond or a remat.
      values: one for each input of the node, in order.
    """
    if node.scan:
        sizes = (0, node.scan.consts, node.scan.carries)
    elif node.loop:
        sizes = (node.loop.test_consts, node.loop.consts, len(node.outs))
    else:
        skip = 1 if node.is_cond else 0
        sizes = (skip, len(values) - skip, 0)
    a, b, c = itertools.accumulate(sizes)
    return Operands(*map(list, (values[:a], values[a:b], values[b:c], values[c:])))


class Forward(Generic[Fact]):
    """Facts that flow along the data, of every value in the graph and in all bodies.

    A subclass defines `constant`, `literal`, `outs` and `join`, and `write` or `decided` if it
    must. A loop's body is walked until the facts of its state no longer change, so facts must
    have an order in which `join` goes up, and only so far.
    """

    def __init__(self) -> None:
        self.facts: dict[Value, Fact] = {}

    def constant(self, array: Any) -> Fact:
        """The fact of an array that the function closed over."""
        raise NotImplementedError

    def literal(self, atom: Constant) -> Fact:
        """The fact of a number written into the program."""
        raise NotImplementedError

    def outs(self, node: Node, ins: list[Fact]) -> list[Fact]:
        """The facts of an operation's outputs, given those of its inputs; no control flow."""
        raise NotImplementedError

    def join(self, *facts: Fact) -> Fact:
        """The fact, outside of a body, of what may be any of several values inside."""
        raise NotImplementedError

    def decided(self, test: Fact, outs: list[Fact]) -> list[Fact]:
        """The facts of what a test decides on: which branch is taken, how long a loop runs."""
        return outs

    def enter(self, node: Node, given: Operands) -> Operands:
        """What a scan's body is given: of a scanned array, one slice."""
        return given

    def leave(self, node: Node, stacked: list[Fact]) -> list[Fact]:
        """The facts of arrays stacked by a scan, given those of one iteration's."""
        return stacked

    def write(self, value: Value, fact: Fact, node: Node | None = None) -> None:
        """Note a fact. Inputs and constants of a graph have no node."""
        self.facts[value] = fact

    def read(self, atoms: Iterable[Atom]) -> list[Fact]:
        """The facts of values and literals."""
        return [self.facts[a] if isinstance(a, Value) else self.literal(a) for a in atoms]

    def run(self, graph: Graph, ins: Sequence[Fact]) -> list[Fact]:
        """Find the facts of all values, given those of the inputs; return the outputs'."""
        for value, fact in zip(graph.ins, ins, strict=True):
            self.write(value, fact)
        for value, array in graph.constants.items():
            self.write(value, self.constant(array))
        for node in graph.nodes:
            known = self.read(node.ins)
            outs = self._control(node, known) if node.is_control else self.outs(node, known)
            for value, fact in zip(node.outs, outs, strict=True):
                self.write(value, fact, node)
        return self.read(graph.outs)

    def _control(self, node: Node, ins: list[Fact]) -> list[Fact]:
        given = operands(node, ins)
        if node.scan:
            return self._scan(node, given)
        if node.loop:
            return self._while(node, given)
        branches = [self.run(body, given.fixed) for body in node.bodies]
        outs = [self.join(*facts) for facts in zip(*branches, strict=True)]
        return self.decided(given.test[0], outs) if given.test else outs

    def _scan(self, node: Node, given: Operands) -> list[Fact]:
        given = self.enter(node, given)
        state, stacked = given.state, []
        for start, stop, body in node.segments():
            before, outs = self._settled(body, given._replace(state=state), stop - start == 1)
            # What leaves the loop is the last iteration's, if there is one.
            state = outs[: len(state)] if stop > start else before
            stacked.append(outs[len(state) :])
        joined = [self.join(*facts) for facts in zip(*stacked, strict=True)]
        return [*state, *self.leave(node, joined)]

    def _while(self, node: Node, given: Operands) -> list[Fact]:
        test, body = node.bodies
        state, _ = self._settled(body, given, once=False)
        (decides,) = self.run(test, [*given.test, *state])
        return self.decided(decides, state)

    def _settled(self, body: Graph, given: Operands, once: bool) -> tuple[list, list]:
        """The state before an iteration, any of them, and the body's outputs after it."""
        state = [self.join(fact) for fact in given.state]
        while True:
            outs = self.run(body, [*given.fixed, *state, *given.scanned])
            outs = [self.join(fact) for fact in outs]
            joined = [self.join(a, b) for a, b in zip(state, outs, strict=False)]
            if once or joined == state:
                return state, outs
            state = joined


class Backward:
    """The values that lead to the outputs, found against the data, in all bodies.

    A while loop has no derivative and counts as one operation.
    """

    def __init__(self) -> None:
        self.found: set[Value] = set()

    def carries(self, value: Value) -> bool:
        """Whether a value can be among those found."""
        raise NotImplementedError

    def passed(self, node: Node) -> Iterable[Value]:
        """The inputs that lead to a node's outputs."""
        return [v for v in node.ins if isinstance(v, Value) and self.carries(v)]

    def run(self, graph: Graph, wanted: Sequence[bool]) -> list[bool]:
        """Find what leads to the wanted outputs; return which inputs do."""
        outs = zip(graph.outs, wanted, strict=True)
        self.found.update(v for v, on in outs if on and isinstance(v, Value) and self.carries(v))
        for node in reversed(graph.nodes):
            live = [out in self.found for out in node.outs]
            if any(live):
                found = set(self.passed(node))
                if node.is_open:
                    reached = zip(node.ins, self._control(node, live), strict=True)
                    found.intersection_update(atom for atom, on in reached if on)
                self.found |= found
        return [value in self.found for value in graph.ins]

    def _control(self, node: Node, live: list[bool]) -> list[bool]:
        """Which inputs of control flow lead to its live outputs."""
        if node.scan:
            return self._scan(node, live)
        reached = _either(*(self.run(body, live) for body in node.bodies))
        return [False, *reached] if node.is_cond else reached

    def _scan(self, node: Node, live: list[bool]) -> list[bool]:
        assert node.scan is not None
        state, stacked = live[: node.scan.carries], live[node.scan.carries :]
        reached = [False] * len(node.ins)
        for _, _, body in reversed(node.segments()):
            while True:
                ins = self.run(body, [*state, *stacked])
                reached = _either(reached, ins)
                joined = _either(state, operands(node, ins).state)
                if joined == state:
                    break
                state = joined
        given = operands(node, reached)
        return [*given.fixed, *state, *given.scanned]


def _either(*flags: Sequence[bool]) -> list[bool]:
    return [any(each) for each in zip(*flags, strict=True)]


def dependents(graph: Graph, sources: Iterable[Value]) -> frozenset[Value]:
    """Every value, in the graph and in all bodies, that the sources' contents can influence.

    Shapes and dtypes do not count, integers and comparisons do, and `stop_gradient` is not a
    barrier: this is dependence, not differentiability.
    """
    walk = _Dependents(frozenset(sources))
    walk.run(graph, [False] * len(graph.ins))
    return frozenset(walk.facts)


def looked_up(graph: Graph, tokens: frozenset[Value]) -> list[Value]:
    """The rows that integer data select from tables that are not data.

    By an index, or by a product with what is 1 where a row's number is the index, else 0.
    """
    makers = {out: node for node in graph.walk() for out in node.outs}
    return [
        node.outs[0]
        for node in graph.walk()
        if _selects(node, tokens, makers) and jnp.issubdtype(node.outs[0].aval.dtype, jnp.floating)
    ]


def _selects(node: Node, tokens: frozenset[Value], makers: dict[Value, Node]) -> bool:
    known = [atom in tokens for atom in node.ins]
    if node.name in LOOKUPS:
        return not known[0] and any(known[1:])
    return node.name in DOT and sum(known) == 1 and _is_one_hot(node.ins[known.index(True)], makers)


def _is_one_hot(atom: Atom, makers: dict[Value, Node]) -> bool:
    while isinstance(atom, Value) and atom in makers and makers[atom].name in MOVES:
        atom = makers[atom].ins[0]
    node = makers.get(atom) if isinstance(atom, Value) else None
    return node is not None and node.name in EQUAL


class _Dependents(Forward[bool]):
    """Whether a value depends on the sources."""

    def __init__(self, sources: frozenset[Value]):
        super().__init__()
        self.sources = sources

    def constant(self, array: Any) -> bool:
        return False

    # Only what depends is noted: this runs for every attention of a model.
    def read(self, atoms: Iterable[Atom]) -> list[bool]:
        return [atom in self.facts for atom in atoms]

    def write(self, value: Value, fact: bool, node: Node | None = None) -> None:
        if fact or value in self.sources:
            self.facts[value] = True

    def outs(self, node: Node, ins: list[bool]) -> list[bool]:
        if node.name in KEEPS and len(ins) == len(node.outs):
            return ins
        reached = any(ins)
        for body in node.bodies:
            # What goes where inside an opaque program is not ours to know.
            reached = any([*self.run(body, [reached] * len(body.ins)), reached])
        return [reached] * len(node.outs)

    def join(self, *facts: bool) -> bool:
        return any(facts)

    def decided(self, test: bool, outs: list[bool]) -> list[bool]:
        return [test or out for out in outs]
