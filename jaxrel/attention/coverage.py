"""Which softmaxes over scores of the data are attention, so that none is left out unsaid."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from jaxrel.tracing import primitives
from jaxrel.tracing.axes import Axes, roots
from jaxrel.tracing.flow import operands
from jaxrel.tracing.graph import Atom, Graph, Node, Value, tag_name
from jaxrel.tracing.patterns import softmaxes
from jaxrel.tracing.primitives import ADD, CUSTOM, DIV, DOT, EXPONENTIALS, LOG, MUL, POWERS


class Starts(NamedTuple):
    """Where attention maps are: by the node that computes one, the scores behind it.

    Attributes:
      maps: softmaxes that are recognised, and tagged values behind those that are not.
      hidden: what normalises scores and multiplies values by it, but is not recognised.
    """

    maps: dict[Node, Value]
    hidden: tuple[Node, ...]


def find_starts(graph: Graph, data: Collection[Value], axes: Axes) -> Starts:
    """All attention maps of a graph and its bodies, recognised or not."""
    flows = _flows(graph)
    maps: dict[Node, Value] = {}
    hidden: list[Node] = []
    for node, scores, exp, sure in _candidates(graph, data):
        begun = _summed(exp.outs[0], flows, axes)
        reached = list(_reached(node.outs[0], begun, flows, data, axes))
        if sure and any(plain for _, plain in reached):
            maps[node] = scores
            continue
        if not reached or not (sure or _normalised(node.outs[0], begun, flows, data, axes)):
            continue
        tags = [tag for tag, _ in reached]
        if all(tag is not None for tag in tags):
            maps.update((tag, scores) for tag in tags if tag is not None)
        else:
            hidden.append(node)
    return Starts(maps, tuple(hidden))


def returns_map(body: Graph) -> bool:
    """Whether a body returns a softmax, as moves and masks leave it."""
    users, outs = body.users(), {*body.outs}

    def leaves(value: Value) -> bool:
        after = (node for node in users.get(value, ()) if node.name in primitives.MASKING)
        return value in outs or any(leaves(out) for node in after for out in node.outs)

    return any(leaves(node.outs[0]) for node, _ in softmaxes(body))


def _candidates(graph: Graph, data: Collection[Value]) -> Iterator[tuple[Node, Value, Node, bool]]:
    """(Last node, scores, an exponential, True) of softmaxes; the same of exponentials in none."""
    producers = graph.producers()
    inside: set[Node] = set()
    for node, scores in softmaxes(graph):
        between = _between(node, scores, producers)
        inside |= between
        if scores in data:
            within = (n for n in between if n.name in EXPONENTIALS - POWERS and n is not node)
            yield node, scores, next(within, node), True
    for node in graph.nodes:
        given = node.ins[-1] if node.ins else None
        exponential = node.name in EXPONENTIALS or node.name in POWERS
        if exponential and node not in inside and isinstance(given, Value) and given in data:
            yield node, given, node, False
        if node.is_control:
            for body in node.bodies:
                yield from _candidates(body, data)


def _between(last: Node, scores: Value, producers: dict[Value, Node]) -> set[Node]:
    """The nodes that a softmax consists of."""
    found: set[Node] = set()
    waiting: list[Atom] = [*last.outs]
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Value) and atom is not scores and atom in producers:
            node = producers[atom]
            if node not in found:
                found.add(node)
                waiting += node.ins
    return found


def _flows(graph: Graph) -> dict[Value, list[tuple[Node | None, Value]]]:
    """By value, what it goes into: (operation, result); into and out of bodies without one."""
    flows: dict[Value, list[tuple[Node | None, Value]]] = {}

    def note(atom: Atom, node: Node | None, out: Value) -> None:
        if isinstance(atom, Value):
            flows.setdefault(atom, []).append((node, out))

    def walk(graph: Graph) -> None:
        for node in graph.nodes:
            if not node.is_open:
                pairs = len(node.ins) == len(node.outs) > 1 and node.name not in CUSTOM
                for number, atom in enumerate(node.ins):
                    for out in node.outs[number : number + 1] if pairs else node.outs:
                        note(atom, node, out)
                continue
            given = operands(node, node.ins)
            ins = [*given.fixed, *given.state, *given.scanned]
            for body in node.bodies:
                for atom, inner in zip(ins, body.ins, strict=True):
                    note(atom, None, inner)
                for inner_out, out in zip(body.outs, node.outs, strict=True):
                    note(inner_out, None, out)
                walk(body)

    walk(graph)
    return flows


def _reached(
    start: Value, begun: frozenset, flows: dict, data: Collection[Value], axes: Axes
) -> Iterator[tuple[Node | None, bool]]:
    """The products with values that a map gets to, as (tag on the way, whether plainly).

    Plainly is through moves, masks and scales only, in the map's own graph.
    """
    waiting: list[tuple[Value, Node | None, bool]] = [(start, None, True)]
    seen: set[Value] = set()
    while waiting:
        value, tag, plain = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, out in flows.get(value, ()):
            if node is None:
                waiting.append((out, tag, False))
            elif node.name in DOT and all(atom in data for atom in node.ins):
                if _weighs(node, value, begun, axes):
                    yield tag, plain
            elif node.name in MUL and _spreads(node, value, data, axes):
                yield tag, False
            elif node.name not in DOT or not _mixes(node, value, begun, axes):
                named = node if tag_name(node) is not None else tag
                waiting.append((out, named, plain and node.name in primitives.MASKING))


def _summed(start: Value, flows: dict, axes: Axes) -> frozenset:
    """What the axis came from over which an exponential is summed; nothing if unknown."""
    waiting, seen = [start], set()
    while waiting:
        value = waiting.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for node, out in flows.get(value, ()):
            if node is None:
                continue
            over = primitives.reduced_axes(node.equation)
            if node.name in DOT:
                over = primitives.contraction(node.equation)[0][node.ins.index(value)]
            if over:
                return frozenset().union(*(axes.lineage(axes.of(value)[i]) for i in over))
            if node.name in primitives.MASKING | ADD:
                waiting.append(out)
    return frozenset()


def _weighs(node: Node, value: Value, begun: frozenset, axes: Axes) -> bool:
    """Whether a product sums values by a map: over an axis of the map, for another of it."""
    side = node.ins.index(value)
    contracted, batched = (dims[side] for dims in primitives.contraction(node.equation))
    own = axes.of(value)
    free = [i for i, size in enumerate(value.shape) if i not in contracted and i not in batched]
    if not begun or not free:
        return bool(free)
    summed = frozenset().union(*(axes.lineage(own[i]) for i in contracted))
    return bool(summed & begun) or not all(root.known for root in summed)


def _spreads(node: Node, value: Value, data: Collection[Value], axes: Axes) -> bool:
    """Whether a map multiplies values entry by entry, to be summed over the keys later.

    Then it has an axis that the values have not, the queries', and they have one that it has not.
    """
    others = [atom for atom in node.ins if atom is not value]
    if len(others) != 1 or others[0] not in data or len(others[0].shape) != len(value.shape):
        return False
    pairs = [*zip(axes.of(value), axes.of(others[0]), strict=True)]
    apart = [bool(roots(mine)) - bool(roots(theirs)) for mine, theirs in pairs]
    return 1 in apart and -1 in apart


def _mixes(node: Node, value: Value, begun: frozenset, axes: Axes) -> bool:
    """Whether a product with weights leaves nothing of the map's own axes but the others."""
    out = frozenset().union(*map(roots, axes.of(node.outs[0])))
    return not out & begun


def _normalised(
    start: Value, begun: frozenset, flows: dict, data: Collection[Value], axes: Axes
) -> bool:
    """Whether something is divided by a sum of the exponential.

    What comes after the product that sums over its axis is another layer's, but for a sum that is
    cut out of the product itself: queries divided by their norm are no weights.
    """
    waiting, seen = [(start, False)], set()
    while waiting:
        value, multiplied = waiting.pop()
        if (value, multiplied) in seen:
            continue
        seen.add((value, multiplied))
        for node, out in flows.get(value, ()):
            if node is None:
                waiting.append((out, multiplied))
                continue
            if node.name in DIV | LOG and node.ins[-1] is value:
                return True
            if node.name in POWERS and node.outs[0] is not start and node.ins[0] is value:
                return True
            if node.name in DOT and all(atom in data for atom in node.ins):
                summed = _weighs(node, value, begun, axes)
                waiting.append((out, multiplied or summed))
            elif not multiplied or node.name in primitives.MASKING:
                waiting.append((out, multiplied))
    return False
