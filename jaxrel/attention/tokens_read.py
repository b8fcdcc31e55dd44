"""Which tokens a function reads after its last layer of attention.

The relevance of a score is a row of the relevance matrix, that of the token which the score is read
from. Where the program says which token that is, another target token is a mistake.
"""

from collections.abc import Iterator

import numpy as np

from jaxrel.attention.residual import ancestors
from jaxrel.attention.stacks import Site
from jaxrel.tracing import primitives
from jaxrel.tracing.axes import Axes, roots, same
from jaxrel.tracing.facts import is_elementwise
from jaxrel.tracing.graph import Graph, Node, Value

_KEPT = (
    primitives.MOVES
    | primitives.SUMS
    | primitives.SLICES
    | primitives.CONCATENATE
    | primitives.DOT
    | primitives.KEEPS
)


class _Unknown(Exception):
    """An operation after which it is not known what is of which token."""


def tokens_read(graph: Graph, site: Site, axes: Axes) -> np.ndarray | None:
    """The indices of the tokens that the function's output reads of the last layer, in order.

    Args:
      graph: the program.
      site: the map of the last layer.
      axes: what is known of the program's axes.

    Returns:
      The indices; None where they are not known, as of those picked by the data.
    """
    if site.windows is not None or site.in_parts or site.mapped or not site.tokens:
        return None
    live = ancestors(*graph.outs, producers=graph.producers())
    first = site.place[0]
    found: dict[Value, tuple[int, np.ndarray]] = {}
    if first.node is None:
        found[site.value] = site.query, np.arange(site.size(site.query))
    else:
        outs = ((out, [*_places(out, site, axes)]) for out in first.node.outs)
        found |= {out: places[0] for out, places in outs if len(places) == 1}
    read: set[int] = set()
    try:
        for node in graph.nodes[first.number + (first.node is not None) :]:
            if any(out in live for out in node.outs) and any(v in found for v in node.ins):
                read.update(_read(node, site, axes, found))
    except _Unknown:
        return None
    return np.array(sorted(read)) if read else None


def _places(value: Value, site: Site, axes: Axes) -> Iterator[tuple[int, np.ndarray]]:
    """Axes of a value that are the tokens', or some of them, and which."""
    for number in range(len(value.shape)):
        part = axes.part(value, number)
        if part is not None and same(part.axis, site.tokens):
            yield number, part.entries


def _read(node: Node, site: Site, axes: Axes, found: dict) -> set[int]:
    """What a node reads of the tokens; what still has them apart is found then."""
    ins = [(atom, *found[atom]) for atom in node.ins if atom in found]
    dropped = primitives.reduced_axes(node.equation)
    kept = node.name in _KEPT or dropped is not None or is_elementwise(node)
    if not kept or _weighs_tokens(node, axes, found):
        raise _Unknown
    read: set[int] = set()
    for out in node.outs:
        places = list(_places(out, site, axes))
        if len(places) > 1:
            raise _Unknown
        for _, entries in places:
            if len(entries) == 1:
                read.update(entries.tolist())
            else:
                found[out] = places[0]
        if not places:
            if any(dropped is None or axis not in dropped for _, axis, _ in ins):
                raise _Unknown
            read.update(*(entries.tolist() for *_, entries in ins))
    return read - {-1}


def _weighs_tokens(node: Node, axes: Axes, found: dict) -> bool:
    """Whether it multiplies by, or chooses by, what differs from token to token, as a mask does."""
    if node.name not in primitives.SCALES | primitives.SELECT:
        return False
    places = {found[atom][0] for atom in node.ins if atom in found}
    others = [atom for atom in node.ins if isinstance(atom, Value) and atom not in found]
    return any(roots(axes.of(atom)[i]) for atom in others for i in places if i < len(atom.shape))
