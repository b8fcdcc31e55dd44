"""A second channel for rules that give relevance to inputs of zero: Flat, WSquare, ZBox.

Cotangents are relevance / value, which cannot say that a black pixel is relevant. So each
explained input gets a companion of zeros, the probe, which goes through the same moves and past
the same constant shifts and scales (a pixel normalisation) up to the first linear operation;
there the rule's relevance is the probe's cotangent, and comes back through the moves' transposes.
A tagged value that is explained has a probe of its own, which begins at the tag.

Where constants stand beside the input (zeros around an image, a mask's zeros), a second companion
of ones goes the same way: it is 0 at the constants, which take no relevance, as the zeros that a
convolution pads with itself take none. A mean of the input and a fixed linear map (a resize) share
what the probe takes by their weights, whatever their signs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.facts import Fact, Facts, active_ins, fact_of, inexact, is_elementwise
from jaxrel.tracing.flow import operands
from jaxrel.tracing.graph import Atom, Graph, Node, Value, build, tag_name
from jaxrel.tracing.primitives import (
    AFFINE,
    CLIPS,
    CONV,
    LINEAR,
    LOOKUPS,
    MEANS,
    MOVES,
    PLACES,
    SCATTERS,
    SELECT,
    make_program,
)
from jaxrel.tracing.sharding import shaped_like

_MOVING = MOVES | PLACES | SCATTERS
# What these do to a value says nothing of where its relevance belongs.
_PASSED = AFFINE | CLIPS


class Probe(NamedTuple):
    """What takes the relevance that a rule gives a value directly, in the value's shape.

    Attributes:
      value: zeros, whose cotangent is that relevance.
      present: 1 where the value holds the input and 0 where it holds constants; None if it holds
        nothing else.
    """

    value: Value
    present: Value | None = None


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
    probes: dict[Value, Probe]
    steps: dict[Node, Step]


def add_probes(
    graph: Graph,
    facts: Facts,
    explained: Sequence[Value],
    wanted: Iterable[Value],
    sources: Iterable[Value] = (),
) -> Probed:
    """Give the explained inputs probes that reach the wanted values.

    Args:
      graph: the graph; its inputs hold `explained`.
      facts: what is known of its values; the facts of new values are added.
      explained: inputs that carry relevance.
      wanted: the inputs of operations with a direct rule.
      sources: more explained values, wherever in the graph; their probes are wanted too.
    """
    sources = frozenset(sources)
    mirror = _Mirror(facts, sources.union(wanted), sources)
    made, _ = mirror.graph(graph, explained)
    return Probed(made, mirror.found, mirror.steps)


class _Mirror:
    """Attributes: the probes `found` for wanted values, and the `steps` of the added nodes."""

    def __init__(self, facts: Facts, wanted: frozenset[Value], sources: frozenset[Value]):
        self.facts, self.wanted, self.sources = facts, wanted, sources
        self.found: dict[Value, Probe] = {}
        self.steps: dict[Node, Step] = {}

    def graph(
        self,
        graph: Graph,
        followed: Sequence[Value],
        masked: Sequence[Value] = (),
        stale: Iterable[Value] = (),
    ) -> tuple[Graph, dict[Value, Probe]]:
        """The graph with, as its last inputs, a probe for each of the followed inputs.

        After these come the companions of the masked ones, which hold constants too. The probes
        of stale inputs are there, but lead nowhere. Also the probes of all values that have one.
        """
        extra = [self._new(value) for value in (*followed, *masked)]
        masks = dict(zip(masked, extra[len(followed) :], strict=True))
        probes = {
            value: Probe(probe, masks.get(value))
            for value, probe in zip(followed, extra, strict=False)
        }
        for value in stale:
            probes.pop(value, None)
        nodes: list[Node] = []
        for node in graph.nodes:
            nodes += self._node(node, probes)
            nodes += self._sources(node, probes)
        self.found |= {value: probe for value, probe in probes.items() if value in self.wanted}
        made = Graph((*graph.ins, *extra), tuple(nodes), graph.outs, graph.constants)
        return made, probes

    def _new(self, like: Value) -> Value:
        value = Value(like.aval)
        self.facts[value] = Fact(root=value)
        return value

    def _node(self, node: Node, probes: dict[Value, Probe]) -> list[Node]:
        """The node, and what its probe needs; new probes are noted."""
        active = active_ins(self.facts, node)
        if node.is_open:
            led = any(value in probes for value in active)
            through = led and any(self.facts[out].fresh for out in node.outs)
            inside = through or any(map(self._wants, node.bodies))
            return self._control(node, probes) if inside else [node]
        known = [value for value in active if value in probes]
        if not known or node.is_control:
            return [node]
        if node.name in _MOVING or tag_name(node) or self._masks(node):
            places = tuple(i for i, atom in enumerate(node.ins) if atom in known)
            return [node, *self._mirror(node, probes, places, _tangent(node, places))]
        if len(active) == 1 and self._shares(node, active[0]):
            return [node, *self._shared(node, active[0], probes)]
        if len(active) == 1 and is_elementwise(node) and node.name in _PASSED:
            (x,) = active
            shape = node.outs[0].shape
            if shape == x.shape:
                probes[node.outs[0]] = probes[x]
                return [node]
            spread = _spread(len(node.ins), shape)
            return [node, *self._mirror(node, probes, (node.ins.index(x),), spread)]
        return [node]

    def _masks(self, node: Node) -> bool:
        """Whether the node puts constants in some places, whatever the values are there."""
        return node.name in SELECT and not fact_of(self.facts, node.ins[0]).nonlinear

    def _shares(self, node: Node, x: Value) -> bool:
        """Whether the node is a sum, or a linear map whose weights are written into the program."""
        others = (fact_of(self.facts, atom) for atom in node.ins if atom is not x)
        return node.name in MEANS or (node.name in LINEAR and all(f.literal for f in others))

    def _shared(self, node: Node, x: Value, probes: dict[Value, Probe]) -> list[Node]:
        """Nodes that share what their probe takes among the inputs, by their weights."""
        place, (value, present) = node.ins.index(x), probes[x]

        def weighed(ins: Sequence, x: Any) -> Any:
            given = [x if i == place else jnp.abs(one) for i, one in enumerate(ins)]
            return node.bind(*given)[0]

        def total(*args):
            ins = args[: len(node.ins)]
            return weighed(ins, jnp.ones_like(ins[place]) if present is None else args[-1])

        def shares(*args):
            whole = total(*args)
            ins, probe = args[: len(node.ins)], args[len(node.ins)]
            part = weighed(ins, probe if present is None else probe * args[-1])
            return [jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)]

        masks = [] if present is None else [present]
        nodes = [self._added(node, [value, *masks], shares)]
        mask = None
        if masks or node.name in CONV:
            # What a convolution pads is no input.
            counted = self._added(
                node, masks, lambda *args: [(total(*args) > 0).astype(args[place].dtype)]
            )
            nodes.append(counted)
            mask = counted.outs[0]
        probes[node.outs[0]] = Probe(nodes[0].outs[0], mask)
        return nodes

    def _sources(self, node: Node, probes: dict[Value, Probe]) -> list[Node]:
        """What gives a probe to explained values that the node makes of what is not explained."""
        added = []
        for value in node.outs:
            if value in self.sources and value not in probes and self.facts[value].fresh:
                added.append(self._made(value, jnp.zeros_like))
                probes[value] = Probe(added[-1].outs[0])
        return added

    def _mirror(
        self, node: Node, probes: dict[Value, Probe], places: tuple[int, ...], function: Callable
    ) -> list[Node]:
        """Nodes that do to probes what another does to the inputs at these places."""
        moved = [probes[atom] for i in places if isinstance(atom := node.ins[i], Value)]
        values = self._added(node, [probe.value for probe in moved], function)
        masks: Sequence[Value | None] = [None] * len(node.outs)
        nodes = [values]
        if any(probe.present for probe in moved) or self._brings(node, places):
            absent = [i for i, probe in enumerate(moved) if probe.present is None]
            known = [probe.present or probe.value for probe in moved]
            mask = self._added(node, known, _present(function, len(node.ins), absent))
            masks = mask.outs
            nodes.append(mask)
        probes |= zip(node.outs, map(Probe, values.outs, masks), strict=True)
        return nodes

    def _added(self, node: Node, companions: Sequence[Value], function: Callable) -> Node:
        added = Node(node.equation, (*node.ins, *companions), tuple(map(self._new, node.outs)))
        self.steps[added] = Step(added.ins, function)
        return added

    def _brings(self, node: Node, places: tuple[int, ...]) -> bool:
        """Whether constants may stand in the node's output beside what has probes."""

        def constant(atom: Atom) -> bool:
            return inexact(atom) and not fact_of(self.facts, atom).active

        others = (atom for i, atom in enumerate(node.ins) if i not in places)
        affine = node.name in _PASSED and node.name not in SELECT
        return not affine and (node.name in LOOKUPS or any(map(constant, others)))

    def _wants(self, body: Graph) -> bool:
        known = (atom for node in body.walk() for atom in (*node.ins, *node.outs))
        return any(atom in self.wanted for atom in known if isinstance(atom, Value))

    def _control(self, node: Node, probes: dict[Value, Probe]) -> list[Node]:
        """Control flow whose bodies get the probes of their inputs as further inputs.

        A scan scans over them: the probes of constants and of the first state are repeated.
        """
        given = operands(node, range(len(node.ins)))
        added: list[Node] = []

        def entering(i: int, companion: Value) -> Value:
            if not node.scan or i in given.scanned:
                return companion
            added.append(self._repeated(node.scan.length, companion))
            return added[-1].outs[0]

        followed: dict[int, Value] = {}
        masked: dict[int, Value] = {}
        for i, atom in enumerate(node.ins):
            if isinstance(atom, Value) and atom in probes and self.facts[atom].active:
                probe = probes[atom]
                followed[i] = entering(i, probe.value)
                if probe.present is not None:
                    masked[i] = entering(i, probe.present)
        bodies, inside = [], []
        for body in node.bodies:
            # Only the first iteration's state is the input; later ones compute theirs.
            state = [] if _runs_first(node, body) else given.state
            inner, inner_masked, stale = (
                [body.ins[i - len(given.test)] for i in places]
                for places in (followed, masked, [i for i in state if i in followed])
            )
            made, found = self.graph(body, inner, inner_masked, stale)
            bodies.append(made)
            inside.append(found)
        ins = (*node.ins, *followed.values(), *masked.values())
        changed = dataclasses.replace(node, ins=ins, bodies=tuple(bodies))
        left = self._leaving(changed, inside, probes)
        used = len(left.outs) > len(node.outs) or any(map(self._wants, node.bodies))
        return [*added, left] if used else [node]

    def _leaving(
        self, node: Node, inside: Sequence[dict[Value, Probe]], probes: dict[Value, Probe]
    ) -> Node:
        """The node, which also returns the probes of what all of its bodies return with one.

        What leaves a loop as its state has none.
        """
        first = node.scan.carries if node.scan else 0
        extra: list[list[Value]] = [[] for _ in node.bodies]
        nodes = [[*body.nodes] for body in node.bodies]
        outs = [*node.outs]
        for number, out in enumerate(node.outs):
            ends = [body.outs[number] for body in node.bodies]
            pairs = zip(inside, ends, strict=True)
            known = [found[end] for found, end in pairs if isinstance(end, Value) and end in found]
            if number < first or len(known) < len(ends):
                continue
            masked = any(present for _, present in known)
            for i, (value, present) in enumerate(known):
                made = [self._made(value, _same)]
                if present is not None:
                    made.append(self._made(present, _same))
                elif masked:
                    made.append(self._made(value, jnp.ones_like))
                nodes[i] += made
                extra[i] += [one.outs[0] for one in made]
            probes[out] = Probe(self._new(out), self._new(out) if masked else None)
            outs += [value for value in probes[out] if value is not None]
        bodies = (
            Graph(body.ins, tuple(made), (*body.outs, *more), body.constants)
            for body, made, more in zip(node.bodies, nodes, extra, strict=True)
        )
        return dataclasses.replace(node, outs=tuple(outs), bodies=tuple(bodies))

    def _made(self, like: Value, function: Callable) -> Node:
        """A node that makes a companion of a value."""
        program, _ = make_program(jnp.negative, shaped_like(like.aval))
        made = dataclasses.replace(build(program).nodes[0], ins=(like,), outs=(self._new(like),))
        self.steps[made] = Step(made.ins, lambda x: [function(x)])
        return made

    def _repeated(self, length: int, probe: Value) -> Node:
        """A node that repeats a probe, once for each iteration of a scan."""
        like = shaped_like(probe.aval)
        program, _ = make_program(lambda x: jnp.broadcast_to(x, (length, *x.shape)), like)
        (node,) = build(program).nodes
        self.facts[node.outs[0]] = Fact(root=node.outs[0])
        return dataclasses.replace(node, ins=(probe,))


def _same(x: Any) -> Any:
    return x


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


def _present(function: Callable, inputs: int, absent: Sequence[int]) -> Callable:
    """Where a function of companions puts what is present; those absent are 1 throughout."""

    def present(*args):
        masks = list(args[inputs:])
        for i in absent:
            masks[i] = jnp.ones_like(masks[i])
        moved = function(*args[:inputs], *masks)
        return [(x != 0).astype(x.dtype) for x in moved]

    return present


def _spread(inputs: int, shape: tuple[int, ...]) -> Callable:
    """The probe, broadcast as the value it goes with."""
    return lambda *args: [jnp.broadcast_to(args[inputs], shape)]
