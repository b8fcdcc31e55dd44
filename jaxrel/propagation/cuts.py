"""Where scans are cut, so that each part of one has one rule for each operation."""

import dataclasses
from collections.abc import Collection

from jaxrel.propagation.composites import Composite
from jaxrel.propagation.finder import stacked
from jaxrel.tracing.facts import Facts, analyse, fact_of, join
from jaxrel.tracing.flow import operands
from jaxrel.tracing.graph import Graph, Node, Value
from jaxrel.tracing.primitives import LINEAR, SCALES, SUMS


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The inner bounds of a scan's parts, by node; none for what is no scan, or is cut already.

    Attributes:
      facts: what is known of the values.
      composite: the rules, which may name layers.
      sources: values inside the graph that are explained.
      whole: values in scans that must stay one.
    """

    facts: Facts
    composite: Composite
    sources: Collection[Value]
    whole: Collection[Value]

    def __call__(self, node: Node) -> set[int]:
        """The bounds, along the scanned axis."""
        if node.scan is None or node.cuts:
            return set()
        length = node.scan.length
        cuts = self.composite.cuts(length) if stacked(node, self.facts) else set()
        first = {1} if self.composite.mentions_first and self._begins(node) else set()
        if not any(_holds(body, self.whole) for body in node.bodies):
            first |= {*range(1, 1 + self._settled_after(node))}
        cuts |= {length - i if node.scan.reverse else i for i in first}
        return {cut for cut in cuts if 0 < cut < length}

    def _begins(self, node: Node) -> bool:
        """Whether a scan's first iteration holds a first linear operation, and only that one."""
        state = [a for a in operands(node, node.ins).state if isinstance(a, Value)]
        fresh = any(self.facts[value].active and self.facts[value].fresh for value in state)
        return fresh and any(one.name in LINEAR for body in node.bodies for one in body.walk())

    def _settled_after(self, node: Node) -> int:
        """After how many iterations a scan's operations are those of all later ones.

        What a loop starts from may be a constant, and then its first iterations have other
        operations than the later ones: a gate times a constant is no product of two values.
        """
        (body,) = node.bodies
        given = operands(node, [fact_of(self.facts, atom) for atom in node.ins])
        later = [self.facts[value].active for value in operands(node, body.ins).state]
        state, count = given.state, len(given.state)
        for iteration in range(count):
            if not any(on and not fact.active for on, fact in zip(later, state, strict=True)):
                return iteration
            ins = [*given.fixed, *state, *given.scanned]
            found = analyse(body, ins, sources=self.sources)
            if not self._differs(body, found):
                return iteration
            outs = [fact_of(found, atom) for atom in body.outs[:count]]
            state = [join(*pair) for pair in zip(state, outs, strict=True)]
        return count

    def _differs(self, body: Graph, found: Facts) -> bool:
        """Whether a sum or a product has a constant where later iterations have a value.

        Zeros share nothing, so whether they are constants is the same but for the stabiliser of
        their sum, which the loop has not. What another scan begins
        with may be a constant in its first iteration alone.
        """
        return any(
            self.facts[value].active
            and not found[value].active
            and (node.scan is not None or not found[value].zero)
            for node in body.walk()
            if node.scan or node.name in SCALES | LINEAR | SUMS
            for value in node.ins
            if isinstance(value, Value)
        )


def _holds(graph: Graph, values: Collection[Value]) -> bool:
    return bool(values) and any(out in values for node in graph.walk() for out in node.outs)
