"""Attention maps of a model that was not prepared for it: found in its graph by structure.

An attention site is a softmax whose output reaches, through moves and masks, a product with
values that depend on the explained data and that sums over the softmax's axis. That covers
Flax's attention modules (NNX and Linen), `jax.nn.dot_product_attention` where XLA computes it,
grouped queries, and attention written with einsum or `@`. The sites of successive layers,
scanned or unrolled, form a stack. What looks like attention and is not recognised is an error:
relevance over some of a model's layers is not the model's.

Axes are told apart by what they are (`tracing.axes`): queries and keys of one stream are
self-attention, a loop over heads is none over layers, windows are parts of the tokens. Where
that is not known, lengths decide: the batch is then the product's first batch axis. Streams are
[batch, tokens, width]; explain a model that has the tokens first through `jax.vmap` over its
examples.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp

from jaxrel.attention.coverage import find_starts, returns_map
from jaxrel.attention.residual import Residual, find_residual, stream_order
from jaxrel.attention.stacks import Site, Stack, Step
from jaxrel.attention.tokens_read import tokens_read
from jaxrel.attention.windows import find_windows, flat, token_axes
from jaxrel.tracing import primitives
from jaxrel.tracing.axes import Axes, Axis, Extension, roots, same
from jaxrel.tracing.flow import dependents
from jaxrel.tracing.graph import Atom, Graph, Node, Traced, Value, tag_name, trace
from jaxrel.tracing.opaque import cure
from jaxrel.tracing.patterns import origin, softmaxes
from jaxrel.tracing.primitives import (
    ADD,
    CUSTOM,
    CUSTOM_JVP,
    DOT,
    MASKING,
    MOVES,
    REMAT,
    TRANSPARENT,
)
from jaxrel.tracing.rewrite import divide_first, open_calls


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
        reached, a map used in several forms, or attention in a form that is not recognised.
      ValueError: (when called) the batch of examples is not an axis of a map, or `argnums` does
        not fit the call.
    """

    def listed(*args):
        return find_stacks(trace_attention(fun, *args), args, argnums)

    return listed


def trace_attention(fun: Callable, *args) -> Traced:
    """Trace a call, and open functions with their own derivative that compute attention.

    A map inside such a function has no gradient by that derivative; the gradient that counts is
    the one of the operations that the function computes. A map that a `jax.checkpoint` returns
    meets its values outside, so it is opened too.
    """
    traced = trace(fun, *args)
    graph = divide_first(open_calls(traced.graph, _attends))
    return dataclasses.replace(traced, graph=graph)


def _attends(node: Node) -> bool:
    """Whether a function with its own derivative computes attention, or its softmax."""
    if node.name in REMAT:
        return returns_map(node.bodies[0])
    if node.name not in CUSTOM or len(node.bodies) != 1:
        return False
    body = divide_first(open_calls(node.bodies[0], lambda inner: inner.name in CUSTOM))
    if node.name in CUSTOM_JVP:
        return any(True for _ in softmaxes(body))
    return _computes_attention(body, dependents(body, body.ins))


def _computes_attention(graph: Graph, data: frozenset[Value]) -> bool:
    users = graph.users()
    direct = any(
        any(True for _ in _products(node.outs[0], users, data))
        for node, scores in softmaxes(graph)
        if scores in data
    )
    inner = (body for node in graph.nodes for body in node.bodies)
    return direct or any(_computes_attention(body, data) for body in inner)


class Sites(NamedTuple):
    """What was found in a graph.

    Attributes:
      sites: the attention maps, in the order of the program.
      hidden: what weighs values by scores of the data, and is not recognised.
      axes: what is known of axes.
    """

    sites: list[Site]
    hidden: tuple[Node, ...]
    axes: Axes


def find_sites(traced: Traced, data: Sequence[Value], constants: Sequence[Value] = ()) -> Sites:
    """The attention maps of a traced call, and what may be one and is not recognised.

    Args:
      traced: the call.
      data: the values that attention is over.
      constants: more of these, that a stream starts from; their examples are known by number.
    """
    sources = dependents(traced.graph, [*data, *constants])
    finder = _Finder(traced.graph, sources, constants)
    sites = list(finder.sites(traced.graph, (), ()))
    return Sites(sites, (*finder.starts.hidden, *finder.unread), finder.axes)


