"""Linear maps, and what belongs to them: moves, a bias, a batch normalisation."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxrel.propagation.body import Body
from jaxrel.propagation.operations import MINUS, PLUS, TIMES, BatchNorm, Linear, Operation, Term
from jaxrel.tracing import primitives
from jaxrel.tracing.facts import fact_of, is_rectifier
from jaxrel.tracing.graph import Atom, Node, Value, tag_name
from jaxrel.tracing.primitives import (
    ADD,
    BROADCAST,
    CONV,
    DIV,
    DOT,
    MOVES,
    NEG,
    SCALES,
    SUB,
    SUMS,
    TRANSPOSE,
)


class LinearMaps(Body):
    """A graph whose linear maps are found by their matrix products and convolutions.

    Attributes:
      apart: says of a batch normalisation whether it is an operation of its own.
      sums: the sums that a linear map has taken in, and the nodes that then compute them.
    """

    def __init__(self, *body: Any, apart: Callable[[Operation], bool]):
        super().__init__(*body)
        self.apart = apart
        self.sums: dict[Node, Node] = {}

    def linear_map(self, core: Node) -> Iterator[Linear]:
        """The linear map, and its batch normalisation if that is an operation of its own."""
        x = self.active(core)[0]
        position = core.ins.index(x)
        w = core.ins[1 - position]
        beside = None
        end, moves = self._moved(core)
        features = moved_axes(feature_axes(core, position), moves)
        bias = self._normalisation(end, features)
        norm = self._batch_norm(bias)
        if norm is not None:
            bias = bias[: -len(norm.bias)]
        elif not bias:
            end, bias, beside = self._bias(end)
        if bias:
            end = bias[-1].node
        else:
            end, moves = core, []
        out = end.outs[0]
        users = self.users.get(out, [])
        fact = fact_of(self.facts, w)
        yield self.make(
            Linear,
            end,
            kind="dense" if core.name in DOT else "conv",
            paths=fact.paths,
            first=self.facts[x].fresh,
            core=core,
            x=x,
            w=w,
            moves=tuple(moves),
            bias=tuple(bias),
            features=tuple(features.items()),
            beside=beside,
            nonneg=self.facts[x].nonneg,
            relu_after=beside is None
            and bool(users)
            and all(user is not None and is_rectifier(user) for user in users),
        )
        if norm is not None:
            yield norm

    def shifts_gate(self, node: Node) -> bool:
        """Whether the node adds a number that belongs to a function after it."""
        raise NotImplementedError

    def _moved(self, node: Node) -> tuple[Node, list[Node]]:
        """Past the moves that the node's output goes through, each used once."""
        moves: list[Node] = []
        while True:
            user = self.only_user(node.outs[0])
            moved = user is not None and user.name in MOVES and not tag_name(user)
            if not moved or user is None or user.name in BROADCAST:
                return node, moves
            node = user
            moves.append(user)

    def _bias(self, end: Node) -> tuple[Node, list[Term], Value | None]:
        found: list[Term] = []
        while (user := self.only_user(end.outs[0])) is not None and user.name in SUMS:
            operand = self._added(user, end.outs[0])
            if operand is None:
                break
            found.append(Term(user, user.name, operand))
            end = user
        if found or user is None or user.name not in SUMS:
            return end, found, None
        # x + h @ W + b is read as (x + h @ W) + b: the bias belongs to the product.
        last = self.only_user(user.outs[0])
        if user.name in SUB or last is None or last.name not in SUMS:
            return end, [], None
        operand = self._added(last, user.outs[0])
        beside = next((v for v in user.ins if v is not end.outs[0]), None)
        same = all(v.shape == last.outs[0].shape for v in (end.outs[0], user.outs[0]))
        if operand is None or not isinstance(beside, Value) or last in self.taken or not same:
            return end, [], None
        self.taken.add(last)
        self.sums[user] = last
        return last, [Term(last, last.name, operand)], beside

    def _added(self, node: Node, value: Value) -> Atom | None:
        """What the node adds to (or subtracts from) a value, if that is a constant."""
        return None if node.name in SUB and node.ins[0] is not value else self._other(node, value)

    def _other(self, node: Node, value: Value) -> Atom | None:
        """The constant in a sum with a value."""
        if self.shifts_gate(node):
            return None
        others = [atom for atom in node.ins if atom is not value]
        if len(others) != 1 or fact_of(self.facts, others[0]).active:
            return None
        return others[0] if node.outs[0].shape == value.shape else None

    def _normalisation(self, end: Node, features: dict[int, int]) -> list[Term]:
        """Additions and per-feature scalings after a linear map: batch normalisation."""
        chain: list[Term] = []
        value = end.outs[0]
        while (user := self.only_user(value)) is not None:
            terms = self._terms(user, value, features)
            if not terms:
                break
            chain += terms
            value = user.outs[0]
        negative = sum(term.operand is MINUS for term in chain) % 2 == 1
        while chain and chain[-1].scales and chain[-1].operand.shape == ():
            # One that makes up for another stays: -(mean - z) is z - mean.
            if chain[-1].operand is MINUS and not negative:
                break
            negative ^= chain.pop().operand is MINUS
        scaled = [term.scales for term in chain]
        if all(scaled) or not any(scaled):
            return []
        if not scaled[-1]:
            # Additions after the last scaling but one are not the normalisation's.
            last = max(i for i, is_scale in enumerate(scaled) if is_scale)
            chain = chain[: last + 2]
        return chain

    def _terms(self, node: Node, value: Value, features: dict[int, int]) -> list[Term]:
        """What the node adds to a value and scales it by, if these are constants."""
        if node.name in NEG:
            return [Term(node, TIMES, MINUS)]
        if node.name in SUB and node.ins[1] is value:
            operand = self._other(node, value)
            return [Term(node, TIMES, MINUS), Term(node, PLUS, operand)] if operand else []
        if node.name in SUMS:
            operand = self._added(node, value)
        else:
            operand = self._scaled(node, value, features) if node.name in SCALES else None
        return [Term(node, node.name, operand)] if operand else []

    def _batch_norm(self, chain: Sequence[Term]) -> BatchNorm | None:
        """What scales and shifts the features in a normalisation, if it is an operation apart.

        What is added before it is the linear map's bias; what is subtracted is a mean.
        """
        bias = [*itertools.takewhile(lambda term: term.does in ADD, chain)]
        terms = tuple(chain[len(bias) :])
        scales = [term for term in terms if term.scales and term.operand.shape != ()]
        if not scales or all(term.scales for term in terms):
            return None
        (x,) = self.active(terms[0].node)
        norm = self.make(
            BatchNorm,
            terms[-1].node,
            kind="batch_norm",
            paths=frozenset().union(*(fact_of(self.facts, term.operand).paths for term in terms)),
            core=scales[0].node,
            x=x,
            w=scales[0].operand,
            bias=terms,
        )
        return norm if self.apart(norm) else None

    def _scaled(self, node: Node, value: Value, features: dict[int, int]) -> Atom | None:
        if node.ins[0] is not value and node.name in DIV:
            return None
        others = [atom for atom in node.ins if atom is not value]
        if len(others) != 1 or fact_of(self.facts, others[0]).active:
            return None
        shape = others[0].shape
        fits = shape == () or (
            len(shape) == len(value.shape)
            and all(n == 1 or axis in features for axis, n in enumerate(shape))
        )
        return others[0] if fits and node.outs[0].shape == value.shape else None


