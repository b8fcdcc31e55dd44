"""Graphs evaluate to what they were traced from; edits reach everywhere."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel.tracing import Edits, Interceptor, Step, tag_name, tap_shapes, trace
from jaxrel.tracing.evaluate import evaluate
from jaxrel.tracing.rewrite import cut_scans
from tests.tracing.layers import (
    BATCH,
    LAYERS,
    SAME,
    WEIGHTS,
    WIDTH,
    X,
    layer,
    remat,
    scanned,
    unrolled,
)


def vmapped(x):
    return jax.vmap(lambda x: scanned(x[None])[0])(x)


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g * 7,))


CONSTRUCTS = {
    "scan": scanned,
    "remat": remat,
    "vmap": vmapped,
    "cond": lambda x: lax.cond(x.sum() > 0, scanned, unrolled, x),
    "switch": lambda x: lax.switch(1, [scanned, unrolled], x),
    "while": lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x).sum(-1),
    "custom_vjp": lambda x: clipped(x).sum(-1),
    "custom_jvp": lambda x: jax.nn.relu(x).sum(-1),
    "map": lambda x: lax.map(lambda x: x.sum(), x),
    "associative_scan": lambda x: lax.associative_scan(jnp.add, x, axis=1)[:, -1],
    "fft": lambda x: jnp.abs(jnp.fft.fft(x)).sum(-1),
    "top_k": lambda x: lax.top_k(x, 2)[0].sum(-1),
    "solve": lambda x: jnp.linalg.solve(WEIGHTS[0], x.T).sum(0),
    "reverse_scan": lambda x: lax.scan(
        lambda x, w: (layer(x, w), None), x, WEIGHTS, reverse=True, unroll=2
    )[0].sum(-1),
}


@pytest.mark.parametrize("fun", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
def test_an_evaluated_graph_is_the_function_and_keeps_its_derivative(fun):
    # Rebuild every body: an interceptor on everything tagged, that does nothing.
    def again(x):
        traced = trace(fun, x)
        interceptors = {
            node.outs[0]: Interceptor(lambda carrier, value: (carrier, value))
            for node in traced.graph.walk()
            if tag_name(node)
        }
        result = evaluate(traced.graph, traced.args, Edits(interceptors=interceptors), carrier=0.0)
        return traced.unflatten(result.outs)

    np.testing.assert_array_equal(again(X), fun(X))
    # Same operations in the same order, recompiled: rounding only.
    differentiable = jax.make_jaxpr(fun)(X).eqns[0].primitive.name != "while"
    if differentiable:
        want = jax.grad(lambda x: fun(x).sum())(X)
        got = jax.grad(lambda x: again(x).sum())(X)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cut_scan_keeps_its_stacked_outputs_in_order(reverse):
    def fun(x):
        step = lambda x, w: (layer(x, w), x.sum())
        return lax.scan(step, x, WEIGHTS, reverse=reverse)

    traced = trace(fun, X)
    cut = cut_scans(traced.graph, lambda node: [1])
    assert [node.cuts for node in cut.walk() if node.scan] == [(0, 1, LAYERS)]
    got = traced.unflatten(evaluate(cut, traced.args).outs)
    # Same operations in the same order, recompiled: rounding only.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, got, fun(X))


def test_a_step_can_be_replaced_inside_a_remated_scan():
    traced = trace(remat, X)
    softmaxes = [node for node in traced.graph.walk() if node.name == "exp"]
    steps = {node: Step(node.ins, lambda x: [jnp.cosh(x)]) for node in softmaxes}
    got = evaluate(traced.graph, traced.args, Edits(steps=steps)).outs[0]

    def expected(x):
        for w in WEIGHTS:
            s = x @ w
            e = jnp.cosh(s - s.max(-1, keepdims=True))
            x = x + (e / e.sum(-1, keepdims=True)) @ w.T
        return x.sum(-1)

    np.testing.assert_allclose(got, expected(X), rtol=1e-5)  # float32, other fusion


def test_a_carrier_rides_through_control_flow_and_back():
    """An interceptor that counts on the way forward and doubles its cotangent on the way back."""

    @jax.custom_vjp
    def count(carrier, value):
        return carrier + 1, value

    count.defvjp(lambda c, v: (count(c, v), None), lambda _, ct: (2 * ct[0], ct[1]))

    def run(fun, start):
        traced = trace(fun, X)
        tags = [node.outs[0] for node in traced.graph.walk() if tag_name(node)]
        edits = Edits(interceptors={value: Interceptor(count) for value in tags})
        return evaluate(traced.graph, traced.args, edits, carrier=start).carrier

    both = lambda x: lax.cond(x.sum() > -9, scanned, unrolled, x)
    for fun in (*SAME.values(), both):
        forward, back = jax.value_and_grad(lambda start, fun=fun: run(fun, start))(0.0)
        assert (forward, back) == (LAYERS, 2**LAYERS)


def test_tap_shapes_are_known_before_running():
    traced = trace(remat, X)
    taps = {node.outs[0]: "tap" for node in traced.graph.walk() if tag_name(node)}
    assert tap_shapes(traced.graph, taps)["tap"].shape == (LAYERS, BATCH, WIDTH)
