"""A function as data: a jaxpr, flattened into a graph that passes can read and evaluate.

`trace` turns a function and example arguments into a `Graph`. Calls that only group
operations (`jit` and its relatives) are inlined; control flow stays a node that carries its
bodies as graphs; every value is a `Value` with an identity of its own, so a set or a mapping
of values says unambiguously which of them, in whichever body, is meant.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.tracing import primitives
from jaxrel.tracing.modules import advice, pure
from jaxrel.tracing.primitives import Program, Remat, Scan, While

# Where a model's author did not write: the innermost line that is not there is the user's.
_FRAMEWORKS = re.compile(
    r"(site|dist)-packages[/\\](jax|flax|equinox|haiku|penzai|optax|jaxtyping|beartype)[/\\]"
    r"|[/\\]jaxrel[/\\]tracing[/\\]|[/\\](contextlib|functools)\.py$|^<@beartype"
)
# Where no user writes at all.
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python3|^<(frozen|@)")


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An intermediate value; compared by identity. `aval` has its shape and dtype."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return self.aval.shape

    def __repr__(self):
        return f"Value({self.aval.str_short()})"


@dataclasses.dataclass(eq=False, slots=True)
class Constant:
    """A literal written into the program."""

    value: Any
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The literal's shape."""
        return self.aval.shape


Atom = Value | Constant


@dataclasses.dataclass(eq=False)
class Node:
    """One operation: `outs = primitive(*ins, **params)`, with its bodies if it has any.

    A scan cut into segments (see `rewrite.cut_scans`) has one body per segment, and `cuts` are
    the segments' bounds along the scanned axis: (0, 1, length), say. `callers` are the equations
    of the calls and bodies that held the operation, innermost first.
    """

    equation: Any
    ins: tuple[Atom, ...]
    outs: tuple[Value, ...]
    bodies: tuple["Graph", ...] = ()
    cuts: tuple[int, ...] = ()
    callers: tuple[Any, ...] = ()

    @functools.cached_property
    def name(self) -> str:
        """The primitive's name, such as 'dot_general'."""
        return primitives.name_of(self.equation)

    @functools.cached_property
    def scan(self) -> Scan | None:
        """Counts and settings of a scan; None for another operation."""
        return primitives.scan_of(self.equation)

    @functools.cached_property
    def loop(self) -> While | None:
        """Counts of a while loop; None for another operation."""
        return primitives.while_of(self.equation)

    @functools.cached_property
    def remat(self) -> Remat | None:
        """Settings of `jax.checkpoint`; None for another operation."""
        return primitives.remat_of(self.equation)

    @property
    def is_cond(self) -> bool:
        """Whether its bodies are branches, of which its first input chooses one."""
        return self.name in primitives.COND

    @property
    def is_control(self) -> bool:
        """Whether it is control flow: a scan, a cond, a while loop or a remat."""
        return self.name in primitives.CONTROL

    @property
    def is_open(self) -> bool:
        """Whether it is control flow with a derivative, whose bodies can be changed."""
        return self.is_control and not self.loop

    def segments(self) -> list[tuple[int, int, "Graph"]]:
        """The (start, stop, body) of a scan, in order of execution; usually one."""
        assert self.scan is not None
        bounds = self.cuts or (0, self.scan.length)
        found = [*zip(bounds[:-1], bounds[1:], self.bodies, strict=True)]
        return found[::-1] if self.scan.reverse else found

    def where(self) -> str:
        """The user's source line: 'file.py:12 (function)'; frameworks' own lines are passed.

        Of a kernel, which a library has written for its users, all installed code is passed.
        """
        passed = (_INSTALLED, _FRAMEWORKS) if self.name in primitives.KERNELS else (_FRAMEWORKS,)
        for pattern in passed:
            for frame in self.frames():
                if not pattern.search(frame.file_name) and not _FRAMEWORKS.search(frame.file_name):
                    return f"{_short(frame.file_name)}:{frame.line_num} ({frame.function_name})"
        return _short(primitives.summary(self.equation))

    def frames(self) -> Iterator[Any]:
        """The stack that wrote the operation, then those of the calls that held it."""
        for equation in (self.equation, *self.callers):
            yield from primitives.frames(equation)

    def bind(self, *values) -> list:
        """Apply the operation as the user wrote it, its own derivative included."""
        return primitives.bind(self.equation, values)


