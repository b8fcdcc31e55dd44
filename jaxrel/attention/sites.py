"""Attention maps of a model nobody prepared: found in its graph by what they do.

An attention site is a softmax whose output reaches, through moves and masks, a product with
values that depend on the explained data, in which the softmax's axis is summed over. That
covers Flax's attention modules (NNX and Linen), `jax.nn.dot_product_attention` where XLA
computes it, grouped queries, and attention written with einsum or `@`. The sites of layers
that follow one another, scanned or unrolled, form a stack.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.tracing.analysis import dependents
from jaxrel.tracing.graph import Graph, Node, Traced, Value, tag_name, trace
from jaxrel.tracing.patterns import MOVES, origin, softmaxes

# What may stand between a softmax and the product with the values: masks and dropout.
_MASKING = MOVES | {"select_n", "mul", "div"}

# Operations with programs of their own in which attention would be seen.
_KNOWN_PROGRAMS = ("custom_jvp_call", "custom_vjp_call", "custom_lin", "scatter", "reduce", "sort")


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One attention map in a graph. Axes are those of `value`; `heads` may be several or none."""

    value: Value
    batch: int | None
    heads: tuple[int, ...]
    query: int
    key: int
    where: str
    name: str | None = None
    before: Value | None = None
    after: Value | None = None
    is_self: bool = True
    scan: Node | None = None
    length: int = 1

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
        return sum(site.length for site in self.sites)

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        _, _, query, key = self.sites[0].shape
        return query == key and all(site.is_self for site in self.sites)

    @property
    def has_residual(self) -> bool:
        """Whether the residual stream before each attention and its output were found."""
        return all(site.before is not None and site.after is not None for site in self.sites)

    def __str__(self):
        batch, heads, query, key = self.sites[0].shape
        kind = "self-attention" if self.is_self else "cross-attention"
        residual = "" if self.has_residual else ", no residual stream found"
        return (
            f"{self.name!r}: {kind}, layers {self.layers}, batch {batch}, heads {heads}, "
            f"queries {query}, keys {key}{residual}, at {self.sites[0].where}"
        )


def sites(fun: Callable, *, argnums: int | Sequence[int] | None = None) -> Callable:
    """List the attention stacks of a function, by the names `relevance` knows them by.

    Args:
      fun: any JAX function; see `relevance`.
      argnums: which arguments hold the data; see `relevance`.

    Returns:
      A function `(*args) -> tuple of Stack`; printing a stack says its kind, sizes and source
      line. A stack is named by the tag of its maps, or 'attention', 'attention_1', ...

    Raises:
      NotImplementedError: (when called) attention inside a kernel or a function with a
        derivative of its own, where its maps cannot be reached.
    """

    def listed(*args):
        return find_stacks(trace(fun, *args), args, argnums)

    return listed


def find_stacks(traced: Traced, args: tuple, argnums: Any = None) -> tuple[Stack, ...]:
    """The stacks of a traced call."""
    graph = traced.graph
    data = dependents(graph, _data_values(traced, args, argnums))
    batch = graph.outs[0].shape[0] if graph.outs and graph.outs[0].shape else None
    found = list(_find_sites(graph, data, batch, None, 1))
    groups: list[list[Site]] = []
    for site in found:
        home = next((group for group in groups if _continues(graph, group[-1], site)), None)
        if home is None:
            groups.append([site])
        else:
            home.append(site)
    return tuple(_named(groups))


def tagged_stack(traced: Traced, name: str) -> Stack | None:
    """The stack of maps tagged `name`, [batch, heads, query, key] each, or None.

    The residual stream before the attention and the attention's output are the values tagged
    `name/before` and `name/after`.
    """
    found = list(_tagged_sites(traced.graph, name, None, 1))
    return Stack(name, tuple(found)) if found else None


def _data_values(traced: Traced, args: tuple, argnums: Any) -> list[Value]:
    """Inputs that count as data: the named arguments, or all that are no NNX module."""
    if argnums is None:
        chosen = [not isinstance(arg, nnx.Module) for arg in args]
    else:
        numbers = {argnums} if isinstance(argnums, int) else set(argnums)
        chosen = [i in numbers or i - len(args) in numbers for i in range(len(args))]
    flags = [c for c, arg in zip(chosen, args, strict=True) for _ in jax.tree.leaves(arg)]
    return [value for value, flag in zip(traced.graph.ins, flags, strict=True) if flag]


def _find_sites(
    graph: Graph, data: frozenset[Value], batch: int | None, scan: Node | None, length: int
) -> Iterator[Site]:
    users = graph.users()
    softmax = {node: scores for node, scores in softmaxes(graph) if scores in data}
    for node in graph.nodes:
        if node in softmax:
            yield from _site(graph, node, users, data, batch, scan, length)
        elif node.is_control:
            steps = node.params["length"] if node.name == "scan" else 1
            outer = node if node.name == "scan" else scan
            for body in node.bodies:
                yield from _find_sites(body, data, batch, outer, length * steps)
        elif any(atom in data for atom in node.ins):
            _refuse_hidden(node, data)


