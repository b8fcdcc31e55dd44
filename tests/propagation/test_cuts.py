"""A scan is the loop that it stands for, whatever its first state is."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, everything, op
from jaxrel.propagation.rules import Epsilon, SignalTakesAll, Uniform
from tests.propagation.networks import normal

SIGNAL = [(op("product"), SignalTakesAll()), (everything(), Epsilon(0.0))]
HALVES = [(op("product"), Uniform()), (everything(), Epsilon(0.0))]


def loop(cell, state, xs, reverse=False):
    steps = reversed(range(len(xs))) if reverse else range(len(xs))
    for t in steps:
        state, _ = cell(state, xs[t])
    return state


def scan(cell, state, xs, reverse=False):
    return lax.scan(cell, state, xs, reverse=reverse)[0]


def lstm(state, x):
    h, c = state
    i, f, g, o = jnp.split(x @ normal(3, 16) + h @ normal(4, 16), 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None


def gru(h, x):
    a, b = x @ normal(3, 12), h @ normal(4, 12)
    r, z = (jax.nn.sigmoid(a[..., i] + b[..., i]) for i in (slice(4), slice(4, 8)))
    return (1 - z) * jnp.tanh(a[..., 8:] + r * b[..., 8:]) + z * h, None


def delayed(state, x):
    """The gate's value comes two steps late."""
    late, later, h = state
    return (x @ normal(3, 4), late, jax.nn.sigmoid(x @ normal(4, 3).T) * later + 0.3 * h), None


def linear(h, x):
    """A gated linear recurrence whose gate is a function of the state alone."""
    return jax.nn.sigmoid(h @ normal(4, 4) + 1) * (x @ normal(3, 4)) + h / 2, None


CELLS = {"lstm": (lstm, 2), "gru": (gru, 1), "delayed": (delayed, 3), "linear": (linear, 1)}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("start", ["constant", "zeros", "argument"])
# Stabilisers of 0: the loop has no sum with a state of zeros, and the scan stabilises that sum.
@pytest.mark.parametrize("rules", [SIGNAL, HALVES, composites.captioning(0.0)], ids=["s", "u", "c"])
def test_a_scan_from_any_state_is_its_loop(x64, cell, start, rules):
    cell, count = CELLS[cell]
    state = normal(count, 2, 4) if start != "zeros" else np.zeros((count, 2, 4))
    # Three iterations at most differ from the later ones, of which there is one then.
    xs, reverse = normal(4, 2, 3), start == "argument"

    def run(way):
        def fun(state, xs):
            if start == "zeros":
                state = jnp.zeros((count, 2, 4))
            first = tuple(state) if count > 1 else state[0]
            return jax.tree.leaves(way(cell, first, xs, reverse))[-1].sum(-1)

        return jax.jit(jaxrel.lrp(fun, rules, argnums=1))(jnp.asarray(state), xs)

    # The same operations in another order of float64 sums.
    np.testing.assert_allclose(run(scan), run(loop), rtol=1e-10, atol=1e-12)


def test_a_gate_of_a_constant_state_by_hand(x64):
    """h1 = x0 + s(x0) h0 is a sum, in which the constant only scales; h2 = x1 + s(x1) h1."""
    x, h0 = jnp.array([0.7, -0.4]), jnp.array(1.5)
    fun = lambda x: lax.scan(lambda h, x: (x + jax.nn.sigmoid(x) * h, None), h0, x)[0]
    (a, b), (s, t) = x, 1 / (1 + np.exp(-np.asarray(x)))
    found = jaxrel.lrp(fun, [(op("product"), SignalTakesAll())])(x)
    np.testing.assert_allclose(found, [t * (a + s * 1.5), b], rtol=1e-12)
    h1 = a + s * 1.5
    found = jaxrel.lrp(fun, [(op("product"), Uniform())])(x)
    np.testing.assert_allclose(found, [t * h1 / 2, b + t * h1 / 2], rtol=1e-12)


def test_a_scan_from_zeros_stays_whole(x64):
    fun = lambda x: scan(lstm, (jnp.zeros((2, 4)), jnp.zeros((2, 4))), x)[0]
    x = normal(5, 2, 3)
    cut = lambda x: scan(lstm, tuple(normal(2, 2, 4)), x)[0]
    kinds = [[row.kind for row in jaxrel.plan(f, SIGNAL)(x)].count("product") for f in (fun, cut)]
    # Three products; and in the first iteration two, as the forget gate scales a constant.
    assert kinds == [3, 5]


def test_nested_scans_from_constants_are_their_loops(x64):
    x, h0 = normal(3, 2, 3), normal(2, 4)

    def run(way):
        inner = lambda h, x: way(lambda h, _: linear(h, x), h, jnp.zeros(2))
        return lambda x: way(lambda h, x: (inner(h, x), None), h0, x)

    for rules in (SIGNAL, HALVES):
        found, want = (jax.jit(jaxrel.lrp(run(way), rules))(x) for way in (scan, loop))
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
