"""Attention by blocks of queries: the same rules, and no map of all tokens.

Every rule of the operations between queries, keys and values (the softmax's Taylor expansion, half
of a product for each factor) is local in the queries, so a block of rows is propagated as the whole
map is, and computed again in the backward pass.
"""

import dataclasses
from collections.abc import Mapping

from jaxrel.propagation.assignment import Choice, Prepared
from jaxrel.propagation.operations import Linear
from jaxrel.propagation.rules import (
    ActivationRule,
    Epsilon,
    Gradient,
    ProductRule,
    Rule,
    Stop,
)
from jaxrel.tracing import primitives
from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.graph import Node, Value
from jaxrel.tracing.primitives import DOT, MASKING
from jaxrel.tracing.rows import NotByRows, Places, Rows, find_rows


def by_blocks(prepared: Prepared, block: int) -> Prepared:
    """The graph with steps that compute attention by blocks of queries.

    Args:
      prepared: from `prepare`.
      block: how many queries at a time; attention of no more is left as it is.

    Raises:
      NotImplementedError: the rows of a map cannot be computed apart, or relevance is asked for
        inside of an attention.
    """
    places = Places(prepared.graph)
    apart = {_node_of(choice): choice for choice in prepared.choices if not _by_rows(choice.rule)}
    tags = {value: name for name, value in prepared.tagged}
    steps = dict(prepared.steps)
    for choice in prepared.choices:
        if choice.operation.kind != "softmax":
            continue
        found = _map_of(choice.operation.node.outs[0], places, block)
        if found is None:
            continue
        try:
            rows = find_rows(places, *found, prepared.steps)
            _check_rules(rows, apart)
        except NotByRows as error:
            raise NotImplementedError(
                f"lrp: block={block}, and the attention at {choice.operation.where()} cannot be "
                f"computed by blocks of queries: {error}. Leave out block"
            ) from error
        _check_tags(rows, tags, block)
        steps[rows.product] = _step_of(rows, block)
    return dataclasses.replace(prepared, steps=steps)


def _step_of(rows: Rows, block: int) -> Step:
    atoms = tuple(one.atom for one in rows.ins)
    return Step(atoms, lambda *values: [rows.compute(values, block)[0]])


def _map_of(value: Value, places: Places, block: int) -> tuple[Value, int, int] | None:
    """The map that a softmax becomes, with its axes of queries and of keys; None if it is none.

    Where values are weighed by one row alone there are no queries.
    """
    waiting = [value]
    while waiting:
        value = waiting.pop()
        for node in places.users.get(value, ()):
            if node.name in DOT:
                return _axes_of(node, value, block)
            if node.name in MASKING:
                waiting += node.outs
    return None


def _axes_of(product: Node, value: Value, block: int) -> tuple[Value, int, int] | None:
    side = product.ins.index(value)
    contracted, batched = (dims[side] for dims in primitives.contraction(product.equation))
    ranks = range(len(value.shape))
    free = [axis for axis in ranks if axis not in contracted and axis not in batched]
    query = max(free, key=lambda axis: value.shape[axis], default=None)
    if query is None or len(contracted) != 1 or value.shape[query] <= block:
        return None
    return value, query, contracted[0]


def _node_of(choice: Choice) -> Node:
    """The node that an operation's step replaces."""
    operation = choice.operation
    apart = getattr(choice.rule, "bias", "fused") == "separate"
    if isinstance(operation, Linear) and apart and not operation.folded:
        return operation.moves[-1] if operation.moves else operation.core
    return operation.node


def _by_rows(rule: Rule | None) -> bool:
    """Whether a rule shares each output's relevance by itself, whatever the others are."""
    if type(rule) is Epsilon:
        return not callable(rule.epsilon)
    return rule is None or isinstance(rule, Gradient | Stop | ProductRule | ActivationRule)


def _check_rules(rows: Rows, apart: Mapping[Node, Choice]) -> None:
    for one in rows.nodes:
        if one.step is not None and one.node in apart:
            raise NotByRows(
                f"{apart[one.node].rule} at {one.node.where()} is not known to share each query's "
                "relevance by itself"
            )


def _check_tags(rows: Rows, tags: Mapping[Value, str], block: int) -> None:
    for one in rows.nodes[:-1]:
        if one.out[0] in tags:
            raise NotImplementedError(
                f"lrp: block={block}, and relevance is asked for at {tags[one.out[0]]!r}, inside "
                f"of the attention at {one.node.where()}, of which no whole map is there. Leave "
                "out block"
            )
