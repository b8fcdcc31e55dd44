"""What LRP must know of every value of a graph before anything is run; `Fact` lists it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp

from jaxrel.tracing import primitives
from jaxrel.tracing.flow import Forward
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value, tag_name
from jaxrel.tracing.primitives import (
    AFFINE,
    COMPARISONS,
    CUSTOM_JVP,
    DIV,
    DOT,
    ELEMENTWISE,
    KEEPS_ZERO,
    LINEAR,
    LOOKUPS,
    MAX,
    MIN,
    MOVES,
    MUL,
    NONNEG,
    NONNEG_IF_ALL,
    REDUCTIONS,
    SCALES,
    SCATTER_ADD,
    SCATTER_EXTREMA,
    SELECT,
    SHAPES,
    SIDE_BY_SIDE,
    SIGMOID,
    SORT,
    STEPS,
    STOP_GRADIENT,
    SUMS,
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value.

    Attributes:
      active: it depends, differentiably, on what is explained.
      paths: the parameters that an inactive value is made of.
      nonneg: it is nowhere negative.
      fresh: an active value with no linear operation between it and what is explained.
      stat: everything active in it comes from a reduction (a mean, a variance).
      gate: 'sigmoid' or 'activation' if it comes from such a function, elementwise; else ''.
      root: the value it is an elementwise function of (itself, if of none or of several).
      nonlinear: that function is not affine. Also of comparisons, and of masks made of them.
      literal: it is made of numbers written into the program, such as weights of a resize.
      zero: it is 0 everywhere, and written so.
    """

    active: bool = False
    paths: frozenset[str] = frozenset()
    nonneg: bool = False
    fresh: bool = False
    stat: bool = False
    gate: str = ""
    root: Value | None = None
    nonlinear: bool = False
    literal: bool = False
    zero: bool = False


Facts = dict[Value, Fact]


def analyse(
    graph: Graph,
    ins: Sequence[Fact],
    *,
    sources: Iterable[Value] = (),
    barriers: Iterable[Node] = (),
    names: Callable[[Any], str | None] = lambda constant: None,
) -> Facts:
    """The facts of every value, given those of the graph's inputs.

    Args:
      graph: from `trace`.
      ins: one per input.
      sources: more values that are explained, wherever in the graph.
      barriers: nodes whose outputs count as constants.
      names: the parameter path of an array that the function closed over, if it has one.
    """
    analysis = _Analysis(frozenset(sources), frozenset(barriers), names)
    analysis.run(graph, ins)
    return analysis.facts


def fact_of(facts: Mapping[Value, Fact], atom: Atom) -> Fact:
    """The fact of a value or of a literal."""
    if isinstance(atom, Constant):
        value = np.asarray(atom.value)
        nonneg = value.dtype.kind in "biuf" and bool(np.all(value >= 0))
        return Fact(nonneg=nonneg, literal=True, zero=not np.any(value))
    return facts[atom]


def active_ins(facts: Mapping[Value, Fact], node: Node) -> list[Value]:
    """The node's inputs that carry relevance, a value used twice named twice."""
    return [a for a in node.ins if isinstance(a, Value) and facts[a].active]


def is_elementwise(node: Node) -> bool:
    """Whether each output position depends on that position of the inputs alone."""
    if len(node.outs) != 1:
        return False
    shape = node.outs[0].shape
    if node.name in CUSTOM_JVP:
        (body,) = node.bodies
        return all(
            is_elementwise(inner) and all(_spans(atom, shape) for atom in inner.ins)
            for inner in body.nodes
        )
    return node.name in ELEMENTWISE


def is_relu(node: Node) -> bool:
    """Whether the node is max(x, 0), written so or as `jax.nn.relu`."""
    if node.name in CUSTOM_JVP:
        (body,) = node.bodies
        return len(body.nodes) == 1 and is_relu(body.nodes[0])
    return node.name in MAX and any(
        isinstance(atom, Constant) and np.all(np.asarray(atom.value) == 0) for atom in node.ins
    )


def is_rectifier(node: Node) -> bool:
    """Whether the node is a ReLU, or one cut off above as `jax.nn.relu6` is: 0 for all below 0."""
    if node.name not in CUSTOM_JVP:
        return is_relu(node)
    (body,) = node.bodies
    first, *others = body.nodes
    return is_relu(first) and all(
        one.name in MIN and all(fact_of({}, a).nonneg for a in one.ins if isinstance(a, Constant))
        for one in others
    )