def find_stacks(traced: Traced, args: tuple, argnums: Any = None) -> tuple[Stack, ...]:
    """The stacks of a traced call.

    Raises:
      NotImplementedError: what looks like attention is not recognised, so that its layer would
        be missing from every stack.
    """
    found = find_sites(traced, data_values(traced, args, argnums))
    stacks = stacks_of(traced.graph, found.sites)
    refuse_left_out(found, stacks)
    return tuple(
        dataclasses.replace(stack, read=tokens_read(traced.graph, stack.sites[-1], found.axes))
        for stack in stacks
    )


def stacks_of(graph: Graph, sites: Sequence[Site]) -> tuple[Stack, ...]:
    """The sites of successive layers together, with their names."""
    groups: list[list[Site]] = []
    for site in sites:
        homes = [group for group in groups if _continues(graph, group[-1], site)]
        same_stream = [group for group in homes if _same_stream(graph, group[-1], site)]
        if len(same_stream or homes) == 1:
            (same_stream or homes)[0].append(site)
        else:
            groups.append([site])
    return tuple(_named(groups))


def refuse_left_out(found: Sites, listed: Sequence[Any] = ()) -> None:
    """Raise NotImplementedError if what looks like attention is not recognised."""
    if found.hidden:
        listing = "; ".join(map(str, listed)) or "nothing else"
        raise NotImplementedError(
            f"attention: the softmax at {found.hidden[0].where()} weighs values by scores of the "
            "data, and its map [batch, heads, query, key] is not recognised; relevance would be "
            f"that of the other layers alone ({listing}). Write it with jax.nn.softmax, or tag the "
            "map of every layer where it multiplies the values, attn = jaxrel.tag(attn, 'maps'), "
            "and say attention='maps'"
        )


def data_values(traced: Traced, args: tuple, argnums: Any) -> list[Value]:
    """Inputs that count as data: the named arguments, or all that are not NNX modules.

    Of several, trees of arrays without the output's examples are parameters, and no data either.
    """
    if argnums is None:
        chosen = [not isinstance(arg, nnx.Module) for arg in args]
        if sum(chosen) > 1:
            chosen = _without_parameters(traced, args, chosen)
    else:
        numbers = {argnums} if isinstance(argnums, int) else set(argnums)
        if not all(-len(args) <= number < len(args) for number in numbers):
            raise ValueError(f"argnums {argnums} does not fit a call with {len(args)} arguments")
        chosen = [i in numbers or i - len(args) in numbers for i in range(len(args))]
    flags = [c for c, arg in zip(chosen, args, strict=True) for _ in jax.tree.leaves(arg)]
    return [value for value, flag in zip(traced.graph.ins, flags, strict=True) if flag]


def _without_parameters(traced: Traced, args: tuple, chosen: list[bool]) -> list[bool]:
    """The chosen arguments but trees of real arrays of which none has the output's examples."""
    out = traced.graph.outs[0] if traced.graph.outs else None
    if not isinstance(out, Value) or not out.shape:
        return chosen
    axes = Axes(traced.graph, dependents(traced.graph, traced.graph.ins))
    sources = {root.source for root in axes.lineage(axes.of(out)[0])}
    values = iter(traced.graph.ins)
    kept = []
    for arg, some in zip(args, chosen, strict=True):
        leaves = [next(values) for _ in jax.tree.leaves(arg)]
        real = all(jnp.issubdtype(value.aval.dtype, jnp.floating) for value in leaves)
        tree = not jax.tree_util.all_leaves([arg])
        kept.append(some and not (sources and real and tree and not sources & {*leaves}))
    return kept if any(kept) else chosen


