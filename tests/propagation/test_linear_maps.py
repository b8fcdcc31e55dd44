"""What belongs to a linear map: its bias, a batch normalisation."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    Gamma,
    ZPlus,
)
from tests.propagation.networks import conv1, dense, dense_params, normal


def test_a_bias_after_a_residual_belongs_to_the_product(x64):
    w, b, x = normal(4, 4), normal(4), normal(2, 4)
    plain = lambda p, x: x + (jnp.tanh(x) @ p[0] + p[1])
    moved = lambda p, x: x + jnp.tanh(x) @ p[0] + p[1]
    for rule in (Epsilon(0.1), ZPlus(), AlphaBeta(), Gamma()):
        a, b_ = (jaxrel.lrp(f, rule, argnums=1)((w, b), x) for f in (plain, moved))
        np.testing.assert_allclose(a, b_, rtol=1e-12)


def test_bias_fused_separate_and_ignored(x64):
    params, x = dense_params(), normal(2, 4)
    plans = {
        bias: jaxrel.plan(dense, ZPlus(bias=bias), argnums=1)(params, x)[0].bias
        for bias in ("fused", "separate", "ignored")
    }
    assert plans == {b: b for b in plans}
    # Separate: the sum is an operation of its own, so the product hands on what it gets.
    separate = jaxrel.lrp(dense, Epsilon(1e-12, bias="separate"), argnums=1)(params, x)
    fused = jaxrel.lrp(dense, Epsilon(1e-12), argnums=1)(params, x)
    np.testing.assert_allclose(separate, fused, rtol=1e-8)
    zplus = [
        jaxrel.lrp(dense, ZPlus(bias=bias), argnums=1)(params, x)
        for bias in ("fused", "separate", "ignored")
    ]
    assert not np.allclose(zplus[0], zplus[1])
    assert not np.allclose(zplus[1], zplus[2])


@pytest.mark.parametrize("rule", [Epsilon(), ZPlus(), AlphaBeta(), Gamma()], ids=str)
@pytest.mark.parametrize("layout", ["nnx", "dense", "kernel first"])
def test_batch_norm_is_folded_as_by_hand(x64, rule, layout):
    scale, shift, mean, var = normal(5), normal(5) / 3, normal(5) / 5, normal(5) ** 2 + 0.5
    s = scale / jnp.sqrt(var)
    if layout == "nnx":
        w, x = normal(3, 3, 3, 5), normal(2, 6, 6, 3)
        product = jax.vmap(conv1, (0, None))
        folded = w * s
    elif layout == "dense":
        w, x = normal(4, 5), normal(2, 4)
        product, folded = (lambda x, w: x @ w), w * s
    else:
        w, x = normal(5, 4), normal(2, 4)
        product, folded = (lambda x, w: jnp.einsum("oi,bi->bo", w, x)), w * s[:, None]

    def normalised(p, x):
        return jax.nn.relu((product(x, p) - mean) * s + shift)

    def by_hand(p, x):
        return jax.nn.relu(product(x, p) + (shift - mean * s))

    found = jaxrel.lrp(normalised, rule, argnums=1)(w, x)
    expected = jaxrel.lrp(by_hand, rule, argnums=1)(folded, x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


SPELLINGS = {
    "negated mean": lambda z, mean, s, shift: -(mean - z) * s + shift,
    "negated": lambda z, mean, s, shift: -((mean - z) * s - shift),
    "taken from the shift": lambda z, mean, s, shift: shift - (mean - z) * s,
    "divided": lambda z, mean, s, shift: (mean - z) / -(1 / s) + shift,
    "einsum": lambda z, mean, s, shift: jnp.einsum("...c,c->...c", z - mean, s) + shift,
    "scale first": lambda z, mean, s, shift: jnp.einsum("c,...c->...c", s, z - mean) + shift,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layout", ["conv", "dense"])
def test_batch_norm_is_folded_in_any_spelling(x64, spelling, layout):
    s, shift, mean = normal(5) / 2, normal(5) / 3, normal(5) / 5
    assert (s < 0).any()
    assert (s > 0).any()
    if layout == "conv":
        product, w, x = jax.vmap(conv1, (0, None)), normal(3, 3, 3, 5), normal(2, 6, 6, 3)
    else:
        product, w, x = jnp.matmul, normal(4, 5), normal(2, 4)

    def normalised(p, x):
        return jax.nn.relu(SPELLINGS[spelling](product(x, p), mean, s, shift))

    def by_hand(p, x):
        return jax.nn.relu(product(x, p) + (shift - mean * s))

    np.testing.assert_allclose(normalised(w, x), by_hand(w * s, x), rtol=1e-12, atol=1e-14)
    found = jaxrel.lrp(normalised, ZPlus(), argnums=1)(w, x)
    expected = jaxrel.lrp(by_hand, ZPlus(), argnums=1)(w * s, x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_product_that_sums_nothing_scales(x64):
    # einsum("bd,d->bd") is no dense layer, whose negative weights z+ would leave out.
    w, x, scale = normal(4, 3), normal(2, 4), normal(4)
    assert (scale < 0).any()

    def with_einsum(x):
        jnp.einsum("bd,d->bd", x, scale)  # of which nothing is used
        return jnp.einsum("bd,d->bd", jnp.tanh(x), scale) @ w

    def with_product(x):
        return (jnp.tanh(x) * scale) @ w

    found, expected = (jaxrel.lrp(f, ZPlus())(x) for f in (with_einsum, with_product))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