def inexact(value: Atom) -> bool:
    """Whether the value is of a real or complex floating-point type."""
    return jnp.issubdtype(value.aval.dtype, jnp.inexact)


def _spans(atom: Atom, shape: tuple[int, ...]) -> bool:
    return atom.shape in ((), shape)


class _Analysis(Forward[Fact]):
    def __init__(self, sources, barriers, names):
        super().__init__()
        self._sources, self._barriers, self._names = sources, barriers, names
        self._moved: dict[Value, Value] = {}

    def constant(self, array: Any) -> Fact:
        path = self._names(array)
        return Fact(paths=frozenset({path} if path else ()))

    def literal(self, atom: Constant) -> Fact:
        return fact_of(self.facts, atom)

    def join(self, *facts: Fact) -> Fact:
        return join(*facts)

    def write(self, value: Value, fact: Fact, node: Node | None = None) -> None:
        if node is None:
            # What it is a function of is not seen inside.
            fact = dataclasses.replace(fact, root=value, nonlinear=False)
        elif node.name in MOVES and isinstance(before := node.ins[0], Value):
            self._moved[value] = self._moved.get(before, before)
        mask = node is not None and node.name in STEPS and fact.stat
        active = fact.active and inexact(value) and node not in self._barriers and not mask
        fact = dataclasses.replace(fact, active=active, root=fact.root or value)
        if not active and fact.fresh:
            fact = dataclasses.replace(fact, fresh=False)
        if value in self._sources and not active:
            fact = Fact(active=True, fresh=True, nonneg=fact.nonneg, root=value)
        self.facts[value] = fact

    def outs(self, node: Node, ins: list[Fact]) -> list[Fact]:
        if node.name in SIDE_BY_SIDE and len(ins) == len(node.outs) > 1:
            return [join(fact) for fact in ins]
        active = [fact for fact in ins if fact.active]
        nonneg = _nonneg(node, ins)
        if not active or node.name in STOP_GRADIENT:
            return [self._constant(node, ins, nonneg) for _ in node.outs]
        squares = self._sums_squares(node)
        linear = node.name in LINEAR and not all(f.active or f.literal for f in ins)
        fact = Fact(
            active=True,
            nonneg=nonneg,
            fresh=not linear and all(fact.fresh for fact in active),
            stat=squares or _stat(node, active, ins),
            gate=_gate(node, active),
        )
        root = self._root(node, ins)
        if root is not None:
            affine = _affine(node, ins, root) and not any(fact.nonlinear for fact in active)
            fact = dataclasses.replace(fact, root=root, nonlinear=not affine)
        return [fact for _ in node.outs]

    def _sums_squares(self, node: Node) -> bool:
        """Whether the node is the inner product of a value with itself, however it is moved."""
        if node.name not in DOT or not primitives.is_inner(node.equation):
            return False
        first, second = node.ins
        moved: Mapping[Any, Any] = self._moved
        return moved.get(first, first) is moved.get(second, second)

    def _constant(self, node: Node, ins: list[Fact], nonneg: bool) -> Fact:
        """The fact of what carries no relevance."""
        masks = {fact.root for fact in ins if fact.nonlinear and not fact.active}
        elementwise = is_elementwise(node) or node.name in COMPARISONS
        masked = elementwise and bool(masks)
        return Fact(
            paths=frozenset().union(*(fact.paths for fact in ins if not fact.active)),
            nonneg=nonneg,
            root=masks.pop() if masked and len(masks) == 1 else None,
            nonlinear=masked,
            literal=all(fact.literal for fact in ins),
            zero=_zero(node, ins),
        )

    def _root(self, node: Node, ins: list[Fact]) -> Value | None:
        """The one value of which the node's output is an elementwise function."""
        known = is_elementwise(node) or node.name in COMPARISONS
        active = active_ins(self.facts, node)
        if not known or any(v.shape != node.outs[0].shape for v in active):
            return None
        facts = [self.facts[value] for value in active]
        roots = {fact.root for fact in facts}
        if len(roots) != 1 or self._starts_another(node, ins, facts):
            return None
        return roots.pop()

    def _starts_another(self, node: Node, ins: list[Fact], active: list[Fact]) -> bool:
        """Whether what follows is no part of the activation that led here.

        A bias, a scale or a mask with a value for each feature, or learned, after an activation
        is an operation of its own.
        """
        if len(active) > 1 or not active[0].nonlinear:
            return False
        root = active[0].root
        if node.name in SELECT:
            return not _masks(ins[0], root)
        others = [(a, f) for a, f in zip(node.ins, ins, strict=True) if not f.active]
        return node.name in SUMS | SCALES and any(
            (a.shape != () or f.paths) and not _masks(f, root) for a, f in others
        )


