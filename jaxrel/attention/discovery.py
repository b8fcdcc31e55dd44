"""Attention maps of a model that was not prepared for it: found in its graph by structure.

An attention site is a softmax whose output reaches, through moves and masks, a product with
values that depend on the explained data and that sums over the softmax's axis. That covers
Flax's attention modules (NNX and Linen), `jax.nn.dot_product_attention` where XLA computes it,
grouped queries, and attention written with einsum or `@`. The sites of successive layers,
scanned or unrolled, form a stack.

Structure cannot tell apart axes of equal length. The batch is the product's first batch axis,
and streams are [batch, tokens, width]; explain a model that has the tokens first through
`jax.vmap` over its examples.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.tracing import primitives
from jaxrel.tracing.flow import dependents
from jaxrel.tracing.graph import Graph, Node, Traced, Value, tag_name, trace
from jaxrel.tracing.opaque import cure
from jaxrel.tracing.patterns import origin, softmaxes
from jaxrel.tracing.primitives import (
    ADD,
    CLIPS,
    CUSTOM,
    CUSTOM_JVP,
    DOT,
    MOVES,
    SCALES,
    SELECT,
    SLICES,
    TRANSPARENT,
    Scan,
)
from jaxrel.tracing.rewrite import open_calls

# What may stand between a softmax and the product with the values: masks, dropout, clips, and the
# slice that leaves out a sink.
_MASKING = MOVES | SELECT | SCALES | CLIPS | SLICES


class Step(NamedTuple):
    """A step on the way to a node: its number in its graph, and the node if it holds bodies."""

    number: int
    node: Node | None = None


class Residual(NamedTuple):
    """The residual sum around an attention: `total = before + after`."""

    before: Value
    after: Value
    total: Value


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One attention map in a graph. Axes are those of `value`; `heads` may be several or none."""

    value: Value
    batch: int | None
    heads: tuple[int, ...]
    query: int
    key: int
    where: str
    place: tuple["Step", ...]
    name: str | None = None
    residual: "Residual | None" = None
    is_self: bool = True

    def standard(self, x: Array) -> Array:
        """A map, or a gradient of its shape, as [batch, heads, query, key]."""
        batch = () if self.batch is None else (self.batch,)
        order = (*batch, *self.heads, self.query, self.key)
        dropped = tuple(axis for axis in range(x.ndim) if axis not in order)
        x = jnp.squeeze(jnp.transpose(x, (*dropped, *order)), tuple(range(len(dropped))))
        return x.reshape(self.size(self.batch), -1, *x.shape[-2:])

    def restore(self, x: Array) -> Array:
        """The inverse of `standard`."""
        batch = () if self.batch is None else (self.batch,)
        order = (*batch, *self.heads, self.query, self.key)
        dropped = tuple(axis for axis in range(len(self.value.shape)) if axis not in order)
        order = (*dropped, *order)
        x = x.reshape([self.value.shape[axis] for axis in order])
        return jnp.transpose(x, np.argsort(order).tolist())

    def size(self, axis: int | None) -> int:
        """Length of an axis of the map; 1 for an axis it does not have."""
        return 1 if axis is None else self.value.shape[axis]

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The scans around the site, outermost first."""
        nodes = (step.node for step in self.place)
        return tuple(node.scan for node in nodes if node is not None and node.scan)

    @property
    def in_cond(self) -> bool:
        """Whether the site may not be reached at all."""
        return any(step.node is not None and step.node.is_cond for step in self.place)

    def stages(self) -> Iterator[tuple[int, ...]]:
        """When each of the site's maps is computed: keys that sort by order of execution.

        One key per map, in the order in which scans stack them.
        """
        lengths = [scan.length for scan in self.scans]
        for indices in itertools.product(*map(range, lengths)):
            turns = iter(zip(self.scans, indices, strict=True))
            key: list[int] = []
            for step in self.place:
                key.append(step.number)
                if step.node is not None and step.node.scan:
                    scan, index = next(turns)
                    last = scan.length - 1
                    key.append(last - index if scan.reverse else index)
            yield tuple(key)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[batch, heads, query, key]."""
        heads = int(np.prod([self.value.shape[axis] for axis in self.heads]))
        return self.size(self.batch), heads, self.size(self.query), self.size(self.key)


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Attention sites of successive layers with maps of one shape."""

    name: str
    sites: tuple[Site, ...]

    @property
    def layers(self) -> int:
        """How many maps the stack holds."""
        return sum(math.prod(scan.length for scan in s.scans) for s in self.sites)

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        _, _, query, key = self.sites[0].shape
        return query == key and all(site.is_self for site in self.sites)

    @property
    def has_residual(self) -> bool:
        """Whether the residual stream before each attention and its output were found."""
        return all(site.residual is not None for site in self.sites)

    def __str__(self):
        batch, heads, query, key = self.sites[0].shape
        kind = "self-attention" if self.is_self else "cross-attention"
        residual = "" if self.has_residual else ", no residual stream found"
        return (
            f"{self.name!r}: {kind}, layers {self.layers}, batch {batch}, heads {heads}, "
            f"queries {query}, keys {key}{residual}, at {self.sites[0].where}"
        )


def sites(fun: Callable, *, argnums: int | Sequence[int] | None = None) -> Callable:
    """List the attention stacks of a function, with the names by which `relevance` knows them.

    Args:
      fun: any JAX function; see `relevance`.
      argnums: which arguments hold the data; see `relevance`.

    Returns:
      A function `(*args) -> tuple of Stack`; printing a stack says its kind, sizes and source
      line. A stack is named by the tag of its maps, or 'attention', 'attention_1', ...

    Raises:
      NotImplementedError: (when called) attention inside a kernel, where its maps cannot be
        reached, or a map used in several forms.
      ValueError: (when called) the batch of examples is not an axis of a map, or `argnums` does
        not fit the call.
    """

    def listed(*args):
        return find_stacks(trace_attention(fun, *args), args, argnums)

    return listed


def trace_attention(fun: Callable, *args) -> Traced:
    """Trace a call, and open functions with their own derivative that compute attention.

    A map inside such a function has no gradient by that derivative; the gradient that counts is
    the one of the operations that the function computes.
    """
    traced = trace(fun, *args)
    return dataclasses.replace(traced, graph=open_calls(traced.graph, _attends))


def _attends(node: Node) -> bool:
    """Whether a function with its own derivative computes attention, or its softmax."""
    if node.name not in CUSTOM or len(node.bodies) != 1:
        return False
    body = open_calls(node.bodies[0], lambda inner: inner.name in CUSTOM)
    if node.name in CUSTOM_JVP:
        return any(True for _ in softmaxes(body))
    try:
        return any(True for _ in _find_sites(body, dependents(body, body.ins), None, ()))
    except NotImplementedError:
        # A kernel, or a map in several forms: `_refuse_hidden` raises where the call stands.
        return False


def find_stacks(traced: Traced, args: tuple, argnums: Any = None) -> tuple[Stack, ...]:
    """The stacks of a traced call."""
    graph = traced.graph
    data = dependents(graph, data_values(traced, args, argnums))
    batch = graph.outs[0].shape[0] if graph.outs and graph.outs[0].shape else None
    groups: list[list[Site]] = []
    for site in _find_sites(graph, data, batch, ()):
        homes = [group for group in groups if _continues(graph, group[-1], site)]
        same_stream = [group for group in homes if _same_stream(graph, group[-1], site)]
        if len(same_stream or homes) == 1:
            (same_stream or homes)[0].append(site)
        else:
            groups.append([site])
    return tuple(_named(groups))


def tagged_stack(traced: Traced, name: str) -> Stack | None:
    """The stack of maps tagged `name`, [batch, heads, query, key] each, or None.

    The residual stream before the attention and the attention's output are the values tagged
    `name/before` and `name/after`; they must be added in the same scan body.
    """
    found = list(_tagged_sites(traced.graph, name, ()))
    return Stack(name, tuple(found)) if found else None


def data_values(traced: Traced, args: tuple, argnums: Any) -> list[Value]:
    """Inputs that count as data: the named arguments, or all that are not NNX modules."""
    if argnums is None:
        chosen = [not isinstance(arg, nnx.Module) for arg in args]
    else:
        numbers = {argnums} if isinstance(argnums, int) else set(argnums)
        if not all(-len(args) <= number < len(args) for number in numbers):
            raise ValueError(f"argnums {argnums} does not fit a call with {len(args)} arguments")
        chosen = [i in numbers or i - len(args) in numbers for i in range(len(args))]
    flags = [c for c, arg in zip(chosen, args, strict=True) for _ in jax.tree.leaves(arg)]
    return [value for value, flag in zip(traced.graph.ins, flags, strict=True) if flag]


def _find_sites(
    graph: Graph, data: frozenset[Value], batch: int | None, place: tuple[Step, ...]
) -> Iterator[Site]:
    users = graph.users()
    softmax = {node: scores for node, scores in softmaxes(graph) if scores in data}
    for number, node in enumerate(graph.nodes):
        if node in softmax:
            here = (*place, Step(number))
            yield from _site(graph, node, softmax[node], users, data, batch, here)
        elif node.is_control:
            for body in node.bodies:
                yield from _find_sites(body, data, batch, (*place, Step(number, node)))
        elif any(atom in data for atom in node.ins):
            _refuse_hidden(node, data)


def _refuse_hidden(node: Node, data: frozenset[Value]) -> None:
    """Raise if a program that cannot be entered computes attention, or may."""
    hidden = any(True for body in node.bodies for _ in _find_sites(body, data, None, ()))
    known = node.name in TRANSPARENT
    if hidden or (node.bodies and not known) or "attention" in node.name:
        what = "computes attention" if hidden else "may compute attention"
        plain = "use plain XLA attention (jax.nn.dot_product_attention(..., implementation='xla'))"
        raise NotImplementedError(
            f"{node.name} at {node.where()} {what} where its maps cannot be reached; "
            f"{cure(node) or plain}"
        )


def _site(
    graph: Graph,
    softmax: Node,
    scores: Value,
    users: dict[Value, list[Node]],
    data: frozenset[Value],
    batch: int | None,
    place: tuple[Step, ...],
) -> Iterator[Site]:
    products = list(_products(softmax.outs[0], users, data))
    if not products:
        return
    node, value, name = products[0]
    if any(other is not value for _, other, _ in products):
        raise NotImplementedError(
            f"the attention map of the softmax at {softmax.where()} is used in several forms "
            "(masked or cast differently); compute the form once, and use it everywhere"
        )
    side = node.ins.index(value)
    contract, batched = (dims[side] for dims in primitives.contraction(node.equation))
    free = [a for a in range(len(value.shape)) if a not in contract and a not in batched]
    if len(contract) != 1 or not free:
        return
    # Among several free axes (query groups) the queries' is as long as the keys', or the last.
    long = [axis for axis in free if value.shape[axis] > 1]
    alike = [axis for axis in long if value.shape[axis] == value.shape[contract[0]]]
    query = (alike or long or free)[-1]
    first, heads = _batch_axis(value, tuple(batched), batch, node)
    site = Site(
        value=value,
        batch=first,
        heads=(*heads, *(a for a in free if a != query and value.shape[a] > 1)),
        query=query,
        key=contract[0],
        where=node.where(),
        place=place,
        name=name,
    )
    residual = _residual(graph, node.outs[0], scores, users, data)
    if residual is None:
        yield site
        return
    # Self-attention reads its values from the stream it is added to.
    stream = origin(residual.before, graph.producers())
    is_self = node.ins[1 - side] in dependents(graph, [stream])
    known = _is_stream(residual.before, site) and _is_stream(residual.after, site)
    yield dataclasses.replace(site, residual=residual if known else None, is_self=is_self)


def _is_stream(value: Value, site: Site) -> bool:
    """Whether a value is [batch, tokens, width], apart from axes of length 1."""
    batch, _, tokens, _ = site.shape
    sizes = [size for size in value.shape[:-1] if size != 1]
    return sizes == [size for size in (batch, tokens) if size != 1]


def _products(
    value: Value, users: dict[Value, list[Node]], data: frozenset[Value], name: str | None = None
) -> Iterator[tuple[Node, Value, str | None]]:
    """The products of a softmax with values: (product, its operand, the tag on the way)."""
    for node in users.get(value, ()):
        if node.name in DOT and all(atom in data for atom in node.ins):
            yield node, value, name
        elif node.name in _MASKING:
            yield from _products(node.outs[0], users, data, tag_name(node) or name)


def _batch_axis(
    value: Value, batched: tuple[int, ...], batch: int | None, product: Node
) -> tuple[int | None, tuple[int, ...]]:
    """Which of the product's batch axes is the batch of examples; the others are heads."""
    if batch is None:
        return (batched[0], batched[1:]) if len(batched) > 1 else (None, batched)
    if batched and value.shape[batched[0]] == batch:
        return batched[0], batched[1:]
    if batch == 1:
        return None, batched
    raise ValueError(
        f"the function returns {batch} scalars, one per example, but the attention map "
        f"{value.shape} at {product.where()} has no first axis of {batch} examples (they may be "
        "folded with heads or windows, or run one by one in a scan). Explain one example at a "
        "time, as in jax.vmap(attention.relevance(lambda x: fun(x[None])[0]))(batch), or tag the "
        "maps as [batch, heads, query, key]"
    )


