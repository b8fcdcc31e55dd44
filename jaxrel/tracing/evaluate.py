"""Evaluate a graph, with steps replaced, values handed out, and a carrier threaded through.

Three kinds of change can be asked for (`Edits`), each keyed by the node or value it concerns,
in whichever body that lies:

* `steps`: a node is computed by another function (a relevance rule, say), of values of its own
  graph or of those around it;
* `taps`: a value is handed out, after a probe has been added to it if one was given; the
  derivative by a zero probe is the derivative by the value;
* `interceptors`: a value and the carrier pass through a function. The carrier is a pytree that
  rides through `scan`, `remat` and `cond` beside the program's own values, and its cotangent
  rides back; that is how relevance is accumulated inside the backward pass.

Inside `scan`, taps and probes are stacked along a new leading axis. A body that no edit
reaches is bound again as it stands.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.tracing import primitives
from jaxrel.tracing.flow import operands
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value, identity
from jaxrel.tracing.opaque import cure, custom_derivative
from jaxrel.tracing.repeats import Part, parts, wired
from jaxrel.tracing.sharding import shaped_like, zeros


class Step(NamedTuple):
    """Compute a node's outputs as `function(*ins)`; `ins` need not be the node's own.

    With `carried` it is `function(carrier, *ins) -> (carrier, outputs)`. Steps of equal `key` are
    one function; None has no equals.
    """

    ins: tuple[Atom, ...]
    function: Callable[..., Any]
    carried: bool = False
    key: Any = None


class Interceptor(NamedTuple):
    """`function(carrier, value, *reads) -> (carrier, value)`, applied once a value is known.

    `reads` are values of the same graph that are known by then.
    """

    function: Callable
    reads: tuple[Value, ...] = ()


@dataclasses.dataclass(frozen=True)
class Edits:
    """What `evaluate` does differently; see the module's docstring.

    With `once`, what the graph repeats is traced once (see `repeats`). That is for use in a trace:
    outside of one, each part would be a program to compile.
    """

    steps: Mapping[Node, Step] = dataclasses.field(default_factory=dict)
    taps: Mapping[Value, str] = dataclasses.field(default_factory=dict)
    interceptors: Mapping[Value, Interceptor] = dataclasses.field(default_factory=dict)
    once: bool = False

    def reach(self, graph: Graph) -> bool:
        """Whether anything inside the graph is edited."""
        edited = {*self.taps, *self.interceptors}
        return (
            any(value in edited for value in graph.ins)
            or any(node in self.steps for node in graph.nodes)
            or any(out in edited for node in graph.nodes for out in node.outs)
            or any(node.cuts for node in graph.nodes)
            or any(self.reach(body) for node in graph.nodes for body in node.bodies)
        )


class Evaluated(NamedTuple):
    """Flat outputs, handed-out values by tap name, and the carrier."""

    outs: list
    taps: dict[str, Any]
    carrier: Any


def evaluate(
    graph: Graph,
    args: Sequence,
    edits: Edits | None = None,
    *,
    probes: Mapping[str, Any] | None = None,
    carrier: Any = None,
    around: Mapping[Value, Any] | None = None,
) -> Evaluated:
    """Run a graph on flat arguments, with edits.

    Args:
      graph: from `trace` or `build`.
      args: one array per `graph.ins`.
      edits: what to do differently; nothing, by default.
      probes: arrays of the tapped values' shapes (see `tap_shapes`), by tap name, added to them.
      carrier: the initial carrier, any pytree of arrays.
      around: the values of the graphs that hold this one, for steps that read them.

    Returns:
      `Evaluated(outs, taps, carrier)`.

    Raises:
      NotImplementedError: an edit lies where a program cannot be changed (a `while_loop`,
        a function with a derivative of its own, a kernel); the message has the source line.
    """
    edits = edits or Edits()
    env: dict[Value, Any] = {**(around or {}), **graph.constants}
    taps: dict[str, Any] = {}

    def read(atom: Atom) -> Any:
        return atom.value if isinstance(atom, Constant) else env[atom]

    def write(value: Value, x: Any) -> None:
        nonlocal carrier
        if value in edits.interceptors:
            interceptor = edits.interceptors[value]
            carrier, x = interceptor.function(carrier, x, *map(read, interceptor.reads))
        if value in edits.taps:
            name = edits.taps[value]
            x = x + probes[name] if probes and name in probes else x
            taps[name] = x
        env[value] = x

    for value, arg in zip(graph.ins, args, strict=True):
        write(value, arg)
    nodes, steps = _needed(graph, edits)[0] if edits.steps else graph.nodes, edits.steps
    if edits.once:
        nodes, steps = _once(graph, nodes, edits)
    for node in nodes:
        if node in steps:
            step = steps[node]
            ins = list(map(read, step.ins))
            if step.carried:
                carrier, outs = step.function(carrier, *ins)
            else:
                outs = step.function(*ins)
        elif node.cuts or any(map(edits.reach, node.bodies)):
            unread = _unread(node, edits)
            args = [None if i in unread else read(atom) for i, atom in enumerate(node.ins)]
            inner = _enter(node)(node, args, edits, probes or {}, carrier, env)
            outs, carrier = inner.outs, inner.carrier
            taps |= inner.taps
        else:
            outs = node.bind(*map(read, node.ins))
        for value, out in zip(node.outs, outs, strict=True):
            write(value, out)
    return Evaluated([read(atom) for atom in graph.outs], taps, carrier)


def kept(total: Array) -> Array:
    """A sum, or a gradient that is one, that is computed once.

    XLA would compute a residual stream anew wherever a layer reads it, from all that the layers
    before have added: kernels of hundreds of operands, which take long to compile and to read.
    """
    return lax.optimization_barrier(total)


def _needed(graph: Graph, edits: Edits) -> tuple[list[Node], set[Value]]:
    """The nodes without those that only replaced steps would have read, and what is read."""
    edited = {*edits.taps, *edits.interceptors}
    reads = [value for interceptor in edits.interceptors.values() for value in interceptor.reads]
    needed = {atom for atom in (*graph.outs, *reads) if isinstance(atom, Value)}
    nodes = []
    for node in reversed(graph.nodes):
        keep = any(out in needed or out in edited for out in node.outs)
        if keep or node.equation.effects or any(map(edits.reach, node.bodies)):
            needed.update(atom for atom in _reads(node, edits) if isinstance(atom, Value))
            nodes.append(node)
    return nodes[::-1], needed


def _reads(node: Node, edits: Edits) -> Sequence[Atom]:
    """What a node is computed of, in its bodies too."""
    if node in edits.steps:
        return edits.steps[node].ins
    if not any(map(edits.reach, node.bodies)):
        return node.ins
    unread = _unread(node, edits)
    steps = (edits.steps.get(one) for body in node.bodies for one in body.walk())
    within = {value: None for body in node.bodies for value in body.values()}
    around = [a for step in steps if step is not None for a in step.ins if a not in within]
    return [*(atom for i, atom in enumerate(node.ins) if i not in unread), *around]


def _once(
    graph: Graph, nodes: Sequence[Node], edits: Edits
) -> tuple[list[Node], Mapping[Node, Step]]:
    """The nodes and steps, with one step for each part that the graph repeats."""
    kept = {atom for atom in graph.outs if isinstance(atom, Value)}
    kept.update(value for one in edits.interceptors.values() for value in one.reads)
    found: list[Node] = []
    steps = dict(edits.steps)
    functions: dict[Any, Callable] = {}
    reads, key_of = (functools.partial(one, edits=edits) for one in (_reads, _key))
    costly = {node for node in nodes if node in edits.steps or node.bodies}
    for part in parts(nodes, reads, key_of, costly, kept):
        if part.key is None:
            found += part.nodes
            continue
        whole = dataclasses.replace(part.nodes[-1], ins=part.ins, outs=part.outs, bodies=())
        function = functions.setdefault(part.key, jax.jit(_function(part, edits.steps)))
        steps[whole] = Step(part.ins, function)
        found.append(whole)
    return found, steps


def _key(node: Node, edits: Edits) -> Any:
    """What nodes have in common that are one function of what they read, or None."""
    if any(out in edits.taps or out in edits.interceptors for out in node.outs):
        return None
    if node in edits.steps:
        step = edits.steps[node]
        return None if step.carried or step.key is None else (Step, step.key)
    if not node.remat or node.equation.effects:
        return primitives.same_as(node.equation)
    (body,) = node.bodies
    if body.constants or any(v in edits.taps or v in edits.interceptors for v in body.ins):
        return None
    nodes = _needed(body, edits)[0] if edits.steps else body.nodes
    keys = [_key(inner, edits) for inner in nodes]
    if None in keys:
        return None
    form, place = wired(nodes, keys, functools.partial(_reads, edits=edits), body.ins)
    outs = (place[a] if isinstance(a, Value) else identity(a) for a in body.outs)
    return node.remat, form, *outs


def _function(part: Part, steps: Mapping[Node, Step]) -> Callable[..., list]:
    graph, edits = Graph(part.ins, part.nodes, part.outs, {}), Edits(steps)

    def repeated(*ins: Any) -> list:
        return evaluate(graph, ins, edits).outs

    return repeated


def _unread(node: Node, edits: Edits) -> set[int]:
    """The inputs of control flow, by place, that nothing in its bodies reads any longer.

    Of those that are the same for every branch and iteration.
    """
    if not edits.steps or not node.is_open:
        return set()
    given = operands(node, range(len(node.ins)))
    edited = {*edits.taps, *edits.interceptors}
    read = [(body.ins, edited | _needed(body, edits)[1]) for body in node.bodies]
    return {
        place
        for number, place in enumerate(given.fixed)
        if not any(ins[number] in found for ins, found in read)
    }


def tap_shapes(graph: Graph, taps: Mapping[Value, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every tap, with the leading axes that scans give it."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for value in graph.ins:
        if value in taps:
            shapes[taps[value]] = shaped_like(value.aval)
    for node in graph.nodes:
        leads: list[tuple[tuple[int, ...], Graph]] = [((), body) for body in node.bodies]
        if node.scan:
            leads = [((stop - start,), body) for start, stop, body in node.segments()]
        for lead, body in leads:
            for name, inner in tap_shapes(body, taps).items():
                shapes[name] = _stacked(inner, lead)
        for out in node.outs:
            if out in taps:
                shapes[taps[out]] = shaped_like(out.aval)
    return shapes


def _stacked(inner: jax.ShapeDtypeStruct, lead: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    axes = (*(None for _ in lead), *range(len(inner.shape)))
    return shaped_like(inner, axes, shape=lead + inner.shape)


def _enter(node: Node) -> Callable[..., Evaluated]:
    if node.scan:
        return _scan
    if node.is_cond:
        return _cond
    if node.remat:
        return _remat
    why = cure(node) or custom_derivative(node) or "its program is not open to transformations"
    raise NotImplementedError(
        f"{node.name} at {node.where()} holds a value that is asked for, and cannot be "
        f"entered: {why}"
    )


def _within(bodies: Sequence[Graph], edits: Edits, probes: Mapping[str, Any]) -> dict[str, Any]:
    """The probes of the taps inside these bodies."""
    names = {name for body in bodies for name in tap_shapes(body, edits.taps)}
    return {name: probe for name, probe in probes.items() if name in names}


def _scan(
    node: Node, args: list, edits: Edits, probes: Mapping, carrier: Any, around: Mapping
) -> Evaluated:
    assert node.scan is not None
    _, fixed, state, xs = operands(node, args)
    whole = len(node.bodies) == 1
    taps: dict[str, Any] = {}
    found = []
    for start, stop, body in node.segments():
        part = xs if whole else [x[start:stop] for x in xs]
        state, ys, carrier, inner = _segment(
            node, body, stop - start, (fixed, state, part), edits, probes, carrier, around
        )
        taps |= inner
        found.append(ys)
    found = found[::-1] if node.scan.reverse else found
    ys = found[0] if whole else [jnp.concatenate(parts) for parts in zip(*found, strict=True)]
    return Evaluated([*state, *ys], taps, carrier)


def _segment(
    node: Node,
    body: Graph,
    length: int,
    args: tuple,
    edits: Edits,
    probes: Mapping,
    carrier: Any,
    around: Mapping,
) -> tuple[list, list, Any, dict]:
    assert node.scan is not None
    fixed, state, xs = args
    carries = len(state)
    # A scan's state has one type throughout, so Python numbers take the body's.
    types = body.ins[len(fixed) : len(fixed) + carries]
    state = [_strong(x, v) for x, v in zip(state, types, strict=True)]
    probes = _within([body], edits, probes)

    def step(loop, x):
        (state, carrier), (xs, probes) = loop, x
        inner = evaluate(
            body, [*fixed, *state, *xs], edits, probes=probes, carrier=carrier, around=around
        )
        new = [_strong(x, v) for x, v in zip(inner.outs[:carries], types, strict=True)]
        return (new, inner.carrier), (inner.outs[carries:], inner.taps)

    (state, carrier), (ys, taps) = lax.scan(
        step,
        (state, carrier),
        (xs, probes),
        length=length,
        reverse=node.scan.reverse,
        unroll=node.scan.unroll,
    )
    return state, ys, carrier, taps


def _strong(x: Any, value: Value) -> Any:
    if jax.dtypes.issubdtype(value.aval.dtype, jax.dtypes.extended):
        return x
    return lax.convert_element_type(x, value.aval.dtype)


def _remat(
    node: Node, args: list, edits: Edits, probes: Mapping, carrier: Any, around: Mapping
) -> Evaluated:
    assert node.remat is not None
    (body,) = node.bodies

    def run(args, probes, carrier):
        return tuple(evaluate(body, args, edits, probes=probes, carrier=carrier, around=around))

    run = jax.checkpoint(run, policy=node.remat.policy, prevent_cse=node.remat.prevent_cse)
    return Evaluated(*run(args, _within(node.bodies, edits, probes), carrier))


def _cond(
    node: Node, args: list, edits: Edits, probes: Mapping, carrier: Any, around: Mapping
) -> Evaluated:
    (index,), inputs, *_ = operands(node, args)
    # Every branch hands out the same structure: a tap of a branch not taken is zero.
    blank: dict[str, jax.ShapeDtypeStruct] = {}
    for body in node.bodies:
        blank |= tap_shapes(body, edits.taps)

    def branch(body):
        def run(inputs, probes, carrier):
            inner = evaluate(body, inputs, edits, probes=probes, carrier=carrier, around=around)
            empty = {name: zeros(shape) for name, shape in blank.items()}
            return inner.outs, empty | inner.taps, inner.carrier

        return run

    probes = _within(node.bodies, edits, probes)
    return Evaluated(*lax.switch(index, [*map(branch, node.bodies)], inputs, probes, carrier))