def join(*facts: Fact) -> Fact:
    """What is known of a value that may be any of several, outside of the body they are in."""
    active = [fact for fact in facts if fact.active]
    gates = {fact.gate for fact in active}
    return Fact(
        active=bool(active),
        paths=frozenset().union(*(fact.paths for fact in facts)),
        nonneg=all(fact.nonneg for fact in facts),
        literal=all(fact.literal for fact in facts),
        zero=all(fact.zero for fact in facts),
        fresh=bool(active) and all(fact.fresh for fact in active),
        stat=bool(active) and all(fact.stat for fact in active),
        gate=gates.pop() if len(gates) == 1 else "",
    )


def _nonneg(node: Node, ins: list[Fact]) -> bool:
    if node.name in CUSTOM_JVP:
        return _nonneg_inside(node, ins)
    if node.name in NONNEG or primitives.is_even_power(node.equation):
        return True
    if node.name in MAX:
        return any(fact.nonneg for fact in ins)
    if node.name in LOOKUPS | SORT or tag_name(node):
        return ins[0].nonneg
    if node.name in SELECT:
        return all(fact.nonneg for fact in ins[1:])
    if node.name in MUL and node.ins[0] is node.ins[1]:
        return True
    return node.name in NONNEG_IF_ALL and all(fact.nonneg for fact in ins)


def _nonneg_inside(node: Node, ins: list[Fact]) -> bool:
    """Whether what the body of a function returns is never negative."""
    (body,) = node.bodies
    known = dict(zip(body.ins, ins, strict=True)) | dict.fromkeys(body.constants, Fact())
    for inner in body.nodes:
        nonneg = _nonneg(inner, [fact_of(known, atom) for atom in inner.ins])
        known.update(dict.fromkeys(inner.outs, Fact(nonneg=nonneg)))
    return all(fact_of(known, atom).nonneg for atom in body.outs)


def _masks(fact: Fact, root: Value | None) -> bool:
    """Whether a value without relevance is a comparison of this root, or made of one."""
    return fact.nonlinear and not fact.active and fact.root is root


def _zero(node: Node, ins: list[Fact]) -> bool:
    if node.name in LINEAR | MUL:
        return any(fact.zero for fact in ins)
    return node.name in MOVES | SUMS | KEEPS_ZERO and all(fact.zero for fact in ins)


def _stat(node: Node, active: list[Fact], ins: list[Fact]) -> bool:
    # A product with numbers of the program, such as ones, is a sum too; so is a sum by segment.
    if node.name in REDUCTIONS or (node.name in DOT and any(fact.literal for fact in ins)):
        return True
    if node.name in SCATTER_ADD | SCATTER_EXTREMA and not ins[0].active:
        return True
    flows = node.name in ELEMENTWISE | SHAPES
    return flows and all(fact.stat for fact in active)


def _gate(node: Node, active: list[Fact]) -> str:
    if node.name in SIGMOID:
        return "sigmoid"
    if len(active) > 1:
        gates = {fact.gate for fact in active}
        if node.name in SHAPES | SELECT and len(gates) == 1:
            return gates.pop()
        # x * sigmoid(x) is an activation of x; a product of two signals is no gate.
        same = len({fact.root for fact in active}) == 1
        return "activation" if same and is_elementwise(node) else ""
    if node.name in SHAPES or (is_elementwise(node) and node.name in AFFINE):
        return active[0].gate
    return "activation" if is_elementwise(node) else ""


def _affine(node: Node, ins: list[Fact], root: Value) -> bool:
    # A mask made of other values scales or selects as a constant does.
    if node.name not in AFFINE or any(_masks(fact, root) for fact in ins):
        return False
    if node.name in MUL:
        return sum(fact.active for fact in ins) == 1
    if node.name in DIV:
        return not ins[1].active
    return True