@dataclasses.dataclass(eq=False)
class Graph:
    """Operations in order of execution. `constants` are the arrays the function closed over."""

    ins: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outs: tuple[Atom, ...]
    constants: dict[Value, Any]

    def walk(self) -> Iterator[Node]:
        """Every node, those of the bodies after the node that holds them."""
        for node in self.nodes:
            yield node
            for body in node.bodies:
                yield from body.walk()

    def values(self) -> Iterator[Value]:
        """Every value, those of the bodies too."""
        yield from (*self.ins, *self.constants)
        for node in self.nodes:
            yield from node.outs
            for body in node.bodies:
                yield from body.values()

    def producers(self) -> dict[Value, Node]:
        """Which node computes a value (of this graph, not of its bodies)."""
        return {out: node for node in self.nodes for out in node.outs}

    def users(self) -> dict[Value, list[Node]]:
        """Which nodes use a value (of this graph, not of its bodies)."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.ins:
                if isinstance(value, Value):
                    users.setdefault(value, []).append(node)
        return users


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced call: its graph, the flat arguments, and how to rebuild the output."""

    graph: Graph
    args: tuple[Any, ...]
    out_tree: Any

    def unflatten(self, outs: Sequence) -> Any:
        """Flat outputs back in the structure the function returned."""
        return jax.tree.unflatten(self.out_tree, outs)


def trace(fun: Callable, *args, **kwargs) -> Traced:
    """Trace `fun(*args, **kwargs)` once, for the shapes and dtypes of these arguments."""
    try:
        program, shapes = primitives.make_program(pure(fun), *args, **kwargs)
    except Exception as error:
        if (what := advice(error)) is None:
            raise
        raise TypeError(f"jaxrel: {what}") from error
    # As the trace saw them: NumPy's float64 is float32 unless x64 is on.
    leaves = tuple(map(jnp.asarray, jax.tree.leaves((args, kwargs))))
    return Traced(build(program), leaves, jax.tree.structure(shapes))


def tag_name(node: Node) -> str | None:
    """The name a node gives its value (`jaxrel.tag` or `checkpoint_name`), else None."""
    return primitives.tag_of(node.equation)


def build(program: Program, callers: tuple[Any, ...] = ()) -> Graph:
    """The graph of a program, with grouping calls inlined; `callers` hold the program.

    What is computed twice from the same values is one operation: exp(s) / sum(exp(s)), say.
    """
    nodes: list[Node] = []
    constants: dict[Value, Any] = {}
    computed: dict[Any, tuple[Value, ...]] = {}

    def inline(program: Program, atoms: Sequence[Atom], callers: tuple[Any, ...]) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip(program.jaxpr.invars, atoms, strict=True))
        for var, const in zip(program.jaxpr.constvars, program.consts, strict=True):
            value = env[var] = Value(var.aval)
            constants[value] = const

        def read(atom) -> Atom:
            return Constant(atom.val, atom.aval) if primitives.literal(atom) else env[atom]

        for equation in program.jaxpr.eqns:
            ins = tuple(read(atom) for atom in equation.invars)
            if primitives.name_of(equation) in primitives.INLINED:
                (inner,) = primitives.bodies(equation)
                inlined = inline(inner, ins, (equation, *callers))
                env.update(zip(equation.outvars, inlined, strict=True))
                continue
            outs = tuple(Value(var.aval) for var in equation.outvars)
            same = primitives.same_as(equation)
            if same is not None:
                earlier = computed.setdefault((same, *map(identity, ins)), outs)
                if earlier is not outs:
                    env.update(zip(equation.outvars, earlier, strict=True))
                    continue
            env.update(zip(equation.outvars, outs, strict=True))
            within = (equation, *callers)
            bodies = tuple(build(body, within) for body in primitives.bodies(equation))
            nodes.append(Node(equation, ins, outs, bodies, callers=callers))
        return [read(atom) for atom in program.jaxpr.outvars]

    ins = tuple(Value(var.aval) for var in program.jaxpr.invars)
    outs = inline(program, ins, callers)
    return Graph(ins, tuple(nodes), tuple(outs), constants)


def identity(atom: Atom) -> Any:
    """What two inputs have in common that are the same value or number."""
    if isinstance(atom, Value):
        return atom
    return atom.aval, np.asarray(atom.value).tobytes()


def _short(file: str) -> str:
    """A path as seen from the working directory if it lies below, or of a package from there."""
    if "ipykernel" in file:
        return "cell"
    *_, packaged = re.split(r"[/\\](?:site|dist)-packages[/\\]", file)
    if packaged != file:
        return packaged
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return file if relative.startswith("..") else relative
