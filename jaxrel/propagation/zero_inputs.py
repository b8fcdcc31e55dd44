"""A second channel for rules that give relevance to inputs of zero: Flat, WSquare, ZBox.

Cotangents are relevance / value, which cannot say that a black pixel is relevant. So each
explained input gets a companion of zeros, the probe, which goes through the same moves and past
the same constant shifts and scales (a pixel normalisation) up to the first linear operation;
there the rule's relevance is the probe's cotangent, and comes back through the moves' transposes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
from jax import numpy as jnp

from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.facts import Fact, Facts, active_ins, is_elementwise
from jaxrel.tracing.flow import operands
from jaxrel.tracing.graph import Graph, Node, Value, build, tag_name
from jaxrel.tracing.primitives import AFFINE, CLIPS, MOVES, PLACES, SCATTERS, make_program
from jaxrel.tracing.sharding import shaped_like

_MOVING = MOVES | PLACES | SCATTERS
# What these do to a value says nothing of where its relevance belongs.
_PASSED = AFFINE | CLIPS


@dataclasses.dataclass(frozen=True)
class Probed:
    """A graph with probes.

    Attributes:
      graph: the graph, with one more input per explained one, in order.
      probes: the probe of each wanted value that has one. Values behind a nonlinear or a linear
        operation have none, nor has the state of a loop after its first iteration.
      steps: how the nodes that were added are computed.
    """

    graph: Graph
    probes: dict[Value, Value]
    steps: dict[Node, Step]


def add_probes(
    graph: Graph, facts: Facts, explained: Sequence[Value], wanted: Iterable[Value]
) -> Probed:
    """Give the explained inputs probes that reach the wanted values.

    Args:
      graph: the graph; its inputs hold `explained`.
      facts: what is known of its values; the facts of new values are added.
      explained: inputs that carry relevance.
      wanted: the inputs of operations with a direct rule.
    """
    mirror = _Mirror(facts, frozenset(wanted))
    return Probed(mirror.graph(graph, explained), mirror.found, mirror.steps)


class _Mirror:
    def __init__(self, facts: Facts, wanted: frozenset[Value]):
        self.facts, self.wanted = facts, wanted
        self.found: dict[Value, Value] = {}
        self.steps: dict[Node, Step] = {}

    def graph(self, graph: Graph, followed: Sequence[Value], stale: Iterable[Value] = ()) -> Graph:
        """The graph with a probe for each of the followed inputs, as its last inputs.

        Those of stale inputs are there, but lead nowhere.
        """
        extra = [self._new(value) for value in followed]
        probes = dict(zip(followed, extra, strict=True))
        for value in stale:
            probes.pop(value, None)
        nodes: list[Node] = []
        for node in graph.nodes:
            nodes += self._node(node, probes)
        self.found |= {value: probe for value, probe in probes.items() if value in self.wanted}
        return Graph((*graph.ins, *extra), tuple(nodes), graph.outs, graph.constants)

    def _new(self, like: Value) -> Value:
        value = Value(like.aval)
        self.facts[value] = Fact(root=value)
        return value

    def _node(self, node: Node, probes: dict[Value, Value]) -> list[Node]:
        """The node, and what its probe needs; new probes are noted."""
        active = active_ins(self.facts, node)
        if node.is_open:
            inside = any(self._wants(body) for body in node.bodies)
            return self._control(node, probes) if inside else [node]
        known = [value for value in active if value in probes]
        if not known or node.is_control:
            return [node]
        if node.name in _MOVING or tag_name(node):
            places = tuple(i for i, atom in enumerate(node.ins) if atom in known)
            return [node, self._mirror(node, probes, places, _tangent(node, places))]
        if len(active) == 1 and is_elementwise(node) and node.name in _PASSED:
            (x,) = active
            shape = node.outs[0].shape
            if shape == x.shape:
                probes[node.outs[0]] = probes[x]
                return [node]
            spread = _spread(len(node.ins), shape)
            return [node, self._mirror(node, probes, (node.ins.index(x),), spread)]
        return [node]

    def _mirror(
        self, node: Node, probes: dict[Value, Value], places: tuple[int, ...], function: Callable
    ) -> Node:
        """A node that does to probes what another does to the inputs at these places."""
        outs = tuple(map(self._new, node.outs))
        moved = [atom for i in places if isinstance(atom := node.ins[i], Value)]
        mirror = Node(node.equation, (*node.ins, *(probes[v] for v in moved)), outs)
        self.steps[mirror] = Step(mirror.ins, function)
        probes |= zip(node.outs, outs, strict=True)
        return mirror

    def _wants(self, body: Graph) -> bool:
        reads = (atom for node in body.walk() for atom in node.ins)
        return any(atom in self.wanted for atom in reads if isinstance(atom, Value))

    def _control(self, node: Node, probes: dict[Value, Value]) -> list[Node]:
        """Control flow whose bodies get the probes of their inputs as further inputs.

        A scan scans over them: the probes of constants and of the first state are repeated.
        """
        given = operands(node, range(len(node.ins)))
        added: list[Node] = []
        followed: dict[int, Value] = {}
        for i, atom in enumerate(node.ins):
            if isinstance(atom, Value) and atom in probes and self.facts[atom].active:
                followed[i] = probes[atom]
                if node.scan and i not in given.scanned:
                    added.append(self._repeated(node.scan.length, probes[atom]))
                    followed[i] = added[-1].outs[0]
        bodies = []
        for body in node.bodies:
            # Only the first iteration's state is the input; later ones compute theirs.
            state = [] if _runs_first(node, body) else given.state
            stale = [body.ins[i] for i in state if i in followed]
            inner = [body.ins[i - len(given.test)] for i in followed]
            bodies.append(self.graph(body, inner, stale))
        ins = (*node.ins, *followed.values())
        return [*added, dataclasses.replace(node, ins=ins, bodies=tuple(bodies))]

    def _repeated(self, length: int, probe: Value) -> Node:
        """A node that repeats a probe, once for each iteration of a scan."""
        like = shaped_like(probe.aval)
        program, _ = make_program(lambda x: jnp.broadcast_to(x, (length, *x.shape)), like)
        (node,) = build(program).nodes
        self.facts[node.outs[0]] = Fact(root=node.outs[0])
        return dataclasses.replace(node, ins=(probe,))


def _runs_first(node: Node, body: Graph) -> bool:
    """Whether a body runs in a scan's first iteration and in no other."""
    if not node.scan:
        return False
    start, stop, first = node.segments()[0]
    return body is first and stop - start == 1


def _tangent(node: Node, places: tuple[int, ...]) -> Callable:
    """The node, of probes in the places of its inputs; linear in them."""

    def function(*args):
        ins, probes = list(args[: len(node.ins)]), args[len(node.ins) :]

        def moved(*xs):
            for i, x in zip(places, xs, strict=True):
                ins[i] = x
            return node.bind(*ins)

        return jax.jvp(moved, tuple(ins[i] for i in places), probes)[1]

    return function


def _spread(inputs: int, shape: tuple[int, ...]) -> Callable:
    """The probe, broadcast as the value it goes with."""
    return lambda *args: [jnp.broadcast_to(args[inputs], shape)]
