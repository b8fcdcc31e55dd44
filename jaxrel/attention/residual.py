"""The residual stream around an attention: where its output is added to what it came from."""

from collections.abc import Collection
from typing import NamedTuple

from jaxrel.tracing import primitives
from jaxrel.tracing.axes import Axes, Axis, same
from jaxrel.tracing.flow import dependents
from jaxrel.tracing.graph import Atom, Graph, Node, Value
from jaxrel.tracing.primitives import ADD, DOT, KEEPS, MOVES, SCALES, SELECT, SUMS

# What leaves a stream the stream: retyped, scaled, masked, with something added.
_STREAM = MOVES | KEEPS | SCALES | SELECT | SUMS


class Residual(NamedTuple):
    """The residual sum around an attention: `total = before + after`."""

    before: Value
    after: Value
    total: Value


def find_residual(
    product: Node,
    scores: Value,
    tokens: frozenset,
    graphs: tuple[Graph, ...],
    data: Collection[Value],
    axes: Axes,
) -> Residual | None:
    """The sum of an attention's output and the stream that its queries come from.

    The output is followed through all that acts token by token (dense layers, norms, scales,
    gates, dropout) to the first sum with a value that the scores depend on. From a body that
    computes the attention alone it is followed outside.

    Args:
      product: the product of the map with the values.
      scores: what the softmax was given.
      tokens: what the queries' axis came from; nothing if that is not known.
      graphs: the graphs around the product, outermost first.
      data: the values that depend on the data.
      axes: the identities of axes.
    """
    starts, inner = set(product.outs), None
    for graph in reversed(graphs):
        holder = None
        if inner is not None:
            holder = next(node for node in graph.nodes if inner in node.bodies)
            kept = {out for out in inner.outs if out in starts}
            ends = zip(inner.outs, holder.outs, strict=True)
            starts = {out for end, out in ends if end in kept}
        made = dependents(graph, starts)
        before = _ancestors(graph, holder, scores)
        found, starts = _follow(graph, starts, made, before, tokens, data, axes)
        if found is not None or (holder is not None and not starts):
            return found
        inner = graph
    return None


def stream_order(
    value: Value, examples: Axis | None, tokens: Axis, axes: Axes
) -> tuple[int, ...] | None:
    """The axes of a stream in the order examples, tokens, others; None if these are not known.

    Args:
      value: the stream.
      examples: the identity of the examples; None for one example.
      tokens: the identity of the tokens.
      axes: the identities of axes.
    """
    found = axes.of(value)
    order: tuple[int, ...] = ()
    for known in (tokens,) if examples is None else (examples, tokens):
        places = [i for i, axis in enumerate(found) if same(axis, known)]
        if len(places) != 1 or places[0] in order:
            return None
        order += (places[0],)
    return (*order, *(i for i in range(len(found)) if i not in order))


def _ancestors(graph: Graph, holder: Node | None, scores: Value) -> set[Value]:
    """The values of a graph that the scores, in it or inside of a node, are computed from."""
    return ancestors(*([scores] if holder is None else holder.ins), producers=graph.producers())


def ancestors(*atoms: Atom, producers: dict[Value, Node]) -> set[Value]:
    """The values that some are computed from, and these."""
    waiting = [*atoms]
    found: set[Value] = set()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Value) and atom not in found:
            found.add(atom)
            if atom in producers:
                waiting += producers[atom].ins
    return found


def _follow(
    graph: Graph,
    starts: set[Value],
    made: Collection[Value],
    before: set[Value],
    tokens: frozenset,
    data: Collection[Value],
    axes: Axes,
) -> tuple[Residual | None, set[Value]]:
    """The residual sum in one graph, if it is there, and all values on the way."""
    producers = graph.producers()
    seen = set(starts)
    for node in graph.nodes:
        own = [atom for atom in node.ins if isinstance(atom, Value) and atom in seen]
        if not own:
            continue
        others = [atom for atom in node.ins if isinstance(atom, Value) and atom not in made]
        if node.name in ADD and len(own) == 1 and len(others) == 1:
            (after,), (other,) = own, others
            fits = other in data and other.shape == after.shape
            if fits and _is_stream(other, producers, before, tokens, axes):
                return Residual(other, after, node.outs[0]), seen
        outs = [out for out in node.outs if out in made]
        if outs and _by_token(node, own, outs, tokens, data, axes):
            seen.update(outs)
    return None, seen


def _by_token(
    node: Node,
    own: list[Value],
    outs: list[Value],
    tokens: frozenset,
    data: Collection[Value],
    axes: Axes,
) -> bool:
    """Whether an operation acts on each token of a value alone."""
    if node.is_control:
        return False
    if not tokens:
        active = [atom for atom in node.ins if isinstance(atom, Value) and atom in data]
        return node.name in primitives.MASKING | ADD | DOT and len(active) == 1
    if any(not tokens & _roots(out, axes) for out in outs):
        # What norms divide by has the tokens' axis too; what has not, has mixed the tokens.
        return False
    if node.name in DOT:
        return sum(bool(tokens & _roots(atom, axes)) for atom in node.ins) == 1
    return True


def _is_stream(
    value: Value, producers: dict[Value, Node], before: set[Value], tokens: frozenset, axes: Axes
) -> bool:
    """Whether a value is the stream that the scores come from, scaled or with others added."""
    waiting: list[Atom] = [value]
    seen: set[Value] = set()
    while waiting:
        atom = waiting.pop()
        if not isinstance(atom, Value) or atom in seen:
            continue
        seen.add(atom)
        own = _roots(atom, axes)
        # A stream that starts as zeros is alike for all tokens.
        if atom in before and (not tokens or not own or tokens & own):
            return True
        node = producers.get(atom)
        if node is not None and node.name in _STREAM:
            waiting += node.ins
    return False


def _roots(atom: Atom, axes: Axes) -> frozenset:
    if not isinstance(atom, Value):
        return frozenset()
    return frozenset().union(*map(axes.lineage, axes.of(atom)))