def feature_axes(core: Node, position: int) -> dict[int, int]:
    """Axes of a linear map's output that come from its weight, and the weight's axes."""
    if core.name in CONV:
        _, kernel, made = primitives.conv_axes(core.equation)
        return {made[1]: kernel[0]} if position == 0 else {}
    contract, batch = primitives.contraction(core.equation)
    side = 1 - position
    taken = {*contract[side], *batch[side]}
    free = [axis for axis in range(len(core.ins[side].shape)) if axis not in taken]
    other = {*contract[position], *batch[position]}
    lead = len(batch[0])
    if side == 1:
        lead += len(core.ins[0].shape) - len(other)
    return {lead + i: axis for i, axis in enumerate(free)}


def moved_axes(axes: dict[int, int], moves: Iterable[Node]) -> dict[int, int]:
    """Where axes lie after moves; none where a reshape takes one apart."""
    for node in moves:
        before, after = node.ins[0].shape, node.outs[0].shape
        if node.name in TRANSPOSE:
            order = primitives.permutation(node.equation)
            axes = {order.index(axis): to for axis, to in axes.items()}
        elif before != after:
            # From the front or from the back, whichever side is left as it was.
            new: dict[int, int] = {}
            for axis, to in axes.items():
                back = axis - len(before)
                if before[: axis + 1] == after[: axis + 1]:
                    new[axis] = to
                elif len(after) + back >= 0 and before[back:] == after[back:]:
                    new[len(after) + back] = to
                else:
                    return {}
            axes = new
    return axes
