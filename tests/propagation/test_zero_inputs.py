"""Rules that give relevance to inputs of zero: black pixels, directly and in bodies."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    Epsilon,
    Flat,
    WSquare,
    ZBox,
)
from tests.propagation.networks import (
    conv1,
    dense,
    dense_params,
    normal,
    relevance_by_hand,
    scanned,
    stack_params,
    unrolled,
)


@pytest.mark.parametrize("rule", [Flat(), WSquare(), ZBox(-1.0, 1.0)], ids=str)
def test_black_pixels_can_be_relevant(x64, rule):
    w = normal(3, 3, 3, 4)
    x = jnp.zeros((1, 6, 6, 3))

    def fun(w, x):
        y = (x.transpose(0, 3, 1, 2).reshape(1, 3, 6, 6) - 0.5) / 0.25
        return jax.nn.relu(conv1(y[0].transpose(1, 2, 0), w)).sum((0, 1))

    rules = [(jaxrel.first(), rule), (jaxrel.everything(), Epsilon())]
    relevance = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(w, x)
    # Everything arrives although every input is 0; 1e-6 is the stabiliser.
    np.testing.assert_allclose(relevance.sum(), fun(w, x).sum(), rtol=1e-4)
    note = jaxrel.plan(fun, rules, argnums=1)(w, x)[0]
    assert note.first
    assert "not at an input" not in note.note


def black_pixels_by_hand(wrap, w, b, x):
    """What `test_black_pixels_in_bodies` expects, in NumPy."""
    if wrap == "carry":
        rules = [Flat(), *3 * [Epsilon(0.01)]]
        return relevance_by_hand(rules, [*zip(w, b, strict=True)], x)
    if wrap != "scan":
        out = np.maximum((x - 0.5) @ w[0] + b[0], 0)
        return np.broadcast_to(out.sum(-1, keepdims=True) / (5 + 1e-6), x.shape)
    states = [np.zeros(5)]
    for row in x:
        states.append(np.tanh(states[-1] + row @ w[0]))
    r, found = states[-1], np.zeros_like(x)
    for n in reversed(range(len(x))):
        c = r / (states[n] + x[n] @ w[0])
        found[n] = (c * (x[n] @ w[0])).sum() / (5 + 1e-6)
        r = c * states[n]
    return found


@pytest.mark.parametrize("wrap", ["remat", "scan", "carry", "cond"])
def test_black_pixels_in_bodies(x64, wrap):
    p, x = stack_params(), normal(3, 5).at[:, :2].set(0.0)
    rules = [(jaxrel.first(), Flat()), (jaxrel.everything(), Epsilon(0.01))]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(4)]
    first = lambda p, x: jax.nn.relu((x - 0.5) @ p[0]["w"] + p[0]["b"])
    if wrap == "remat":
        fun, args = jax.checkpoint(first), (layers, x)
    elif wrap == "scan":
        # Time steps: the input is scanned over, the state is not the input.
        def first(p, x):
            h = jnp.zeros(5)
            for row in x:
                h = jnp.tanh(h + row @ p[0]["w"])
            return h

        def fun(p, x):
            return lax.scan(lambda h, row: (jnp.tanh(h + row @ p[0]["w"]), None), jnp.zeros(5), x)[
                0
            ]

        args = (layers, x)
    elif wrap == "carry":
        first, fun, args = (lambda _, x: unrolled(layers, x)), scanned, (p, x)
    else:
        fun = lambda p, x: lax.cond(p[0]["w"].sum() < 99, lambda x: first(p, x), lambda x: x, x)
        args = (layers, x)
    expected = jaxrel.lrp(first, rules, argnums=1)(*args)
    assert jnp.abs(expected[:, :2]).min() > 0
    np.testing.assert_allclose(jaxrel.lrp(fun, rules, argnums=1)(*args), expected, rtol=1e-10)
    by_hand = black_pixels_by_hand(wrap, *map(np.asarray, (p["w"], p["b"], x)))
    np.testing.assert_allclose(expected, by_hand, rtol=1e-10)


def test_direct_rules_in_the_middle_say_what_they_cannot_do(x64):
    params, x = dense_params(), normal(2, 4)
    rules = [(jaxrel.path("w2"), WSquare()), (jaxrel.everything(), Epsilon())]
    assert "no relevance where x = 0" in jaxrel.plan(dense, rules, argnums=1)(params, x)[-1].note
    assert jnp.all(jnp.isfinite(jaxrel.lrp(dense, rules, argnums=1)(params, x)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("one", "others"), [(Flat(), Flat()), (WSquare(), WSquare()), (Flat(), Epsilon(0.01))], ids=str
)
def test_direct_rules_in_a_scan_as_by_hand(x64, one, others, reverse):
    p, x = stack_params(), normal(3, 5).at[:, :2].set(0.0)

    def fun(p, x):
        step = lambda x, q: (x + jax.nn.relu(x @ q["w"] + q["b"]), None)
        return lax.scan(step, x, p, reverse=reverse)[0]

    rules = [(jaxrel.first(), one), (jaxrel.everything(), others)]
    found = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(p, x)
    layers = [*zip(np.asarray(p["w"]), np.asarray(p["b"]), strict=True)]
    layers = layers[::-1] if reverse else layers
    expected = relevance_by_hand([one, others, others, others], layers, np.asarray(x))
    assert np.abs(expected[:, :2]).min() > 0
    # Where relevance is made a factor of the value, that is moved away from 0 by 1e-9.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
