"""Attention maps in a graph, and stacks of them: where they are, and how they are read."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.attention.residual import Residual
from jaxrel.attention.windows import Windows
from jaxrel.tracing.axes import Axis
from jaxrel.tracing.graph import Node, Value
from jaxrel.tracing.primitives import Scan


class Step(NamedTuple):
    """A step on the way to a node: its number in its graph, and the node if it holds bodies."""

    number: int
    node: Node | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One attention map in a graph. Axes are those of `value`; `heads` may be several or none.

    `order` are the axes of the residual sum's values as [batch, tokens, width], if they differ.
    """

    value: Value
    batch: int | None
    heads: tuple[int, ...]
    query: int
    key: int
    where: str
    place: tuple["Step", ...]
    name: str | None = None
    residual: "Residual | None" = None
    order: tuple[int, ...] | None = None
    is_self: bool = True
    tokens: Axis = ()
    keys: Axis = ()
    first_key: int = 0
    own_keys: bool = False
    mapped: tuple[Node, ...] = ()
    in_parts: bool = False
    windows: Windows | None = None

    def standard(self, x: Array) -> Array:
        """A map, or a gradient of its shape, as [batch, heads, query, key].

        Keys beside the queries' own (a cache, a sink) are no tokens and are left out. The maps of
        windows are one map of all tokens.
        """
        if self.windows is not None:
            return self.windows.whole(x)
        batch = () if self.batch is None else (self.batch,)
        order = (*batch, *self.heads, self.query, self.key)
        dropped = tuple(axis for axis in range(x.ndim) if axis not in order)
        x = jnp.squeeze(jnp.transpose(x, (*dropped, *order)), tuple(range(len(dropped))))
        x = x.reshape(self.size(self.batch), -1, *x.shape[-2:])
        if not self.own_keys:
            return x
        return x[..., self.first_key : self.first_key + self.size(self.query)]

    def restore(self, x: Array, value: Array) -> Array:
        """The inverse of `standard`: the map `value`, or some of its rows, with these entries."""
        if self.windows is not None:
            return self.windows.part(x, value)
        batch = () if self.batch is None else (self.batch,)
        order = (*batch, *self.heads, self.query, self.key)
        dropped = tuple(axis for axis in range(len(self.value.shape)) if axis not in order)
        order = (*dropped, *order)
        if self.own_keys:
            whole = dataclasses.replace(self, own_keys=False)
            own = slice(self.first_key, self.first_key + self.size(self.query))
            x = whole.standard(value).at[..., own].set(x)
        x = x.reshape([value.shape[axis] for axis in order])
        return jnp.transpose(x, np.argsort(order).tolist())

    def size(self, axis: int | None) -> int:
        """Length of an axis of the map; 1 for an axis it does not have."""
        return 1 if axis is None else self.value.shape[axis]

    @property
    def loops(self) -> tuple[Node, ...]:
        """The scans around the site, outermost first; those over heads are `mapped`."""
        nodes = (step.node for step in self.place)
        return tuple(node for node in nodes if node is not None and node.scan)

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The scans around the site that run over layers, outermost first."""
        return tuple(node.scan for node in self.loops if node.scan and node not in self.mapped)

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
                if step.node is not None and step.node.scan and step.node not in self.mapped:
                    scan, index = next(turns)
                    last = scan.length - 1
                    key.append(last - index if scan.reverse else index)
            yield tuple(key)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[batch, heads, query, key]."""
        if self.windows is not None:
            return self.windows.shape
        mapped = (node.scan.length for node in self.mapped if node.scan)
        heads = math.prod([*(self.value.shape[axis] for axis in self.heads), *mapped])
        return self.size(self.batch), heads, self.size(self.query), self.size(self.key)

    def stacked(self, x: Array) -> Array:
        """What loops stacked, [*loops, *value.shape], as [layers, batch, heads, query, key]."""
        lengths = [node.scan.length for node in self.loops if node.scan]
        over = [i for i, node in enumerate(self.loops) if node in self.mapped]
        layers = [i for i in range(len(lengths)) if i not in over]
        if self.windows is not None:
            x = jnp.moveaxis(x.reshape(*lengths, *self.value.shape), layers, range(len(layers)))
            sizes = (lengths[i] for i in over)
            return jax.vmap(self.standard)(x.reshape(-1, *sizes, *self.value.shape))
        maps = jax.vmap(self.standard)(x.reshape(-1, *self.value.shape))
        maps = maps.reshape(*lengths, *maps.shape[1:])
        batch, heads, last = (len(lengths) + i for i in range(3))
        maps = jnp.transpose(maps, (*layers, batch, *over, heads, last, last + 1))
        count = math.prod(lengths[i] for i in layers)
        return maps.reshape(count, self.size(self.batch), -1, *maps.shape[-2:])

    def stacked_values(self, x: Array) -> Array:
        """Token values that loops stacked, as [layers, batch, tokens, width]."""
        batch, _, tokens, _ = self.shape
        x = self.in_order(x)
        return x.reshape(math.prod(scan.length for scan in self.scans), batch, tokens, -1)

    def in_order(self, x: Array) -> Array:
        """Token values, or what loops stacked of them, with the examples before the tokens."""
        if self.order is None:
            return x
        first = x.ndim - len(self.order)
        return jnp.transpose(x, (*range(first), *(first + axis for axis in self.order)))

    def as_it_was(self, x: Array) -> Array:
        """The inverse of `in_order`, of one layer's values."""
        return x if self.order is None else jnp.transpose(x, np.argsort(self.order).tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Attention sites of successive layers with maps of one shape.

    `read` are the tokens that the output reads after the last layer; None: not known.
    """

    name: str
    sites: tuple[Site, ...]
    read: np.ndarray | None = None

    @property
    def layers(self) -> int:
        """How many maps the stack holds."""
        return sum(math.prod(scan.length for scan in s.scans) for s in self.sites)

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        _, _, query, key = self.sites[0].shape
        square = query == key or self.sites[0].own_keys
        return square and all(site.is_self for site in self.sites)

    @property
    def has_residual(self) -> bool:
        """Whether the residual stream before each attention and its output were found."""
        return all(site.residual is not None for site in self.sites)

    @property
    def in_windows(self) -> bool:
        """Whether attention is within parts of the tokens."""
        return any(site.windows is not None or site.in_parts for site in self.sites)

    def __str__(self):
        batch, heads, query, key = self.sites[0].shape
        kind = "self-attention" if self.is_self else "cross-attention"
        kind += " in windows" if self.in_windows else ""
        residual = "" if self.has_residual else ", no residual stream found"
        return (
            f"{self.name!r}: {kind}, layers {self.layers}, batch {batch}, heads {heads}, "
            f"queries {query}, keys {key}{residual}, at {self.sites[0].where}"
        )
