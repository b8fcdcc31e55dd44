"""Structures that have no primitive of their own, found in a graph by what they compute."""

from collections.abc import Iterator

from jaxrel.tracing.graph import Atom, Graph, Node, Value, tag_name
from jaxrel.tracing.primitives import ABS, ADD, DIV, EXP, LOG, MOVES, MUL, REDUCE_SUM, SELECT, SUB


def softmaxes(graph: Graph) -> Iterator[tuple[Node, Value]]:
    """Each softmax of the graph (not of its bodies), as (last node, its input: the scores).

    Two forms are known: exp(s - max) / sum(exp(s - max)), and exp(s - logsumexp(s)).
    """
    producers = graph.producers()
    for node in graph.nodes:
        scores: Atom | None = None
        if node.name in DIV and (exp := _quotient(node, producers)) is not None:
            scores = exp.ins[0]
        elif node.name in EXP:
            scores = _minus_logsumexp(node, producers)
        if isinstance(scores, Value):
            yield node, scores


def trace_back(
    atom: Atom, producers: dict[Value, Node], through: frozenset[str] = MOVES
) -> Node | None:
    """The node that computed a value, looking past moves (and selects, if named)."""
    while isinstance(atom, Value) and atom in producers:
        node = producers[atom]
        if node.name not in through and tag_name(node) is None:
            return node
        # A select's last case is the one kept where a mask holds.
        atom = node.ins[-1] if node.name in SELECT else node.ins[0]
    return None


def origin(value: Value, producers: dict[Value, Node]) -> Value:
    """The value before it was moved, retyped or tagged."""
    while value in producers and producers[value].name in MOVES:
        before = producers[value].ins[0]
        if not isinstance(before, Value):
            return value
        value = before
    return value


def _quotient(div: Node, producers: dict[Value, Node]) -> Node | None:
    """The exponential of exp(.) / sum(exp(.)), masked or not."""
    total = trace_back(div.ins[1], producers)
    if total is None or total.name not in REDUCE_SUM:
        return None
    below = _exponentials(total.ins[0], producers)
    above = _exponentials(div.ins[0], producers)
    return above[0] if len(above) == 1 and above == below else None


def _exponentials(atom: Atom, producers: dict[Value, Node]) -> list[Node]:
    """The exponentials that a value is, behind moves and masks (selects and products)."""
    node = trace_back(atom, producers)
    if node is None:
        return []
    if node.name in EXP:
        return [node]
    if node.name not in SELECT | MUL:
        return []
    cases = node.ins[1:] if node.name in SELECT else node.ins
    found = (exp for case in cases for exp in _exponentials(case, producers))
    return list(dict.fromkeys(found))


def _minus_logsumexp(exp: Node, producers: dict[Value, Node]) -> Atom | None:
    """The scores s of exp(s - logsumexp(s))."""
    sub = trace_back(exp.ins[0], producers)
    if sub is None or sub.name not in SUB:
        return None
    log = _find_log(sub.ins[1], producers)
    if log is None:
        return None
    # jax.nn.logsumexp takes the logarithm of an absolute value.
    total = trace_back(log.ins[0], producers, MOVES | ABS)
    if total is None or total.name not in REDUCE_SUM:
        return None
    return sub.ins[0] if _exponentials(total.ins[0], producers) else None


def _find_log(atom: Atom, producers: dict[Value, Node]) -> Node | None:
    """The logarithm in log(sum(exp(s - max))) or in log(...) + max."""
    node = trace_back(atom, producers)
    if node is not None and node.name in ADD:
        terms = (trace_back(term, producers) for term in node.ins)
        node = next((term for term in terms if term is not None and term.name in LOG), None)
    return node if node is not None and node.name in LOG else None
