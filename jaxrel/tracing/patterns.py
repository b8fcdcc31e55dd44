"""Structures that have no primitive of their own, found in a graph by what they compute.

A softmax is exponentials over their sum, however either is written: the sum may be a reduction,
a product with ones, a sum by segment; it may be kept from zero by an epsilon or a maximum; the
quotient may be a product with a reciprocal, or exp(s - logsumexp(s)); what is exponentiated may
be shifted, clipped, masked, and to any base.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxrel.tracing import primitives
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value, tag_name
from jaxrel.tracing.primitives import (
    ABS,
    ADD,
    CLIPS,
    CONCATENATE,
    CUMSUM,
    DIV,
    DOT,
    ELEMENTWISE,
    EXP,
    EXPM1,
    EXPONENTIALS,
    LOG,
    LOOKUPS,
    MEANS,
    MOVES,
    MUL,
    NEG,
    PLACES,
    REDUCTIONS,
    SCALES,
    SCATTER_ADD,
    SCATTER_EXTREMA,
    SELECT,
    SLICES,
    STOP_GRADIENT,
    SUB,
)

# What leads from scores to the maximum that is subtracted from them.
_TO_SHIFT = ELEMENTWISE | MOVES | PLACES | REDUCTIONS | SCATTER_EXTREMA | STOP_GRADIENT

Varies = Callable[[Value], bool]


def softmaxes(
    graph: Graph, varies: Varies | None = None, *, again: bool = False
) -> Iterator[tuple[Node, Value]]:
    """Each softmax of the graph (not of its bodies), as (last node, its input: the scores).

    Args:
      graph: where to look.
      varies: whether a value depends on the data; by default all does but what is made of the
        program's own constants.
      again: also what normalises a softmax once more, as after a mask.
    """
    yield from _Matcher(graph, varies).softmaxes(again)


class Late(NamedTuple):
    """A softmax whose division comes after the product with the values.

    Attributes:
      last: the node that divides.
      moves: what moves the product before that, in order.
      product: the product of exponentials and values.
      side: which operand of it the exponentials are.
      sums: what it is divided by.
    """

    last: Node
    moves: tuple[Node, ...]
    product: Node
    side: int
    sums: Value


def late_softmaxes(graph: Graph, varies: Varies | None = None) -> Iterator[Late]:
    """Each (exp(s) @ v) / sum(exp(s)) of the graph, not of its bodies."""
    yield from _Matcher(graph, varies).late()


def logsumexps(graph: Graph, varies: Varies | None = None) -> Iterator[tuple[Node, Value]]:
    """Each log(sum(exp(s))), shifted or not, as (last node, its input s)."""
    yield from _Matcher(graph, varies).logsumexps()


def between(graph: Graph, start: Value, last: Node) -> set[Node]:
    """The nodes on all ways from a value to a node."""
    reached, inside = {start}, set()
    producers = graph.producers()
    first = producers.get(start)
    after = itertools.dropwhile(lambda node: first not in (None, node), graph.nodes)
    for node in after:
        if any(atom in reached for atom in node.ins):
            reached.update(node.outs)
        if node is last:
            break
    todo = [last]
    while todo:
        node = todo.pop()
        inside.add(node)
        values = (atom for atom in node.ins if atom in reached and atom is not start)
        todo += [producers[value] for value in values if producers[value] not in inside]
    return inside


def trace_back(
    atom: Atom, producers: dict[Value, Node], through: frozenset[str] = MOVES
) -> Node | None:
    """The node that computed a value, looking past moves (and selects, if named)."""
    while isinstance(atom, Value) and atom in producers:
        node = producers[atom]
        if node.name not in through and tag_name(node) is None:
            return node
        # A select's last case is the one kept where a mask holds.
        atom = node.ins[-1] if node.name in SELECT else node.ins[0]
    return None


def origin(value: Value, producers: dict[Value, Node]) -> Value:
    """The value before it was moved, retyped or tagged."""
    while value in producers and producers[value].name in MOVES:
        before = producers[value].ins[0]
        if not isinstance(before, Value):
            return value
        value = before
    return value


class _Matcher:
    """Recognises exponentials, their sums, and quotients of the two, in one graph."""

    def __init__(self, graph: Graph, varies: Varies | None):
        self.graph, self.producers = graph, graph.producers()
        self.weights: dict[Node, Node] = {}
        self.varying = varies or functools.cache(self._made_of_data)

    def softmaxes(self, again: bool) -> Iterator[tuple[Node, Value]]:
        """See the function."""
        for node in self.graph.nodes:
            exps: list[Node] = []
            if node.name in SCALES:
                exps = self._normalised(node, again)
            elif node.name in EXP and self._minus_logsumexp(node):
                exps = [self._logsumexp_below(node)]
            if exps and isinstance(start := self.unshifted(exps[0]), Value):
                yield node, start

    def late(self) -> Iterator[Late]:
        """See `late_softmaxes`."""
        for node in (
            self.graph.nodes if any(n.name in EXPONENTIALS for n in self.graph.nodes) else ()
        ):
            for above, below in self._quotients(node) if node.name in SCALES else ():
                product = self.before(above)
                if product is None or product.name not in DOT or not isinstance(below, Value):
                    continue
                sums = self.summed(below)
                exps = [self.exponentials(atom) if sums else [] for atom in product.ins]
                sides = [i for i, found in enumerate(exps) if len(found) == 1 and found[0] in sums]
                if len(sides) == 1:
                    yield Late(node, self._moves(above, product), product, sides[0], below)

    def _moves(self, atom: Atom, start: Node) -> tuple[Node, ...]:
        """The nodes between one and a value that is its output, moved."""
        moves: list[Node] = []
        while isinstance(atom, Value) and (node := self.producers[atom]) is not start:
            moves.insert(0, node)
            atom = node.ins[0]
        return tuple(moves)

    def logsumexps(self) -> Iterator[tuple[Node, Value]]:
        """See the function."""
        used = self.graph.users()
        for node in self.graph.nodes:
            exps = self._exponentials_of_log(node) if node.name in LOG else []
            if not exps or not isinstance(start := self.unshifted(exps[0]), Value):
                continue
            # The maximum that was subtracted is added again.
            users = used.get(node.outs[0], [])
            if len(users) == 1 and users[0].name in ADD:
                others = [atom for atom in users[0].ins if atom is not node.outs[0]]
                node = users[0] if all(self._leads(start, atom) for atom in others) else node
            yield node, start

    def fixed(self, atom: Atom) -> bool:
        """Whether it is the same whatever the data are."""
        return isinstance(atom, Constant) or not self.varying(atom)

    def before(self, atom: Atom) -> Node | None:
        """The node that computed a value, looking past moves."""
        return trace_back(atom, self.producers)

    def unshifted(self, exp: Node) -> Atom:
        """What is exponentiated, before a maximum of its own is subtracted."""
        exp = self.weights.get(exp, exp)
        atom = whole = exp.ins[primitives.exponent(exp.equation)]
        while (node := self.before(atom)) is not None:
            if node.name in SUB and self._leads(node.ins[0], node.ins[1]):
                return node.ins[0]
            varying = [one for one in node.ins if not self.fixed(one)]
            if node.name not in SCALES | CLIPS or len(varying) != 1:
                break
            (atom,) = varying
        return whole

    def exponentials(self, atom: Atom, again: bool = True) -> list[Node]:
        """The exponentials that a value is, behind moves, masks and clips."""
        node = trace_back(atom, self.producers, MOVES | SLICES)
        if node is None:
            return []
        if self._is_exponential(node):
            return [node]
        if self._plus_one(node):
            return [node]
        if node.name in DIV and again and not self.fixed(node.ins[1]):
            # A softmax is a multiple of its exponentials.
            return self._normalised(node, again)
        if node.name in SELECT | CONCATENATE:
            cases: Sequence[Atom] = node.ins[1:] if node.name in SELECT else node.ins
        elif node.name in MUL and not any(map(self.fixed, node.ins)):
            return self._weighted(node, again)
        elif node.name in CLIPS | SCALES | ADD:
            cases = self._only_varying(node)
        else:
            return []
        return self._union(self.exponentials(case, again) for case in cases)

    def _plus_one(self, node: Node) -> bool:
        """Whether the node is expm1(s) + 1, another spelling of exp(s)."""
        if node.name not in ADD:
            return False
        varying = self._only_varying(node)
        inner = self.before(varying[0]) if varying else None
        others = [atom for atom in node.ins if atom not in varying]
        found = inner is not None and inner.name in EXPM1 and all(map(self._is_one, others))
        if found and inner is not None:
            self.weights[node] = inner
        return found

    def _is_one(self, atom: Atom) -> bool:
        if isinstance(atom, Value) and (self.before(atom)) is None:
            atom = origin(atom, self.producers)
            if atom in self.producers:
                atom = self.producers[atom].ins[0]
        return isinstance(atom, Constant) and bool(np.all(atom.value == 1))

    def _weighted(self, node: Node, again: bool) -> list[Node]:
        """A product of exponentials and a mask of the data: the same must be above and below."""
        exps = self._union(self.exponentials(one, again) for one in node.ins)
        if len(exps) != 1:
            return []
        self.weights[node] = exps[0]
        return [node]

    def summed(self, atom: Atom, again: bool = True) -> list[Node]:
        """The exponentials of which a value is the sum, whatever keeps that from zero."""
        node = trace_back(atom, self.producers, MOVES | LOOKUPS | SLICES | ABS)
        if node is None:
            return []
        if node.name in MEANS | CUMSUM:
            return self.exponentials(node.ins[0], again) or self.summed(node.ins[0], again)
        if node.name in SCATTER_ADD and self.fixed(node.ins[0]):
            return self.exponentials(node.ins[2], again)
        if node.name in DOT:
            (one,) = self._only_varying(node) or (None,)
            known = one is not None and (self.exponentials(one, again) or self.summed(one, again))
            return known or []
        if node.name in ADD and not any(map(self.fixed, node.ins)):
            # A part of the keys, or a sink that is no key, has a term of its own.
            terms = [self.summed(one) or self.exponentials(one, again) for one in node.ins]
            return self._union(terms) if all(terms) else []
        if node.name in ADD | CLIPS | SCALES | SELECT:
            cases = self._only_varying(node)
            return self.summed(cases[0], again) if cases else []
        return []

    def _normalised(self, node: Node, again: bool) -> list[Node]:
        """The exponentials of e / sum(e), or none."""
        for above, below in self._quotients(node):
            sums = self.summed(below, again)
            exps = self.exponentials(above, again) if sums else []
            if len(exps) == 1 and exps[0] in sums:
                return exps
        return []

    def _quotients(self, node: Node) -> Iterator[tuple[Atom, Atom]]:
        """(above, below) of a / b, or of a product with 1 / b."""
        if node.name in DIV:
            yield node.ins[0], node.ins[1]
        elif node.name in MUL:
            for above, inverse in (node.ins, node.ins[::-1]):
                made = trace_back(inverse, self.producers, MOVES | LOOKUPS)
                if made is None:
                    continue
                log = self._negative_log(made)
                if log is not None or primitives.is_reciprocal(made.equation):
                    yield above, (log or made).ins[0]
                elif made.name in DIV and self.fixed(made.ins[0]):
                    yield above, made.ins[1]

    def _negative_log(self, node: Node) -> Node | None:
        """The logarithm in exp(-log(x)), which is 1 / x."""
        neg = self.before(node.ins[0]) if node.name in EXP else None
        log = self.before(neg.ins[0]) if neg is not None and neg.name in NEG else None
        return log if log is not None and log.name in LOG else None

    def _minus_logsumexp(self, exp: Node) -> bool:
        """Whether the node is exp(s - logsumexp(s)), of the same scores s."""
        sub = self.before(exp.ins[0])
        if sub is None or sub.name not in SUB or self.fixed(sub.ins[0]):
            return False
        log = self._find_log(sub.ins[1])
        exps = [] if log is None else self._exponentials_of_log(log)
        return any(self._bare(one) is self._bare_scores(sub.ins[0]) for one in exps)

    def _logsumexp_below(self, exp: Node) -> Node:
        """The exponential of exp(s - logsumexp(s)) whose scores s are."""
        sub = self.before(exp.ins[0])
        assert sub is not None
        log = self._find_log(sub.ins[1])
        assert log is not None
        exps = self._exponentials_of_log(log)
        return next(e for e in exps if self._bare(e) is self._bare_scores(sub.ins[0]))

    def _bare(self, exp: Node) -> Atom:
        exp = self.weights.get(exp, exp)
        return self._bare_scores(exp.ins[primitives.exponent(exp.equation)])

    def _bare_scores(self, atom: Atom) -> Atom:
        """Scores before they are moved, masked, and shifted by their maximum."""
        while (node := self.before(atom)) is not None:
            if node.name in SUB and self._leads(node.ins[0], node.ins[1]):
                atom = node.ins[0]
            elif node.name in LOG and len(exps := self.exponentials(node.ins[0], False)) == 1:
                return self._bare(exps[0])
            elif node.name in SELECT and (cases := self._only_varying(node)):
                (atom,) = cases
            else:
                break
        return origin(atom, self.producers) if isinstance(atom, Value) else atom

    def _find_log(self, atom: Atom) -> Node | None:
        """The logarithm in log(sum(exp(s - max))) or in log(...) + max, or picked from these."""
        before = functools.partial(trace_back, producers=self.producers, through=MOVES | LOOKUPS)
        node = before(atom)
        if node is not None and node.name in ADD:
            terms = (before(term) for term in node.ins)
            node = next((term for term in terms if term is not None and term.name in LOG), None)
        return node if node is not None and node.name in LOG else None

    def _exponentials_of_log(self, log: Node) -> list[Node]:
        return self.summed(log.ins[0], False)

    def _is_exponential(self, node: Node) -> bool:
        if node.name not in EXPONENTIALS:
            return False
        power = primitives.exponent(node.equation)
        return power == 0 or (self.fixed(node.ins[0]) and not self.fixed(node.ins[1]))

    def _only_varying(self, node: Node) -> list[Atom]:
        """The one input that depends on the data, or none if there are several."""
        ins = node.ins[1:] if node.name in SELECT else node.ins
        varying = [atom for atom in ins if not self.fixed(atom)]
        return varying if len(varying) == 1 else []

    def _leads(self, start: Atom, atom: Atom) -> bool:
        """Whether a value is a statistic of another, as its maximum is."""
        todo, seen = [atom], set()
        while todo:
            one = todo.pop()
            if one is start:
                return True
            node = self.producers.get(one) if isinstance(one, Value) else None
            if node is not None and node not in seen and node.name in _TO_SHIFT:
                seen.add(node)
                todo += node.ins
        return False

    def _made_of_data(self, value: Value) -> bool:
        if value in self.graph.constants:
            return False
        node = self.producers.get(value)
        return node is None or any(not self.fixed(atom) for atom in node.ins)

    @staticmethod
    def _union(found: Iterable[list[Node]]) -> list[Node]:
        return list(dict.fromkeys(exp for exps in found for exp in exps))