def _residual(
    graph: Graph,
    out: Value,
    scores: Value,
    users: dict[Value, list[Node]],
    data: frozenset[Value],
) -> Residual | None:
    """The sum of an attention's output and the stream that its queries come from."""
    producers = graph.producers()
    value, after = out, None
    while len(users.get(value, ())) == 1:
        (node,) = users[value]
        active = [atom for atom in node.ins if isinstance(atom, Value) and atom in data]
        if node.name in ADD and len(active) == 2:
            other = active[1] if active[0] is value else active[0]
            if other is value or other.shape != value.shape:
                return None
            after = value if after is None else after
            if scores in dependents(graph, [origin(other, producers)]):
                return Residual(other, after, node.outs[0])
        elif len(active) != 1 or node.name not in _MASKING | ADD | DOT:
            return None
        value = node.outs[0]
    return None


def _continues(graph: Graph, last: Site, site: Site) -> bool:
    if (site.name, site.shape, site.is_self) != (last.name, last.shape, last.is_self):
        return False
    return site.name is not None or site.value in dependents(graph, [last.value])


def _same_stream(graph: Graph, last: Site, site: Site) -> bool:
    """Whether the residual stream that a site is added to is the one of an earlier site."""
    if last.name is not None:
        return True
    if last.residual is None or site.residual is None:
        return False
    producers = graph.producers()
    waiting, seen = [site.residual.before], set()
    while waiting:
        value = waiting.pop()
        if value is last.residual.total:
            return True
        if value in seen or value not in producers:
            continue
        seen.add(value)
        node = producers[value]
        if node.name in MOVES | ADD:
            waiting += [atom for atom in node.ins if isinstance(atom, Value)]
    return False


