"""One graph or body, and what is asked of it to find its operations."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrel.tracing.facts import Facts, active_ins
from jaxrel.tracing.graph import Graph, Node, Value


class Body:
    """A graph, or a body in it, with what is known of its values.

    Attributes:
      facts: what is known of each value, in all other bodies too.
      carrying: the values that carry relevance.
      stack: (start, stop, length) of the part of a scanned stack that the graph is a body of.
      users: the nodes that use a value, and None where the graph returns it.
      taken: nodes that are part of an operation already found.
    """

    def __init__(
        self,
        graph: Graph,
        facts: Facts,
        carrying: set[Value],
        stack: tuple[int, int, int] | None,
    ):
        self.graph, self.facts, self.carrying, self.stack = graph, facts, carrying, stack
        self.producers = graph.producers()
        self.users: dict[Value, list[Node | None]] = {
            value: list(nodes) for value, nodes in graph.users().items()
        }
        for atom in graph.outs:
            if isinstance(atom, Value):
                self.users.setdefault(atom, []).append(None)
        self.taken: set[Node] = set()

    def active(self, node: Node) -> list[Value]:
        """The node's inputs that carry relevance."""
        return active_ins(self.facts, node)

    def only_user(self, value: Value) -> Node | None:
        """The node that uses a value, if nothing else does."""
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 else None

    def make(self, kind_of: type, node: Node, *, paths: frozenset[str] = frozenset(), **fields):
        """An operation of this graph, with its layer."""
        names = tuple(sorted(paths))
        layer = self.stack[0] if self.stack else _layer_in(names)
        return kind_of(node=node, paths=names, layer=layer, stack=self.stack, **fields)

    def block(
        self,
        block: type,
        kind: str,
        node: Node,
        start: Value,
        nodes: Iterable[Node],
        **fields: Any,
    ):
        """An operation made of these nodes, a function of `start`."""
        inside = set(nodes)
        ordered = tuple(one for one in self.graph.nodes if one in inside)
        made = {out for one in ordered for out in one.outs} | {start}
        reads = dict.fromkeys(a for one in ordered for a in one.ins if isinstance(a, Value))
        consts = tuple(value for value in reads if value not in made)
        fields |= {"start": start, "nodes": ordered, "consts": consts}
        return self.make(block, node, kind=kind, **fields)


def _layer_in(paths: Sequence[str]) -> int | None:
    """The first number in a parameter's path: 'blocks/3/kernel', 'block_3/kernel'."""
    for path in paths:
        for part in path.split("/"):
            if match := re.fullmatch(r"(?:.*_)?(\d+)", part):
                return int(match[1])
    return None
