"""The operations of a graph, as LRP sees them: what a rule is chosen for.

An operation may be several nodes: a matrix product with its bias; a convolution with the batch
normalisation that follows; the dozen nodes of a GELU. `finder` finds them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxrel.tracing import primitives
from jaxrel.tracing.facts import is_relu
from jaxrel.tracing.graph import Atom, Constant, Node, Value, identity
from jaxrel.tracing.primitives import ADD, CUSTOM_JVP, MUL, SCALES


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """One operation that carries relevance.

    Attributes:
      kind: see `jaxrel.op`; the primitive's name for operations LRP does not know.
      node: the node that computes the operation's output.
      paths: the parameters it reads.
      first: a linear operation with no other before it.
      layer: its layer's index, if it is in a stack (see `jaxrel.layer`).
      stack: (start, stop, length) of the part of a scanned stack that the operation stands for.
    """

    kind: str
    node: Node
    paths: tuple[str, ...] = ()
    first: bool = False
    layer: int | None = None
    stack: tuple[int, int, int] | None = None

    @property
    def layers(self) -> int | None:
        """How many layers its stack has, if that is known."""
        return self.stack[2] if self.stack else None

    @property
    def name(self) -> str:
        """The primitive that names the operation."""
        return self.node.name

    def where(self) -> str:
        """The user's source line."""
        return self.node.where()

    def key(self) -> Any:
        """What operations have in common that are one function of what they read, or None."""
        return primitives.same_as(self.node.equation)


class Term(NamedTuple):
    """What a node adds to a value or scales it by; `does` names the primitive that would."""

    node: Node
    does: str
    operand: Atom

    @property
    def scales(self) -> bool:
        """Whether it multiplies or divides."""
        return self.does in SCALES


# The parts of what a node subtracts a value from: the value times -1, plus the number.
MINUS = Constant(-1.0, jax.typeof(-1.0))
PLUS, TIMES = min(ADD), min(MUL)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Operation):
    """z = moves(core(x, w * scales)) + bias, plus `beside`, a summand of its own.

    `bias` lists the terms that add, subtract, multiply or divide, in order; those that scale are
    there only where a normalisation is folded into the weight. `features` pairs the axes of z
    that come from the weight with the weight's own.
    """

    core: Node
    x: Value
    w: Atom
    moves: tuple[Node, ...] = ()
    bias: tuple[Term, ...] = ()
    features: tuple[tuple[int, int], ...] = ()
    beside: Value | None = None
    nonneg: bool = False
    relu_after: bool = False

    @property
    def name(self) -> str:
        """The primitive of the linear map itself."""
        return self.core.name

    def key(self) -> Any:
        """See `Operation.key`."""
        nodes = (self.core, *self.moves)
        same = [primitives.same_as(node.equation) for node in nodes]
        terms = tuple(term.does for term in self.bias)
        flags = (self.features, self.beside is not None, self.nonneg, self.relu_after)
        return None if None in same else (self.x is self.core.ins[0], *same, terms, *flags)

    @property
    def folded(self) -> bool:
        """Whether a normalisation with constant statistics is part of it."""
        return any(term.scales for term in self.bias)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(Linear):
    """z = x scale + shift with constants for each feature, where it is no part of a linear map.

    `bias` lists all that scales and shifts, in order; `core` and `w` are the first that scales.
    """


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Block(Operation):
    """Several nodes that are one function of one value, `start`, such as a softmax."""

    start: Value
    nodes: tuple[Node, ...]
    consts: tuple[Value, ...]

    def key(self) -> Any:
        """See `Operation.key`: one function of `start` and `consts`."""
        values = (self.start, *self.consts, *(out for node in self.nodes for out in node.outs))
        place = {value: i for i, value in enumerate(values)}
        parts = []
        for node in self.nodes:
            ins = (place[a] if isinstance(a, Value) else identity(a) for a in node.ins)
            parts.append((primitives.same_as(node.equation), *ins))
        return None if any(part[0] is None for part in parts) else tuple(parts)

    def function(self) -> Callable:
        """(start, consts) -> output."""
        (out,) = self.node.outs

        def f(x, consts):
            known = {self.start: x, **dict(zip(self.consts, consts, strict=True))}
            return run(self.nodes, known)[out]

        return f


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Block):
    """An elementwise function of one value, and that function at a few numbers."""

    samples: Any

    @property
    def name(self) -> str:
        """The names of the primitives, or of the function that JAX gives a derivative."""
        return "+".join(primitives.function_name(node.equation) for node in self.nodes)

    @property
    def is_relu(self) -> bool:
        """Whether the derivative is Pass already."""
        return len(self.nodes) == 1 and is_relu(self.nodes[0])

    @property
    def is_activation(self) -> bool:
        """Whether relevance can pass it unchanged (see `Samples.is_activation`)."""
        return self.is_relu or self.samples.is_activation

    def scalar(self) -> Callable | None:
        """The function of one number, if it depends on nothing else."""
        (out,) = self.node.outs
        return None if self.consts else lambda x: run(self.nodes, {self.start: x}, opened=True)[out]


def run(nodes: Iterable[Node], known: dict[Value, Any], opened: bool = False) -> dict[Value, Any]:
    """Compute nodes in order; `opened` runs the bodies of calls, which fit any shape."""
    env = dict(known)

    def read(atom: Atom) -> Any:
        return atom.value if isinstance(atom, Constant) else env[atom]

    for node in nodes:
        ins = list(map(read, node.ins))
        if opened and node.name in CUSTOM_JVP:
            (body,) = node.bodies
            inner = run(body.nodes, dict(zip(body.ins, ins, strict=True)), opened)
            outs = [a.value if isinstance(a, Constant) else inner[a] for a in body.outs]
        else:
            outs = node.bind(*ins)
        env.update(zip(node.outs, outs, strict=True))
    return env


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Operation):
    """A product of values that both carry relevance, and whether each is a gate."""

    gates: tuple[str, ...]

    def key(self) -> Any:
        """See `Operation.key`."""
        same = super().key()
        return None if same is None else (same, self.gates)
