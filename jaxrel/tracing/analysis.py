"""What is known of a graph's values before anything is run: facts that flow along the data."""

from collections.abc import Iterable

from jaxrel.tracing.graph import Graph, Node, Value


def dependents(graph: Graph, sources: Iterable[Value]) -> frozenset[Value]:
    """Every value, in the graph and in all bodies, that the sources' contents can influence.

    Shapes and dtypes do not count, integers and comparisons do, and `stop_gradient` is not a
    barrier: this is dependence, not differentiability. Loops are followed to a fixpoint.
    """
    found = set(sources)
    _follow(graph, found)
    return frozenset(found)


def _follow(graph: Graph, found: set[Value]) -> None:
    for node in graph.nodes:
        if node.is_control:
            _follow_control(node, found)
            continue
        reached = any(atom in found for atom in node.ins)
        for body in node.bodies:
            # What goes where inside an opaque program is not ours to know.
            found.update(body.ins if reached else ())
            _follow(body, found)
            reached = reached or any(out in found for out in body.outs)
        found.update(node.outs if reached else ())


def _follow_control(node: Node, found: set[Value]) -> None:
    if node.loop:
        _follow_while(node, found)
        return
    skip = 1 if node.is_cond else 0
    carries = node.scan.carries if node.scan else 0
    consts = node.scan.consts if node.scan else 0
    for body in node.bodies:
        operands = zip(node.ins[skip:], body.ins, strict=True)
        found.update(inner for atom, inner in operands if atom in found)
        _loop(body, consts, carries, found)
        outs = zip(node.outs, body.outs, strict=True)
        found.update(out for out, inner in outs if inner in found)
    if skip and node.ins[0] in found:
        found.update(node.outs)


def _follow_while(node: Node, found: set[Value]) -> None:
    assert node.loop is not None
    test, body = node.bodies
    tested, constants = node.loop
    operands = zip(node.ins[tested:], body.ins, strict=True)
    found.update(inner for atom, inner in operands if atom in found)
    _loop(body, constants, len(body.outs), found)
    # How often the loop runs depends on what its test reads.
    reads = [*node.ins[:tested], *body.outs]
    found.update(inner for atom, inner in zip(reads, test.ins, strict=True) if atom in found)
    _follow(test, found)
    if test.outs[0] in found:
        found.update(node.outs)
    found.update(out for out, inner in zip(node.outs, body.outs, strict=True) if inner in found)


def _loop(body: Graph, consts: int, carries: int, found: set[Value]) -> None:
    """Follow a body until what comes round with its state brings nothing new."""
    while True:
        _follow(body, found)
        state = body.ins[consts : consts + carries]
        new = {s for s, out in zip(state, body.outs[:carries], strict=True) if out in found}
        if new <= found:
            return
        found.update(new)