def _named(groups: list[list[Site]]) -> Iterator[Stack]:
    taken = {group[0].name for group in groups}
    count = 0
    for group in groups:
        name = group[0].name
        while name is None or (group[0].name is None and name in taken):
            name = "attention" if count == 0 else f"attention_{count}"
            count += 1
        yield Stack(name, tuple(group))


def _tagged_sites(graph: Graph, name: str, place: tuple[Step, ...]) -> Iterator[Site]:
    tags = [(tag_name(node), node) for node in graph.nodes]
    # One map, one residual and one output per layer, in the same order.
    before = [node.outs[0] for tag, node in tags if tag == f"{name}/before"]
    after = [node.outs[0] for tag, node in tags if tag == f"{name}/after"]
    sums = [_sum_of(graph, *pair) for pair in zip(before, after, strict=False)]
    complete = len(before) == len(after) == sum(tag == name for tag, _ in tags)
    residuals = iter(sums if complete else ())
    for number, node in enumerate(graph.nodes):
        if node.is_control:
            for body in node.bodies:
                yield from _tagged_sites(body, name, (*place, Step(number, node)))
        if tag_name(node) != name:
            continue
        rank = len(node.outs[0].shape)
        if rank not in (3, 4):
            raise ValueError(
                f"the value tagged {name!r} at {node.where()} has shape {node.outs[0].shape}; "
                "an attention map is [batch, heads, query, key], or [heads, query, key] for one "
                "example"
            )
        yield Site(
            value=node.outs[0],
            batch=0 if rank == 4 else None,
            heads=(rank - 3,),
            query=rank - 2,
            key=rank - 1,
            where=node.where(),
            place=(*place, Step(number)),
            name=name,
            residual=next(residuals, None),
        )


def _sum_of(graph: Graph, before: Value, after: Value) -> Residual | None:
    """The addition of two tagged values, which may have been moved or retyped in between."""
    producers = graph.producers()

    def leads_back(atom: Any, target: Value) -> bool:
        while isinstance(atom, Value) and atom is not target:
            node = producers.get(atom)
            if node is None or node.name not in MOVES:
                return False
            atom = node.ins[0]
        return atom is target

    for node in graph.nodes:
        if node.name in ADD:
            for x, y in (node.ins, node.ins[::-1]):
                if leads_back(x, before) and leads_back(y, after):
                    return Residual(before, after, node.outs[0])
    return None
