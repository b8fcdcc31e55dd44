"""Structures that have no primitive of their own, found in a graph by what they compute."""

from collections.abc import Iterator

from jaxrel.tracing.graph import Atom, Graph, Node, Value, tag_name

# Operations that move or retype values and change none of them.
MOVES = frozenset(
    {
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "copy",
        "convert_element_type",
        "reduce_precision",
        "jaxrel_tag",
        "name",
    }
)


def softmaxes(graph: Graph) -> Iterator[tuple[Node, Value]]:
    """Each softmax of the graph (not of its bodies), as (last node, its input: the scores).

    Two forms are known: exp(s - max) / sum(exp(s - max)), and exp(s - logsumexp(s)).
    """
    producers = graph.producers()
    for node in graph.nodes:
        exp = _quotient(node, producers) if node.name == "div" else None
        if node.name == "exp" and _minus_logsumexp(node, producers):
            exp = node
        if exp is not None and isinstance(exp.ins[0], Value):
            yield node, exp.ins[0]


def trace_back(
    atom: Atom, producers: dict[Value, Node], through: frozenset[str] = MOVES
) -> Node | None:
    """The node that computed a value, looking past moves (and selects, if named)."""
    while isinstance(atom, Value) and atom in producers:
        node = producers[atom]
        if node.name not in through and tag_name(node) is None:
            return node
        # A select's last case is the one kept where a mask holds.
        atom = node.ins[-1] if node.name == "select_n" else node.ins[0]
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
    masked = MOVES | {"select_n"}
    numerator = trace_back(div.ins[0], producers, masked)
    total = trace_back(div.ins[1], producers)
    if numerator is None or total is None:
        return None
    if numerator.name != "exp" or total.name != "reduce_sum":
        return None
    return numerator if trace_back(total.ins[0], producers, masked) is numerator else None


def _minus_logsumexp(exp: Node, producers: dict[Value, Node]) -> bool:
    sub = trace_back(exp.ins[0], producers)
    if sub is None or sub.name != "sub":
        return False
    log = _find_log(sub.ins[1], producers)
    if log is None:
        return False
    # jax.nn.logsumexp takes the logarithm of an absolute value.
    total = trace_back(log.ins[0], producers, MOVES | {"abs"})
    if total is None or total.name != "reduce_sum":
        return False
    inner = trace_back(total.ins[0], producers)
    return inner is not None and inner.name == "exp"


def _find_log(atom: Atom, producers: dict[Value, Node]) -> Node | None:
    """The logarithm in log(sum(exp(s - max))) or in log(...) + max."""
    node = trace_back(atom, producers)
    if node is not None and node.name == "add":
        terms = (trace_back(term, producers) for term in node.ins)
        node = next((term for term in terms if term is not None and term.name == "log"), None)
    return node if node is not None and node.name == "log" else None
