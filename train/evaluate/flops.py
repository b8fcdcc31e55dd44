"""What a function costs, as XLA counts it before it optimises."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxrel.tracing import trace
from jaxrel.tracing.evaluate import evaluate
from jaxrel.tracing.graph import Graph
from jaxrel.tracing.primitives import Program, bodies, make_program

Counts = collections.defaultdict[str, float]


def flops(fun: Callable, *args: Any) -> float:
    """Floating-point operations of `fun(*args)`; see `counted`."""
    return counted(fun, *args)["flops"]


def counted(fun: Callable, *args: Any) -> Counts:
    """All that XLA counts of `fun(*args)`, the body of a scan counted once per step.

    XLA's cost analysis counts the body of a loop once, whatever its length, and counts nothing
    inside a library's matrix product. So the program is lowered for the CPU, where there is no
    such call yet, and the steps of each scan are added. A `while` loop still counts once.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        return _count(trace(fun, *args).graph)


def equations(fun: Callable, *args: Any) -> int:
    """Equations of the program that JAX traces, those of a function that is called often once.

    What it costs to trace and to lower a program, told without a clock.
    """
    seen: set[int] = set()

    def count(program: Program) -> int:
        if id(program.jaxpr) in seen:
            return 0
        seen.add(id(program.jaxpr))
        every = program.jaxpr.eqns
        return len(every) + sum(count(body) for one in every for body in bodies(one))

    return count(make_program(fun, *args)[0])


def gradient(model: Any, inputs: Mapping[str, Any]) -> Any:
    """What explanations are compared with: the gradient of the summed score where towers begin.

    The gradient by the position embeddings goes back through all layers, and is that of no other
    parameter.

    Args:
      model: that has a `score`.
      inputs: as `model.pairs` returns them.
    """
    graph, *states = nnx.split(model, nnx.PathContains("position_embedding"), ...)
    positions, rest = states

    def total(positions):
        return nnx.merge(graph, positions, rest).score(inputs).sum()

    return jax.grad(total)(positions)


def _count(graph: Graph) -> Counts:
    total = _lowered(graph)
    for node in graph.nodes:
        times = node.scan.length if node.scan else 1
        for body in node.bodies:
            if times > 1 or any(inner.scan for inner in body.walk()):
                once, within = _lowered(body), _count(body)
                for what in within:
                    total[what] += times * within[what] - once[what]
    return total


def _lowered(graph: Graph) -> Counts:
    shapes = [jax.ShapeDtypeStruct(value.shape, value.aval.dtype) for value in graph.ins]
    lowered = jax.jit(lambda *ins: evaluate(graph, ins).outs).lower(*shapes)
    analysis: Any = lowered.cost_analysis()
    return collections.defaultdict(float, analysis)
