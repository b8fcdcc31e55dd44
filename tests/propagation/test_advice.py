"""What an error says to add touches the operation that it names, and no other."""

import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import everything, op
from jaxrel.propagation.rules import Epsilon, Gradient
from tests.propagation.networks import normal


def swiglu(x):
    return jax.nn.silu(x @ normal(6, 8)) * (x @ normal(8, 6).T) @ normal(8, 6)


def filtered(x):
    """Linear in x, by way of its spectrum."""
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.array([1.0, 0.5, 0.2, 0.1]), n=6)


def spectrum(x):
    z = jnp.fft.fft(x) / 2
    return (z * z.conj()).real + jnp.abs(z + z[..., ::-1])


def powers(x):
    """A power of two values, beside an activation that is a power."""
    y = jnp.abs(x @ normal(6, 6))
    return y**2.5 + (y + 1) ** jax.nn.sigmoid(x.sum(-1, keepdims=True) + y)


def advised(fun, x, rules):
    """The entries that the error says, as it says them."""
    with pytest.raises(NotImplementedError) as error:
        jaxrel.lrp(fun, rules)(x)
    found = re.findall(r"add (\(jaxrel\.op.*?\)\)) at the end of the composite", str(error.value))
    return [eval(entry, {"jaxrel": jaxrel}) for entry in sorted(set(found))]


@pytest.mark.parametrize("fun", [filtered, spectrum], ids=["linear", "spectrum"])
def test_advice_for_complex_values_conserves_relevance(x64, fun):
    x, rules = normal(2, 6), [(everything(), Epsilon(0.0))]
    whole = lambda x: fun(swiglu(x))
    entries = advised(whole, x, rules)
    found = jax.jit(jaxrel.lrp(whole, rules + entries))(x)
    # Without biases and stabilisers everything arrives; spectrum is squares and absolute values.
    np.testing.assert_allclose(found.sum(), whole(x).sum(), rtol=1e-10)
    c = jax.grad(lambda y: fun(y).sum())(swiglu(x))
    if fun is filtered:
        expected = jaxrel.lrp(swiglu, rules)(x, seed=lambda y: y * c)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    balance = jaxrel.conservation(whole, rules + entries)(x).summary()
    assert abs(balance["elsewhere"]) < 1e-5 * abs(balance["output"])


def test_advice_names_complex_operations_apart():
    x, rules = normal(2, 6), [(everything(), Epsilon())]
    names = {where.names for where, _ in advised(filtered, x, rules)}
    assert names == {("fft",), ("complex_mul",), ("complex_pad",)}
    assert all(rule == Gradient() for _, rule in advised(filtered, x, rules))
    assert len(jaxrel.plan(filtered, [*rules, (op("complex_mul"), Gradient())])(x).uncovered) == 3


def test_advice_leaves_operations_of_the_same_name_alone(x64):
    x, rules = normal(2, 6), [(everything(), Epsilon())]
    entries = advised(powers, x, rules)
    before, after = jaxrel.plan(powers, rules)(x), jaxrel.plan(powers, rules + entries)(x)
    changed = [row for row, new in zip(before, after, strict=True) if row.rule != new.rule]
    assert changed == list(before.uncovered)
    assert not after.uncovered
