"""Rules by layer, in stacks that are scanned."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxrel
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    ZPlus,
)
from tests.propagation.networks import (
    F64,
    last,
    normal,
    relevance_by_hand,
    scanned,
    stack_params,
    unrolled,
)

PER_LAYER = {
    "one layer": [(jaxrel.layer(2), Gamma(1.0)), (jaxrel.everything(), Epsilon(0.01))],
    "a slice": [(jaxrel.layer(slice(1, 3)), ZPlus()), (jaxrel.everything(), Epsilon(0.01))],
    "steps": [(jaxrel.layer(slice(0, 4, 2)), ZPlus()), (jaxrel.everything(), Epsilon(0.01))],
    "not": [(~jaxrel.layer(0), AlphaBeta()), (jaxrel.everything(), Gamma())],
    "first": [(jaxrel.first(), Flat()), (jaxrel.everything(), Epsilon(0.01))],
    "both": [
        (jaxrel.first(), Gamma(2.0)),
        (jaxrel.layer(3) | jaxrel.layer(1), ZPlus()),
        (jaxrel.everything(), Epsilon(0.01)),
    ],
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PER_LAYER)
def test_rules_by_layer_in_a_scan(x64, name, reverse):
    p, x = stack_params(), normal(3, 5)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(4)]
    rules = PER_LAYER[name]
    if reverse:

        def fun(p, x):
            step = lambda x, q: (x + jax.nn.relu(x @ q["w"] + q["b"]), None)
            return lax.scan(step, x, p, reverse=True)[0]

        # Executed last to first; a layer keeps its index in the stack.
        flat = lambda layers, x: unrolled(layers[::-1], x)
    else:
        fun, flat = scanned, unrolled
    expected = jaxrel.lrp(flat, rules, argnums=1)(layers, x)
    found = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(p, x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    if name == "first":
        weights = [*zip(np.asarray(p["w"]), np.asarray(p["b"]), strict=True)]
        weights = weights[::-1] if reverse else weights
        by_hand = relevance_by_hand([Flat(), *3 * [Epsilon(0.01)]], weights, np.asarray(x))
        np.testing.assert_allclose(found, by_hand, rtol=1e-10, atol=1e-12)


def test_negative_layers_count_from_the_end_of_a_stack(x64):
    p, x = stack_params(), normal(3, 5)
    rules = lambda where: [(where, Gamma(1.0)), (jaxrel.everything(), Epsilon(0.01))]
    a, b = (
        jaxrel.lrp(scanned, rules(where), argnums=1)(p, x)
        for where in (jaxrel.layer(-1), jaxrel.layer(3))
    )
    np.testing.assert_array_equal(a, b)
    plan = jaxrel.plan(scanned, rules(jaxrel.layer(-1)), argnums=1)(p, x)
    assert [row.layers for row in plan if row.kind == "dense"] == ["0-2", "3"]


def test_time_is_no_stack_of_layers(x64):
    cell = nnx.OptimizedLSTMCell(4, 5, **F64)
    x = normal(2, 6, 4)
    rules = [(jaxrel.layer(0), Gamma()), (jaxrel.everything(), Epsilon())]
    with pytest.raises(ValueError, match=r"layer\(0\).*matches no operation"):
        jaxrel.lrp(last, rules, argnums=1)(cell, x)