class _Finder:
    """The attention sites of a graph, with what is known of its axes."""

    def __init__(self, graph: Graph, data: frozenset[Value], constants: Sequence[Value] = ()):
        self.data = data
        arrays = (id(graph.constants[value]) for value in constants if value in graph.constants)
        self.constants = {*constants, *arrays}
        self.given = {value for value in graph.ins if value in data}
        self.axes = Axes(graph, data)
        self.starts = find_starts(graph, data, self.axes)
        shape = graph.outs[0].shape if graph.outs else ()
        self.batch = shape[0] if shape else None
        out = graph.outs[0] if shape else None
        self.examples = self.axes.of(out)[0] if isinstance(out, Value) else ()
        self.unread: list[Node] = []

    def sites(
        self, graph: Graph, place: tuple[Step, ...], outer: tuple[Graph, ...]
    ) -> Iterator[Site]:
        """The sites of a graph that stands at a place, inside of other graphs."""
        users = graph.users()
        for number, node in enumerate(graph.nodes):
            if node in self.starts.maps:
                here = (*place, Step(number))
                site = self._site(node, users, (*outer, graph), here)
                if site is not None:
                    yield site
            elif node.is_control:
                for body in node.bodies:
                    yield from self.sites(body, (*place, Step(number, node)), (*outer, graph))
            elif any(atom in self.data for atom in node.ins):
                _refuse_hidden(node, self.data)

    def _site(
        self,
        start: Node,
        users: dict[Value, list[Node]],
        graphs: tuple[Graph, ...],
        place: tuple[Step, ...],
    ) -> Site | None:
        products = list(_products(start.outs[0], users, self.data, tag_name(start)))
        if not products:
            return None
        node, value, name = products[0]
        if any(other is not value for _, other, _ in products):
            raise NotImplementedError(
                f"the attention map of the softmax at {start.where()} is used in several forms "
                "(masked or cast differently); compute the form once, and use it everywhere"
            )
        side = node.ins.index(value)
        contract, batched = (dims[side] for dims in primitives.contraction(node.equation))
        free = [a for a in range(len(value.shape)) if a not in contract and a not in batched]
        if len(contract) != 1 or not free:
            self.unread += [start] if free else []
            return None
        key = contract[0]
        values = primitives.contraction(node.equation)[0][1 - side][0]
        beside = self._beside(value, free, key, self.axes.of(node.ins[1 - side])[values])
        query = self._query(value, tuple(batched), free, key, beside)
        first, heads = self._batch_axis(value, tuple(batched), node)
        site = Site(
            value=value,
            batch=first,
            heads=(*heads, *(a for a in free if a != query and value.shape[a] > 1)),
            query=query,
            key=key,
            where=node.where(),
            place=place,
            name=name,
            tokens=self.axes.of(value)[query],
            keys=self.axes.of(value)[key],
            first_key=0 if beside is None else beside.start,
            own_keys=beside is not None,
        )
        found = self._residual(site, node, self.starts.maps[start], graphs)
        site = self._in_loops(site, found, graphs)
        return self._with_residual(site, found, node.ins[1 - side], graphs)

    def _beside(self, value: Value, free: list[int], key: int, values: Axis) -> Extension | None:
        """Where the queries' own keys begin, if the keys have constant ones beside them."""
        axes = self.axes.of(value)
        keys, held = self.axes.extension(axes[key]), self.axes.extension(values)
        if keys is None or held is None or keys.start != held.start:
            return None
        if not same(keys.axis, held.axis):
            return None
        return keys if any(same(axes[a], keys.axis) for a in free) else None

    def _query(
        self,
        value: Value,
        batched: tuple[int, ...],
        free: list[int],
        key: int,
        beside: Extension | None,
    ) -> int:
        """The queries' axis among several free ones, of which the others are query groups."""
        axes = self.axes.of(value)
        long = [axis for axis in free if value.shape[axis] > 1] or free
        keys = axes[key] if beside is None else beside.axis
        own = [axis for axis in long if same(axes[axis], keys)]
        # Groups are a part of the heads' axis, and what depends on weights alone.
        heads = frozenset().union(*(roots(axes[axis]) for axis in batched))
        apart = [axis for axis in long if not roots(axes[axis]) & heads]
        moving = [a for a in apart if any(root.source in self.data for root in roots(axes[a]))]
        alike = [axis for axis in long if value.shape[axis] == value.shape[key]]
        return (own or moving or alike or apart or long)[-1]

    def _batch_axis(
        self, value: Value, batched: tuple[int, ...], product: Node
    ) -> tuple[int | None, tuple[int, ...]]:
        """Which of the product's batch axes is the batch of examples; the others are heads."""
        if self.batch is None:
            return (batched[0], batched[1:]) if len(batched) > 1 else (None, batched)
        axes = self.axes.of(value)
        known = [axis for axis in batched if same(axes[axis], self.examples)]
        if len(known) == 1:
            return known[0], tuple(axis for axis in batched if axis != known[0])
        other = bool(batched) and same(axes[batched[0]], self.examples) is False
        if other:
            first = self.axes.lineage(axes[batched[0]])
            # Several arguments hold the same examples, each by axes of its own.
            firsts = all(root.source in self.given and root.axis == 0 for root in first)
            other = not firsts and not any(root.source in self.constants for root in first)
        if batched and value.shape[batched[0]] == self.batch and not other:
            return batched[0], batched[1:]
        folded = self.examples and set(self.examples) <= {f for a in axes for f in a}
        if self.batch == 1 or folded:
            return None, batched
        raise self._no_examples(value, product)

    def _no_examples(self, value: Value, product: Node) -> ValueError:
        return ValueError(
            f"the function returns {self.batch} scalars, one per example, but the attention map "
            f"{value.shape} at {product.where()} has no first axis of {self.batch} examples (they "
            "may be folded with heads or windows, or run one by one in a scan). Explain one "
            "example at a time, as in jax.vmap(attention.relevance(lambda x: fun(x[None])[0]))"
            "(batch), or tag the maps as [batch, heads, query, key]"
        )

    def _residual(
        self, site: Site, product: Node, scores: Value, graphs: tuple[Graph, ...]
    ) -> Residual | None:
        tokens = self.axes.lineage(site.tokens)
        found = find_residual(product, scores, tokens, graphs, self.data, self.axes)
        if found is None and not all(root.known for root in roots(site.tokens)):
            found = find_residual(product, scores, frozenset(), graphs, self.data, self.axes)
        return found

    def _with_residual(
        self, site: Site, residual: Residual | None, values: Atom, graphs: tuple[Graph, ...]
    ) -> Site:
        """Tell self-attention from another stream's, and keep a residual sum of its tokens."""
        *_, query, key = site.shape
        told = True if site.own_keys else same(site.tokens, site.keys)
        if told is None and residual is not None:
            # Self-attention reads its values from the stream it is added to.
            stream = origin(residual.before, graphs[-1].producers())
            told = query == key and values in dependents(graphs[0], [stream])
        is_self = bool(told) and (query == key or site.own_keys)
        order = None
        if residual is not None:
            order = self._order_of(residual, site)
            known = order or all(self._is_stream(value, site) for value in residual[:2])
            residual = residual if known else None
        return dataclasses.replace(site, residual=residual, order=order, is_self=is_self)

    def _order_of(self, residual: Residual, site: Site) -> tuple[int, ...] | None:
        """The axes of a stream with the examples first, then the tokens, if that is another order.

        None also where the axes are not known, or tokens have several.
        """
        examples = self._examples_of(site) if site.shape[0] > 1 else None
        orders = {stream_order(x, examples, site.tokens, self.axes) for x in residual[:2]} - {None}
        order = orders.pop() if len(orders) == 1 else None
        return None if order == tuple(range(len(residual.before.shape))) else order

    def _is_stream(self, value: Value, site: Site) -> bool:
        """Whether a value is [batch, tokens, width], apart from axes of length 1."""
        batch, _, tokens, _ = site.shape
        sizes = [size for size in value.shape[:-1] if size != 1]
        if sizes == [size for size in (batch, tokens) if size != 1]:
            return True
        examples = self._examples_of(site)
        axes = token_axes(value, examples, self.axes)
        whole = axes is not None and same(flat(axes, examples), site.tokens)
        return bool(whole) and math.prod(sizes) == batch * tokens

    def _in_loops(self, site: Site, residual: Residual | None, graphs: tuple[Graph, ...]) -> Site:
        """Tell loops over layers from loops over heads, and whole streams from windows."""
        around = [step.node for step in site.place[:-1]]
        mapped = tuple(
            node
            for node, inner in zip(around, graphs[1:], strict=True)
            if node is not None and node.scan and not _recurs(node, inner, site.value)
        )
        loops = [self.axes.scanned[node] for node in mapped]
        if self.batch not in (None, 1) and any(same(part, self.examples) for part in loops):
            raise self._no_examples(site.value, graphs[-1].nodes[site.place[-1].number])
        site = dataclasses.replace(site, mapped=mapped)
        return self._in_windows(site, loops, residual, graphs[-1].nodes[site.place[-1].number])

    def _examples_of(self, site: Site) -> Axis:
        """The identity of a map's examples: of several examples its batch axis, if it has one."""
        if self.batch in (None, 1) or site.batch is None:
            return self.examples
        return self.axes.of(site.value)[site.batch]

    def _in_windows(
        self, site: Site, loops: list[Axis], residual: Residual | None, product: Node
    ) -> Site:
        """Find what the map is of all tokens, where it is of a part of them or in another order."""
        axes, examples = self.axes.of(site.value), self._examples_of(site)
        folded = site.batch is None and self.batch not in (None, 1)
        parts = [*loops, *(axes[axis] for axis in site.heads)]
        if site.batch is not None and axes[site.batch] != examples:
            parts.append(axes[site.batch])
        stream = None
        if residual is not None:
            stream = token_axes(residual.before, examples, self.axes)
            # Tokens are not last, unless the channels come first.
            if self.axes.lineage(self.axes.of(residual.before)[-1]) & self.axes.lineage(
                site.tokens
            ):
                stream = None
        tokens = flat(stream, examples) if stream else site.tokens
        family = self.axes.lineage(tokens) | self.axes.lineage(site.tokens)
        in_parts = any(self.axes.lineage(part) & family for part in parts) and not folded
        moved = bool(roots(tokens) and site.tokens) and not roots(tokens) & roots(site.tokens)
        related = self.axes.lineage(site.keys) & self.axes.lineage(site.tokens)
        apart = related and same(site.tokens, site.keys) is False
        if not (folded or in_parts or moved or apart) or site.own_keys:
            return site
        places = (site.query + len(loops), site.key + len(loops))
        windows = find_windows([*loops, *axes], *places, examples, stream, self.axes)
        if windows is None and folded:
            raise self._no_examples(site.value, product)
        if windows is None:
            # In another order than the stream's, which is not known, rows are no tokens' either.
            return dataclasses.replace(site, in_parts=in_parts or moved)
        stream_of = windows.stream
        return dataclasses.replace(site, windows=windows, tokens=stream_of, keys=stream_of)


