"""Identities of axes through a program: which axis of a value is which axis of the data.

Lengths cannot tell two streams of equal length apart, nor windows from heads. So every axis
carries what it came from, in factors: a reshape splits an axis of 12 into 3 times 4 and merges
the two again, and an axis of windows is known to be a part of the tokens'. Elementwise operations
take the identity of the data, products that of their free axes. What an operation does that is
not known here gives its axes new identities, marked as unknown.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.tracing import primitives
from jaxrel.tracing.flow import Forward, Operands
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value


class Root(NamedTuple):
    """Where an axis began: an axis of an argument, of a constant or of an operation's output."""

    source: Any
    axis: int
    known: bool = True


class Factor(NamedTuple):
    """A part of an axis: index i of it is i // stride % size. No roots: all along it is alike."""

    roots: frozenset[Root]
    stride: int
    size: int


# The identity of one axis, outer factors first; of an axis of length 1, nothing.
Axis = tuple[Factor, ...]


class Extension(NamedTuple):
    """What an axis has beside others: another axis, from this index on."""

    axis: Axis
    start: int


class Part(NamedTuple):
    """What an axis has of another: by entry its index there, -1 for what is not from there."""

    axis: Axis
    entries: np.ndarray


def roots(axis: Axis) -> frozenset[Root]:
    """All that an axis came from."""
    return frozenset().union(*(factor.roots for factor in axis))


def same(a: Axis, b: Axis) -> bool | None:
    """Whether two axes are the same set of places; None where that is not known."""
    if not a or not b:
        return None
    if [f[1:] for f in a] == [f[1:] for f in b]:
        pairs = [(x.roots, y.roots) for x, y in zip(a, b, strict=True)]
        if all(x and y and (x <= y or y <= x) for x, y in pairs):
            return True
    both = roots(a) | roots(b)
    return False if roots(a) and roots(b) and all(root.known for root in both) else None


class Indices:
    """The integers that a program picks by, where they are made of constants alone."""

    def __init__(self) -> None:
        self._arrays: dict[Value, Any] = {}
        self._makers: dict[Value, Node] = {}

    def enter(self, graph: Graph) -> None:
        """Note a graph's constants and operations."""
        self._arrays.update(graph.constants)
        self._makers.update(graph.producers())

    def array(self, atom: Atom) -> np.ndarray | None:
        """The integers, or None where they are not known."""
        with jax.ensure_compile_time_eval():
            found = self._array(atom)
        return None if found is None else np.asarray(found)

    def _array(self, atom: Atom) -> Any:
        if isinstance(atom, Constant):
            return atom.value
        if atom not in self._arrays:
            node = self._makers.get(atom)
            kinds = (np.integer, np.bool_)
            if node is None or len(node.outs) != 1 or node.bodies:
                return None
            if not any(jnp.issubdtype(atom.aval.dtype, kind) for kind in kinds):
                return None
            ins = [self._array(one) for one in node.ins]
            known = all(one is not None for one in ins)
            self._arrays[atom] = primitives.bind(node.equation, ins)[0] if known else None
        array = self._arrays[atom]
        return None if isinstance(array, jax.core.Tracer) else array


