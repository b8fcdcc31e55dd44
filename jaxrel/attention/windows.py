"""Attention within parts of the tokens as a map of all of them.

Windows, rows, frames and chunks of queries are parts of a stream. The map between all its tokens
is block-diagonal: each window's map stands where its tokens are, and shifted windows are in
another order of the tokens. Where they are follows from what the axes are (`tracing.axes`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.tracing.axes import Axes, Axis, Factor, Root, roots
from jaxrel.tracing.graph import Value


class Windows(NamedTuple):
    """How an attention map, its axes split into factors, lies in the map of all tokens.

    Attributes:
      split: the sizes of the factors.
      order: their places, sorted by what they are: examples, heads, windows, queries, keys.
      sizes: how many there are of these five.
      rows: by window and query, its token; as many as there are where it is none (padding).
      columns: by window and key, its token.
      tokens: how many tokens the stream has.
      stream: the identity of its tokens.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: np.ndarray
    columns: np.ndarray
    tokens: int
    stream: Axis

    @property
    def is_partition(self) -> bool:
        """Whether the queries of a window are its keys."""
        return np.array_equal(self.rows, self.columns)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[batch, heads, tokens, tokens]."""
        examples, heads, *_ = self.sizes
        return examples, heads, self.tokens, self.tokens

    def apart(self, x: Array) -> Array:
        """A map as [batch, heads, windows, query, key]."""
        return jnp.transpose(x.reshape(self.split), self.order).reshape(self.sizes)

    def together(self, x: Array, shape: Sequence[int]) -> Array:
        """The inverse of `apart`, for a map of this shape."""
        x = x.reshape([self.split[place] for place in self.order])
        return jnp.transpose(x, np.argsort(self.order).tolist()).reshape(shape)

    def whole(self, x: Array) -> Array:
        """A map as [batch, heads, tokens, tokens], 0 outside of the windows."""
        x = self.apart(x)
        full = jnp.zeros(self.shape, x.dtype)
        return full.at[(..., *self._places())].add(x, mode="drop")

    def part(self, full: Array, x: Array) -> Array:
        """The inverse of `whole`: the map `x`, with entries of the map of all tokens."""
        rows, columns = self._places()
        padding = (rows == self.tokens) | (columns == self.tokens)
        found = full.at[..., rows, columns].get(mode="fill", fill_value=0)
        return self.together(jnp.where(padding, self.apart(x), found), x.shape)

    def gather(self, row: Array) -> Array:
        """Relevance [batch, tokens] as [batch * windows, query]."""
        found = row.at[:, self.rows].get(mode="fill", fill_value=0)
        return found.reshape(-1, self.rows.shape[1])

    def scatter(self, found: Array, row: Array) -> Array:
        """The inverse of `gather`; tokens in no window stay as they are."""
        return row.at[:, self.rows].set(found.reshape(-1, *self.rows.shape), mode="drop")

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[:, :, None], self.columns[:, None, :]


def find_windows(
    map_axes: Sequence[Axis],
    query: int,
    key: int,
    examples: Axis,
    stream: tuple[Axis, ...] | None,
    axes: Axes,
) -> Windows | None:
    """What a map is of all tokens, from what its axes are; None where that is not known.

    Args:
      map_axes: the identities of its axes, those of loops around it first.
      query: which of them is the queries'.
      key: which of them is the keys'.
      examples: the identity of the axis of examples.
      stream: the axes of the residual stream, without its width; None where it was not found.
      axes: what is known of axes.
    """
    dims = [(number, factor) for number, axis in enumerate(map_axes) for factor in axis]
    known = stream if stream is not None else (map_axes[query],)
    tokens = [factor for axis in known for factor in axis if not _among(factor, examples)]
    family = axes.lineage(tuple(tokens))
    kinds = [_kind(number, factor, query, key, examples, family, axes) for number, factor in dims]
    by_kind = [[i for i, kind in enumerate(kinds) if kind == one] for one in range(5)]
    split = tuple(factor.size for _, factor in dims)
    sizes = tuple(math.prod(split[i] for i in places) for places in by_kind)
    factors = [[dims[i][1] for i in places] for places in by_kind]
    windows, queries, keys = factors[2:]
    rows = _Places(windows, queries, axes)
    if stream is None:
        tokens = rows.sources()
    columns = _Places([], keys, axes)
    if not columns.number(tokens)[1]:
        columns = _Places(windows, keys, axes)
    numbers, is_known = rows.number(tokens)
    others, are_known = columns.number(tokens)
    count = math.prod(factor.size for factor in tokens)
    if not (is_known and are_known and tokens):
        return None
    numbers, others = (
        np.where(x < 0, count, x).reshape(-1, sizes[kind])
        for x, kind in ((numbers, 3), (others, 4))
    )
    others = np.broadcast_to(others, (sizes[2], sizes[4]))
    if not _distinct(numbers.ravel(), count) or not all(_distinct(x, count) for x in others):
        return None
    order = tuple(i for places in by_kind for i in places)
    return Windows(split, order, sizes, numbers, others, count, tuple(tokens))


def _kind(
    number: int,
    factor: Factor,
    query: int,
    key: int,
    examples: Axis,
    family: frozenset[Root],
    axes: Axes,
) -> int:
    """0 for examples, 1 for heads, 2 for windows, 3 for queries, 4 for keys."""
    if number in (query, key):
        return 3 if number == query else 4
    if _among(factor, examples):
        return 0
    return 2 if axes.lineage((factor,)) & family else 1


def _among(factor: Factor, axis: Axis) -> bool:
    """Whether a factor is one of an axis."""
    return any(factor[1:] == one[1:] and bool(factor.roots & one.roots) for one in axis)


def _distinct(numbers: np.ndarray, count: int) -> bool:
    real = numbers[numbers < count]
    return len(np.unique(real)) == len(real)


class _Places:
    """Where the entries of a map's axes are along the axes that those came from.

    Of every root: the index along it, -1 where it has none; and the factors of the index that
    are known. Where all are, an axis that is a part of another says where the other is.
    """

    def __init__(self, windows: Sequence[Factor], own: Sequence[Factor], axes: Axes):
        self.axes = axes
        factors = [*windows, *own]
        shape = tuple(factor.size for factor in factors)
        self.index: dict[Root, np.ndarray] = {}
        self.spans: dict[Root, list[tuple[int, int]]] = {}
        self.count = math.prod(shape)
        for factor, digit in zip(factors, np.indices(shape).reshape(len(shape), -1), strict=True):
            self._add(factor, digit)
        self._follow()

    def _add(self, factor: Factor, digit: np.ndarray, missing: np.ndarray | None = None) -> None:
        for root in factor.roots:
            index = self.index.get(root, np.zeros(self.count, int))
            lost = (index < 0) if missing is None else (index < 0) | missing
            self.index[root] = np.where(lost, -1, index + digit * factor.stride)
            self.spans.setdefault(root, []).append((factor.stride, factor.size))

    def _follow(self) -> None:
        """Go on from axes that are parts of others to those."""
        waiting = list(self.index)
        while waiting:
            root = waiting.pop()
            part = self.axes.parts.get(root)
            if part is None or not self.complete(root):
                continue
            index = self.index[root]
            there = np.where(index < 0, -1, part.entries[index])
            inner = 1
            for factor in reversed(part.axis):
                new = [one for one in factor.roots if not self.complete(one)]
                kept = factor._replace(roots=frozenset(new))
                self._add(kept, there // inner % factor.size, there < 0)
                inner *= factor.size
                waiting += new

    def complete(self, root: Root) -> bool:
        """Whether all of the index along a root is known."""
        extent = 1
        for stride, size in sorted(self.spans.get(root, ())):
            if stride != extent:
                return False
            extent *= size
        part = self.axes.parts.get(root)
        whole = extent if part is None else len(part.entries)
        if part is None and isinstance(root.source, Value):
            whole = root.source.shape[root.axis]
        return extent == whole and root in self.spans

    def sources(self) -> list[Factor]:
        """The axes that all came from, in the order in which their value has them."""
        known = [root for root in self.index if self.complete(root)]
        values: dict[int, list[Root]] = {}
        for root in known:
            values.setdefault(id(root.source), []).append(root)
        for group in values.values():
            found = [
                Factor(frozenset([root]), 1, math.prod(size for _, size in self.spans[root]))
                for root in sorted(group, key=lambda root: root.axis)
            ]
            real = (np.stack([self.index[root] for root in group]) >= 0).all(0).sum()
            ends = all(self.axes.lineage((one,)) == one.roots for one in found)
            if ends and math.prod(factor.size for factor in found) == real:
                return found
        return []

    def number(self, tokens: Sequence[Factor]) -> tuple[np.ndarray, bool]:
        """By entry, the number of its token, -1 for padding; and whether it is known."""
        number, lost = np.zeros(self.count, int), np.zeros(self.count, bool)
        for factor in tokens:
            index = self._along(factor)
            if index is None:
                return number, False
            lost |= index < 0
            number = number * factor.size + index // factor.stride % factor.size
        return np.where(lost, -1, number), True

    def _along(self, factor: Factor) -> np.ndarray | None:
        """The index along a root of a factor, itself or from the axis that it is a part of."""
        for root in factor.roots:
            if self.complete(root):
                return self.index[root]
        for root in factor.roots:
            part = self.axes.parts.get(root)
            if part is None or len(part.axis) != 1:
                continue
            (whole,) = part.axis
            base = next((one for one in whole.roots if self.complete(one)), None)
            if base is not None and whole.stride == 1:
                inverse = np.full(whole.size + 1, -1)
                inverse[part.entries] = np.where(part.entries < 0, -1, np.arange(len(part.entries)))
                found = inverse[self.index[base]]
                # An entry that the part has not is no token, and no padding either.
                return None if ((found < 0) & (self.index[base] >= 0)).any() else found
        return None


def token_axes(value: Value, examples: Axis, axes: Axes) -> tuple[Axis, ...] | None:
    """The axes of a stream without its width, if the examples come first; else None."""
    found = axes.of(value)[:-1]
    flat = [factor for axis in found for factor in axis]
    places = [i for i, factor in enumerate(flat) if _among(factor, examples)]
    known = all(factor.roots for factor in flat)
    return found if known and places == list(range(len(places))) else None


def flat(stream: Sequence[Axis], examples: Axis) -> Axis:
    """The identity of all tokens of a stream, of which these are the axes."""
    return tuple(f for axis in stream for f in axis if not _among(f, examples) and roots((f,)))