def _refuse_hidden(node: Node, data: frozenset[Value]) -> None:
    """Raise if a program that cannot be entered computes attention, or may."""
    hidden = any(True for body in node.bodies for _ in _find_sites(body, data, None, None, 1))
    known = node.name.startswith(_KNOWN_PROGRAMS)
    if hidden or (node.bodies and not known) or "attention" in node.name:
        what = "computes attention" if hidden else "may compute attention"
        raise NotImplementedError(
            f"{node.name} at {node.where()} {what} where its maps cannot be reached; "
            "use plain XLA attention (jax.nn.dot_product_attention(..., implementation='xla')), "
            "or call jaxrel inside the shard_map"
        )


def _site(
    graph: Graph,
    softmax: Node,
    users: dict[Value, list[Node]],
    data: frozenset[Value],
    batch: int | None,
    scan: Node | None,
    length: int,
) -> Iterator[Site]:
    product = _product(softmax.outs[0], users, data)
    if product is None:
        return
    node, value, name = product
    side = node.ins.index(value)
    contract, batched = (dims[side] for dims in node.params["dimension_numbers"])
    free = [a for a in range(len(value.shape)) if a not in contract and a not in batched]
    if len(contract) != 1 or not free:
        return
    query = next((axis for axis in reversed(free) if value.shape[axis] > 1), free[-1])
    first, heads = _batch_axis(value, tuple(batched), batch)
    site = Site(
        value=value,
        batch=first,
        heads=(*heads, *(a for a in free if a != query and value.shape[a] > 1)),
        query=query,
        key=contract[0],
        where=node.where(),
        name=name,
        scan=scan,
        length=length,
    )
    before, after = _residual(node.outs[0], users, data)
    if before is None or after is None:
        yield site
        return
    # Self-attention reads its values from the stream it is added to.
    is_self = node.ins[1 - side] in dependents(graph, [origin(before, graph.producers())])
    if not (_is_stream(before, site) and _is_stream(after, site)):
        before = after = None
    yield dataclasses.replace(site, before=before, after=after, is_self=is_self)


def _is_stream(value: Value, site: Site) -> bool:
    """Whether a value is [batch, tokens, width], give or take axes of length 1."""
    batch, _, tokens, _ = site.shape
    sizes = [size for size in value.shape[:-1] if size != 1]
    return sizes == [size for size in (batch, tokens) if size != 1]


def _product(
    value: Value, users: dict[Value, list[Node]], data: frozenset[Value], name: str | None = None
) -> tuple[Node, Value, str | None] | None:
    """The product of a softmax with values: (product, its operand, the tag on the way)."""
    for node in users.get(value, ()):
        if node.name == "dot_general" and all(atom in data for atom in node.ins):
            return node, value, name
        if node.name in _MASKING:
            found = _product(node.outs[0], users, data, tag_name(node) or name)
            if found is not None:
                return found
    return None


def _batch_axis(
    value: Value, batched: tuple[int, ...], batch: int | None
) -> tuple[int | None, tuple[int, ...]]:
    """Which of the product's batch axes is the batch of examples; the others are heads."""
    several = len(batched) > 1
    if batched and (several if batch is None else value.shape[batched[0]] == batch):
        return batched[0], batched[1:]
    return None, batched


def _residual(
    out: Value, users: dict[Value, list[Node]], data: frozenset[Value]
) -> tuple[Value | None, Value | None]:
    """The residual stream before the attention and the output added to it, if it is added."""
    value = out
    while True:
        if len(users.get(value, ())) != 1:
            return None, None
        (node,) = users[value]
        active = [atom for atom in node.ins if atom in data]
        if node.name in ("add", "add_any") and len(active) == 2:
            other = active[1] if active[0] is value else active[0]
            same = other.shape == value.shape and other is not value
            return (other, value) if same else (None, None)
        if len(active) != 1 or node.name not in _MASKING | {"add", "dot_general"}:
            return None, None
        value = node.outs[0]


def _continues(graph: Graph, last: Site, site: Site) -> bool:
    if (site.name, site.shape, site.is_self) != (last.name, last.shape, last.is_self):
        return False
    return site.name is not None or site.value in dependents(graph, [last.value])


def _named(groups: list[list[Site]]) -> Iterator[Stack]:
    taken = {group[0].name for group in groups}
    count = 0
    for group in groups:
        name = group[0].name
        while name is None or (group[0].name is None and name in taken):
            name = "attention" if count == 0 else f"attention_{count}"
            count += 1
        yield Stack(name, tuple(group))


def _tagged_sites(graph: Graph, name: str, scan: Node | None, length: int) -> Iterator[Site]:
    tags = [(tag_name(node), node) for node in graph.nodes]
    # One map, one residual and one output per layer, in the same order.
    maps = [node for tag, node in tags if tag == name]
    before = [node.outs[0] for tag, node in tags if tag == f"{name}/before"]
    after = [node.outs[0] for tag, node in tags if tag == f"{name}/after"]
    complete = len(before) == len(after) == len(maps)
    for index, node in enumerate(maps):
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
            name=name,
            before=before[index] if complete else None,
            after=after[index] if complete else None,
            scan=scan,
            length=length,
        )
    for node in graph.nodes:
        if node.is_control:
            steps = node.params["length"] if node.name == "scan" else 1
            outer = node if node.name == "scan" else scan
            for body in node.bodies:
                yield from _tagged_sites(body, name, outer, length * steps)