class Axes(Forward[tuple[Axis, ...]]):
    """The identities of all axes of all values: `facts[value]` has one for each axis.

    Args:
      graph: the program, walked at once.
      data: the values that depend on the data; where they meet others, theirs is the identity.
    """

    def __init__(self, graph: Graph, data: Collection[Value]):
        super().__init__()
        self.data = data
        self.extensions: dict[Root, Extension] = {}
        self.parts: dict[Root, Part] = {}
        self.scanned: dict[Node, Axis] = {}
        # Parts of length 1 have no identity, and are put together again all the same.
        self._single: dict[tuple[Atom, int], Part] = {}
        self._indices = Indices()
        self._made_of: dict[Root, frozenset[Root]] = {}
        self.run(graph, [_new(value, value.shape) for value in graph.ins])

    def run(self, graph: Graph, ins: Sequence[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
        """Walk a graph; see `Forward`."""
        self._indices.enter(graph)
        return super().run(graph, ins)

    def of(self, value: Atom) -> tuple[Axis, ...]:
        """The identities of a value's axes."""
        found = self.facts.get(value) if isinstance(value, Value) else None
        return _new(value, value.shape, known=False) if found is None else found

    def part(self, value: Atom, number: int) -> Part | None:
        """What an axis of a value is a part of: another axis, or itself; None: not known."""
        return self._base(value, self.of(value)[number], number)

    def lineage(self, axis: Axis) -> frozenset[Root]:
        """What an axis came from, and what that was cut or put together from."""
        found: set[Root] = set()
        waiting = list(roots(axis))
        while waiting:
            root = waiting.pop()
            if root not in found:
                found.add(root)
                waiting += self._made_of.get(root, ())
        return frozenset(found)

    def extension(self, axis: Axis) -> Extension | None:
        """The axis that this one has beside constant entries, if that is known."""
        if len(axis) != 1 or len(axis[0].roots) != 1 or axis[0].stride != 1:
            return None
        (root,) = axis[0].roots
        return self.extensions.get(root)

    def constant(self, array: Any) -> tuple[Axis, ...]:
        """A constant array's axes are its own."""
        return _new(id(array), array.shape)

    def literal(self, atom: Constant) -> tuple[Axis, ...]:
        """A number is the same everywhere."""
        return tuple(map(_alike, atom.shape))

    def join(self, *facts: tuple[Axis, ...]) -> tuple[Axis, ...]:
        """What may be any of several values has the identities of all."""
        return tuple(_merge(axes) for axes in zip(*facts, strict=True))

    def enter(self, node: Node, given: Operands) -> Operands:
        """An iteration gets scanned arrays without their first axis."""
        flags = [atom in self.data for atom in node.ins[len(node.ins) - len(given.scanned) :]]
        self.scanned[node] = _merge(_preferred([fact[0] for fact in given.scanned], flags))
        return given._replace(scanned=[fact[1:] for fact in given.scanned])

    def leave(self, node: Node, stacked: list) -> list:
        """Stacked arrays have the first axis of the scanned ones."""
        return [(self.scanned[node], *fact) for fact in stacked]

    def outs(self, node: Node, ins: list[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
        """What an operation does to axes."""
        if node.name in primitives.CUSTOM and len(node.bodies) == 1:
            found = self.run(node.bodies[0], ins)
            if [_sizes(fact) for fact in found] == [list(out.shape) for out in node.outs]:
                return found
        if node.name in primitives.SIDE_BY_SIDE and len(ins) == len(node.outs):
            return [self._sorted(node, ins, number) for number in range(len(ins))]
        return [self._out(node, ins, out) for out in node.outs]

    def _out(self, node: Node, ins: list[tuple[Axis, ...]], out: Value) -> tuple[Axis, ...]:
        equation, name = node.equation, node.name
        if name in primitives.TRANSPOSE:
            return tuple(ins[0][axis] for axis in primitives.permutation(equation))
        if name in primitives.RESHAPES:
            cut = _reshape(ins[0], out.shape)
            return (*cut, *_mixed(out)[len(cut) :])
        if name in primitives.BROADCAST:
            return _broadcast(ins[0], primitives.broadcast_axes(equation), out.shape)
        if name in primitives.DOT:
            return self._product(node, ins)
        if name in primitives.CONV:
            return _convolution(node, ins[0], out)
        axes = primitives.reduced_axes(equation)
        if axes is not None:
            return tuple(axis for i, axis in enumerate(ins[0]) if i not in axes)
        if name in primitives.PICKS:
            return self._picked(node, ins, out)
        return self._in_place(node, ins, out)

    def _product(self, node: Node, ins: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
        contracted, batched = primitives.contraction(node.equation)
        flags = [atom in self.data for atom in node.ins]
        pairs = zip(*batched, strict=True)
        shared = [_merge(_preferred([ins[0][i], ins[1][j]], flags)) for i, j in pairs]
        for side in (0, 1):
            taken = {*contracted[side], *batched[side]}
            shared += [axis for i, axis in enumerate(ins[side]) if i not in taken]
        return tuple(shared)

    def _sorted(self, node: Node, ins: list[tuple[Axis, ...]], number: int) -> tuple[Axis, ...]:
        """Axes of what keeps its place, but along the axis of a sort."""
        place, axes, out = primitives.sorted_axis(node.equation), ins[number], node.outs[number]
        if place is None or not axes[place]:
            return axes
        root = Root(out, place, known=False)
        self._made_of[root] = frozenset().union(*(roots(one[place]) for one in ins))
        return (*axes[:place], _new(out, out.shape, known=False)[place], *axes[place + 1 :])

    def _picked(self, node: Node, ins: list[tuple[Axis, ...]], out: Value) -> tuple[Axis, ...]:
        """Axes of what is picked: whole ones, those of the indices, and parts that are known."""
        fresh = _new(out, out.shape, known=False)
        places = primitives.picked_axes(node.equation, len(out.shape))
        by_index = primitives.index_axes(node.equation, len(out.shape))
        chosen = self._chosen(node, ins, out, [i for i, j in enumerate(by_index) if j is not None])
        found = []
        for number, (i, j) in enumerate(zip(places, by_index, strict=True)):
            known = ins[0][i] if i is not None else chosen.get(number)
            if known is None and j is not None and roots(ins[1][j]) and node.ins[1] in self.data:
                # Rows of a table are their indices'; what data pick of data is another order.
                known = ins[1][j] if node.ins[0] not in self.data else None
                self._made_of[Root(out, number, known=False)] = roots(ins[1][j])
            found.append(fresh[number] if known is None else known)
        return tuple(found)

    def _chosen(self, node: Node, ins: list, out: Value, places: list[int]) -> dict[int, Axis]:
        """Axes, by place, into which constant indices along one axis sort its entries."""
        axis = primitives.picked_along(node.equation)
        if axis is None or not places or node.ins[0] not in self.data:
            return {}
        index = self._indices.array(node.ins[1])
        base = None if index is None else self._base(node.ins[0], ins[0][axis], axis)
        if index is None or base is None or index.min() < 0 or index.max() >= len(base.entries):
            return {}
        whole = self._part(out, places[0], base.axis, base.entries[index.ravel()])
        sizes = [out.shape[place] for place in places]
        split = () if whole is None else _reshape([whole], sizes)
        return dict(zip(places, split, strict=True)) if len(split) == len(sizes) else {}

    def _in_place(self, node: Node, ins: list[tuple[Axis, ...]], out: Value) -> tuple[Axis, ...]:
        """Operations that leave each axis where it is, of its length or another."""
        rank = len(out.shape)
        arrays = [(a, atom) for a, atom in zip(ins, node.ins, strict=True) if len(a) == rank]
        if not rank or not arrays:
            return _new(out, out.shape, known=False)
        # Data before constants, and what varies along more axes before what varies along fewer.
        ranks = [(atom in self.data, sum(bool(roots(a)) for a in fact)) for fact, atom in arrays]
        fresh = _new(out, out.shape)
        found = []
        for i, size in enumerate(out.shape):
            if node.name in primitives.REORDERS and node.ins[0].shape[i] == size:
                moved = self._derived(node, ins, out, i)
                if moved is not None:
                    found.append(moved)
                    continue
            fits = [
                (rank, fact[i])
                for rank, (fact, atom) in zip(ranks, arrays, strict=True)
                if atom.shape[i] == size and (roots(fact[i]) or size == 1)
            ]
            if fits:
                best = max(rank for rank, _ in fits)
                found.append(_merge([axis for rank, axis in fits if rank == best]))
            elif all(atom.shape[i] == size for _, atom in arrays):
                found.append(_alike(size))
            else:
                own = self._own_part(node, arrays[0][0][i], i, size)
                own = self._derived(node, ins, out, i) if own is None else own
                found.append(fresh[i] if own is None else own)
                root = Root(out, i)
                self._made_of[root] = frozenset().union(*(roots(fact[i]) for fact, _ in arrays))
                self._extend(node, ins, root, i)
        return tuple(found)

    def _own_part(self, node: Node, axis: Axis, number: int, size: int) -> Axis | None:
        """The axis that was put beside constants, where it is cut out again."""
        extension = self.extension(axis)
        start = primitives.cut(node.equation, number)
        if extension is None or start != extension.start or size != _size(extension.axis):
            return None
        return extension.axis

    def _derived(self, node: Node, ins: list, out: Value, i: int) -> Axis | None:
        """An axis that has entries of one other in another order, a part, or constants beside.

        What is cut and put together again is the axis that it was. None if it is not known.
        """
        chosen = primitives.selected(node.equation, i, node.outs.index(out))
        if chosen is not None:
            whole = self._base(node.ins[0], ins[0][i], i)
            return None if whole is None else self._part(out, i, whole.axis, whole.entries[chosen])
        placed = primitives.placed(node.equation, i)
        some = [n for n, _ in placed or ()]
        some = [n for n in some if node.ins[n] in self.data] or some
        bases = {n: self._base(node.ins[n], ins[n][i], i) for n in some}
        index = np.full(out.shape[i], -1)
        for n, start in placed or ():
            base = bases.get(n)
            if n not in bases:
                continue
            if base is None or not isinstance(start, int):
                return None
            index[start : start + len(base.entries)] = base.entries[: max(out.shape[i] - start, 0)]
        axes = {base.axis for base in bases.values() if base is not None}
        return self._part(out, i, axes.pop(), index) if len(axes) == 1 else None

    def _base(self, atom: Atom, axis: Axis, i: int) -> Part | None:
        """What an axis is a part of: another, or itself."""
        if not axis:
            return self._single.get((atom, i))
        if len(axis) == 1 and len(axis[0].roots) == 1 and axis[0].stride == 1:
            (root,) = axis[0].roots
            part = self.parts.get(root)
            if part is not None and len(part.entries) == axis[0].size:
                return part
        return Part(axis, np.arange(_size(axis))) if roots(axis) else None

    def _part(self, out: Value, i: int, axis: Axis, index: np.ndarray) -> Axis | None:
        """The identity of an axis that is a part of another."""
        if (index < 0).all():
            return None
        if np.array_equal(index, np.arange(_size(axis))):
            return axis
        part = Part(axis, index)
        if len(index) == 1:
            self._single[out, i] = part
            return ()
        root = Root(out, i)
        self.parts[root] = part
        self._made_of[root] = roots(axis)
        return (Factor(frozenset([root]), 1, len(index)),)

    def _extend(self, node: Node, ins: list, root: Root, axis: int) -> None:
        """Note what an operation puts beside constants."""
        placed = primitives.placed(node.equation, axis)
        if placed is None:
            return
        filled = [(number, start) for number, start in placed if node.ins[number] in self.data]
        if len(filled) == 1:
            ((number, start),) = filled
            if isinstance(start, int):
                self.extensions[root] = Extension(ins[number][axis], start)


def _new(source: Any, shape: Sequence[int], *, known: bool = True) -> tuple[Axis, ...]:
    return tuple(
        () if size == 1 else (Factor(frozenset([Root(source, axis, known)]), 1, size),)
        for axis, size in enumerate(shape)
    )


def _alike(size: int) -> Axis:
    """The identity of an axis along which a value is the same everywhere."""
    return () if size == 1 else (Factor(frozenset(), 1, size),)


def _sizes(axes: Sequence[Axis]) -> list[int]:
    return [_size(axis) for axis in axes]


def _size(axis: Axis) -> int:
    size = 1
    for factor in axis:
        size *= factor.size
    return size


def _preferred(axes: Sequence[Axis], flags: Sequence[bool]) -> list[Axis]:
    """Those of the data, if they say anything; else all."""
    return [a for a, flag in zip(axes, flags, strict=True) if flag and roots(a)] or list(axes)


def _merge(axes: Sequence[Axis]) -> Axis:
    """One identity for axes that are put together place by place: all that they came from."""
    told = [axis for axis in axes if roots(axis)] or list(axes)
    merged = told[0] if told else ()
    for axis in told[1:]:
        if [f[1:] for f in axis] == [f[1:] for f in merged]:
            pairs = zip(merged, axis, strict=True)
            merged = tuple(a._replace(roots=a.roots | b.roots) for a, b in pairs)
    return merged


def _broadcast(axes: Sequence[Axis], places: Sequence[int], shape: Sequence[int]) -> tuple:
    found = [_alike(size) for size in shape]
    for axis, place in zip(axes, places, strict=True):
        if axis and _size(axis) == shape[place]:
            found[place] = axis
    return tuple(found)


def _convolution(node: Node, axes: tuple[Axis, ...], out: Value) -> tuple[Axis, ...]:
    """The batch keeps its identity, and so do axes in space that keep their length."""
    given, _, made = primitives.conv_axes(node.equation)
    fresh = list(_new(out, out.shape, known=False))
    for number, (i, j) in enumerate(zip(given, made, strict=True)):
        # The second is the channels'.
        if number != 1 and _size(axes[i]) == out.shape[j]:
            fresh[j] = axes[i]
    return tuple(fresh)


def _reshape(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """Split and merge factors, up to where the cuts do not fit."""
    waiting = [factor for axis in axes for factor in axis]
    found: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        left = size
        while left > 1 and waiting:
            factor = waiting.pop(0)
            if factor.size > left and factor.size % left == 0:
                inner = factor.size // left
                waiting.insert(0, factor._replace(size=inner))
                factor = factor._replace(stride=factor.stride * inner, size=left)
            if left % factor.size:
                return tuple(found)
            left //= factor.size
            taken.append(factor)
        if left > 1:
            return tuple(found)
        found.append(_join_factors(taken))
    return tuple(found)


def _mixed(out: Value) -> tuple[Axis, ...]:
    """New axes that are parts of the same thing: each of all that was cut anew."""
    both = Root(out, -1, known=False)
    own = _new(out, out.shape, known=False)
    return tuple(tuple(f._replace(roots=f.roots | {both}) for f in axis) for axis in own)


def _join_factors(factors: Sequence[Factor]) -> Axis:
    """Neighbours that are outer and inner part of one axis are one factor again."""
    found: list[Factor] = []
    for factor in factors:
        if found and found[-1].roots == factor.roots:
            outer = found[-1]
            if not factor.roots or outer.stride == factor.stride * factor.size:
                found[-1] = Factor(factor.roots, factor.stride, outer.size * factor.size)
                continue
        found.append(factor)
    return tuple(found)
