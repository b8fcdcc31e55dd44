"""Facts that flow through control flow."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel.tracing import trace
from jaxrel.tracing.flow import Backward, dependents, operands
from jaxrel.tracing.rewrite import cut_scans
from tests.tracing.layers import WEIGHTS, X


def test_dependents_follow_loops_to_a_fixpoint():
    def fun(x, y):
        def step(state, _):
            a, b, c = state
            return (b, c, c), a.sum()

        return lax.scan(step, (y, y, x), None, length=4)

    traced = trace(fun, X, X)
    found = dependents(traced.graph, traced.graph.ins[:1])
    assert [out in found for out in traced.graph.outs] == [True, True, True, True]
    found = dependents(traced.graph, traced.graph.ins[1:])
    assert [out in found for out in traced.graph.outs] == [True, False, False, True]


def test_dependents_count_conditions_and_integers():
    traced = trace(lambda x, y: (lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, y), y * 2), X, X)
    found = dependents(traced.graph, traced.graph.ins[:1])
    assert [out in found for out in traced.graph.outs] == [True, False]


def test_a_while_loop_may_run_no_time():
    """Then its result is what it started from, whatever its body writes."""

    def fun(x, y, n):
        state = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, y * 2), (0, x))
        return state[1]

    graph = trace(fun, X, X, 3).graph
    for source, value in enumerate(graph.ins):
        assert graph.outs[0] in dependents(graph, [value]), source


@pytest.mark.parametrize("reverse", [False, True])
def test_facts_flow_from_segment_to_segment_of_a_cut_scan(reverse):
    """What a scan returns depends on the state it started from, but for what each step replaces."""

    def fun(x, y):
        step = lambda state, w: ((w * 2, state[1] + w), state[0])
        return lax.scan(step, (x, y), WEIGHTS[:, 0], reverse=reverse)

    graph = cut_scans(trace(fun, X[0], X[1]).graph, lambda node: [1])
    for source, expected in zip(
        graph.ins, ([False, False, True], [False, True, False]), strict=True
    ):
        found = dependents(graph, [source])
        assert [out in found for out in graph.outs] == expected


def test_going_back_finds_what_leads_to_the_wanted_outputs():
    class Leads(Backward):
        def carries(self, value):
            return True

    def fun(x, y, z, n):
        first, second = lax.cond(n > 0, lambda: (x, y), lambda: (x * 2, y))
        step = lambda state, w: ((state[1], state[1] * w), None)
        state, _ = lax.scan(step, (first, z), WEIGHTS[:, 0])
        return state[0], jax.checkpoint(jnp.sin)(second)

    graph = trace(fun, X[0], X[1], X[0], 1).graph
    # The first state is replaced in every step: it leads nowhere, but nor does it harm.
    assert Leads().run(graph, [True, False]) == [True, False, True, False]
    assert Leads().run(graph, [False, True]) == [False, True, False, False]


def test_operands_by_what_they_are_for():
    def sorted_inputs(fun, *args):
        (node,) = [node for node in trace(fun, *args).graph.walk() if node.is_control]
        return [len(part) for part in operands(node, node.ins)]

    scan = lambda x, y, xs: lax.scan(lambda s, w: (s * y, s + w), x, xs)
    assert sorted_inputs(scan, X, 2.0 * X, jnp.stack([X, X])) == [0, 1, 1, 1]
    loop = lambda x, y, n: lax.while_loop(lambda s: s.sum() < n, lambda s: s + y, x)
    assert sorted_inputs(loop, X, X, 9.0) == [1, 1, 1, 0]
    cond = lambda x, y: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, y)
    assert sorted_inputs(cond, X, X) == [1, 1, 0, 0]
    assert sorted_inputs(jax.checkpoint(lambda x, y: jnp.sin(x * y)), X, X) == [0, 2, 0, 0]
