"""What the rules declare to lose, to bias, stabiliser or the rule itself, is what they lose."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    BetaSmooth,
    Deconvnet,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Guided,
    Pass,
    SignalTakesAll,
    Stop,
    Uniform,
    ZPlus,
)
from tests.propagation.by_hand import (
    BIASED,
    CONSERVING,
    OPS,
    RULES,
    Example,
    close,
    example,
    matrix,
    ready,
    relevance,
)

# The stabiliser, 1e-13, takes its part of totals of at least 1e-3.
STABILISED = 1e-10


def both_signs(e, m):
    """The outputs with positive and with negative contributions, and with positive inputs' too."""
    k = m * e.x.ravel()
    excited = ((m > 0) & (e.x.ravel() > 0)).any(1)
    return ((k > 0).any(1) & (k < 0).any(1) & excited).reshape(e.z.shape)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CONSERVING)
def test_conserves_without_bias(x64, name, op):
    e, m = example(op, bias=False), matrix(op, bias=False)
    e = e._replace(r=np.where(both_signs(e, m), e.r, 0))
    assert e.r.any()
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    rule = ready(name, e, **({} if name == "gradient" else {key: 1e-13}))
    assert abs(relevance(rule, e).sum() - e.r.sum()) < STABILISED * abs(e.r).sum()


@pytest.mark.parametrize("name", CONSERVING)
def test_loses_to_the_bias_what_it_declares(x64, name):
    e, m = example("dense"), matrix("dense")
    e = e._replace(r=np.where(both_signs(e, m), e.r, 0))
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    rule = ready(name, e, **({} if name == "gradient" else {key: 1e-13}))
    missing = e.r.sum() - relevance(rule, e).sum()
    if "bias" not in rule.loses:
        assert abs(missing) < STABILISED * abs(e.r).sum()
        return
    # The bias as one more input, of 1, gets by the same rule what the others do not.
    inputs, outputs = e.x.shape[-1], e.z.shape[-1]
    x = np.concatenate([e.x, np.ones((len(e.x), 1))], -1)
    w = np.concatenate([e.w, e.b[None]])
    whole = Example("dense", x, w, np.zeros(()), e.z, e.r)
    assert w.shape == (inputs + 1, outputs)
    close(missing, relevance(rule, whole)[:, -1].sum(), STABILISED)
    if name in BIASED:
        ignoring = dataclasses.replace(rule, bias="ignored")
        assert abs(e.r.sum() - relevance(ignoring, e).sum()) < STABILISED * abs(e.r).sum()


@pytest.mark.parametrize("name", CONSERVING)
def test_loses_to_the_stabiliser_what_it_declares(x64, name):
    e = example("dense", bias=False)
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    if name == "gradient":
        assert "stabiliser" not in Gradient.loses
        return
    assert "stabiliser" in RULES[name].rule.loses
    lost = e.r.sum() - relevance(ready(name, e, **{key: 0.5}), e).sum()
    assert abs(lost) > 1e-3 * abs(e.r).sum()


@pytest.mark.parametrize("rule", [Uniform(), SignalTakesAll(), SignalTakesAll("activation")])
@pytest.mark.parametrize("gates", [("", ""), ("sigmoid", ""), ("", "sigmoid"), ("activation", "")])
def test_products_conserve(rule, gates):
    assert rule.loses == frozenset()
    assert sum(rule.shares(gates)) == 1


def test_the_signal_takes_all():
    assert Uniform().shares(("sigmoid", "")) == (0.5, 0.5)
    assert SignalTakesAll().shares(("sigmoid", "")) == (0, 1)
    assert SignalTakesAll().shares(("activation", "sigmoid")) == (1, 0)
    assert SignalTakesAll().shares(("activation", "")) == (0.5, 0.5)
    assert SignalTakesAll("activation").shares(("", "activation")) == (1, 0)
    assert SignalTakesAll("activation").shares(("activation", "sigmoid")) == (0.5, 0.5)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("f", "limit"),
    [
        (jax.nn.gelu, 0.5),
        (jax.nn.silu, 0.5),
        (jnp.tanh, 1.0),
        (jax.nn.relu, 0.0),
        (jax.nn.sigmoid, 0.0),
        (jnp.cos, 0.0),
    ],
)
def test_pass_at_zero(x64, f, limit, dtype):
    x, c = jnp.array([0.0, -0.0], dtype), jnp.array([3.0, -2.0], dtype)
    for scalar in (None, f):
        found = Pass().elementwise(f, x, c, scalar)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, c * limit)


@pytest.mark.parametrize("f", [jax.nn.gelu, jax.nn.silu, jnp.tanh, jax.nn.sigmoid, jax.nn.elu])
def test_pass_conserves_elsewhere(x64, f):
    x = jnp.array([-2.0, -1e-5, 1e-9, 0.3, 5.0])
    c = jnp.array([1.0, -2.0, 3.0, 4.0, -5.0])
    np.testing.assert_allclose(x * Pass().elementwise(f, x, c), f(x) * c, rtol=1e-15)


WEIGHTS = np.ones((4, 3))
# One operation of each kind. Sigmoid of 0 is no multiple of 0: even Pass loses something there.
OPERATIONS = {
    "activation": (jax.nn.sigmoid, [Pass(), Guided(), Deconvnet(), BetaSmooth(), Stop()]),
    "product": (lambda x: x[:2] * x[2:], [Uniform(), SignalTakesAll(), Stop()]),
    "dense": (lambda x: x @ WEIGHTS, [Epsilon(), ZPlus(), Gamma(), Flat(), Stop()]),
}


@pytest.mark.parametrize(
    ("kind", "rule"), [(kind, rule) for kind, (_, rules) in OPERATIONS.items() for rule in rules]
)
def test_what_does_not_conserve_says_so(x64, kind, rule):
    fun, _ = OPERATIONS[kind]
    x = jnp.array([-2.0, 0.0, 0.3, 5.0])
    table = jaxrel.conservation(fun, [(jaxrel.op(kind), rule)])(x)
    assert [one.kind for one in table] == [kind]
    total = table.summary()
    # Sums are kept in float32.
    lost = abs(total["rule"]) > 1e-5 * abs(total["output"])
    assert lost == ("rule" in rule.loses)