def _recurs(scan: Node, body: Graph, value: Value) -> bool:
    """Whether a scan's later iterations depend on a map of the earlier ones."""
    assert scan.scan is not None
    first, count = scan.scan.consts, scan.scan.carries
    made = dependents(body, [value])
    ins = body.ins[first : first + count]
    state = [given for given, out in zip(ins, body.outs, strict=False) if out in made]
    return value in dependents(body, state)


def _refuse_hidden(node: Node, data: frozenset[Value]) -> None:
    """Raise if a program that cannot be entered computes attention, or may."""
    for inner in (inner for body in node.bodies for inner in body.walk()):
        if not inner.is_control and any(atom in data for atom in inner.ins):
            _refuse_hidden(inner, data)
    hidden = any(_computes_attention(body, data) for body in node.bodies)
    known = node.name in TRANSPARENT
    if hidden or (node.bodies and not known) or "attention" in node.name:
        what = "computes attention" if hidden else "may compute attention"
        plain = "use plain XLA attention (jax.nn.dot_product_attention(..., implementation='xla'))"
        raise NotImplementedError(
            f"{node.name} at {node.where()} {what} where its maps cannot be reached; "
            f"{cure(node) or plain}"
        )


def _products(
    value: Value, users: dict[Value, list[Node]], data: frozenset[Value], name: str | None = None
) -> Iterator[tuple[Node, Value, str | None]]:
    """The products of a softmax with values: (product, its operand, the tag on the way)."""
    for node in users.get(value, ()):
        if node.name in DOT and all(atom in data for atom in node.ins):
            yield node, value, name
        elif node.name in MASKING:
            out = node.outs[node.ins.index(value) if len(node.outs) > 1 else 0]
            yield from _products(out, users, data, tag_name(node) or name)


def _kind(site: Site) -> tuple:
    """What the sites of a stack have in common."""
    return site.name, site.shape, site.is_self, site.own_keys, site.in_parts


def _continues(graph: Graph, last: Site, site: Site) -> bool:
    """Whether a site may be a later layer of an earlier one's stack."""
    if _kind(site) != _kind(last):
        return False
    if same(site.tokens, last.tokens) is False:
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
