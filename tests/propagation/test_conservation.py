"""`conservation`: where relevance is lost."""

import logging

import jax
import numpy as np
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    Gamma,
    Gradient,
    ZPlus,
)
from tests.propagation.networks import dense, dense_params, normal


def test_conservation_accounts_for_everything(x64):
    params, x = dense_params(), normal(2, 4)
    for rules in (Epsilon(0.3), AlphaBeta(stabiliser=0.1), ZPlus(), Gradient(), Gamma()):
        table = jaxrel.conservation(dense, rules, argnums=1)(params, x)
        total = table.summary()
        # The sums are kept in float32.
        assert abs(total["elsewhere"]) < 1e-5 * max(1, abs(total["output"]))
        np.testing.assert_allclose(total["output"], dense(params, x).sum(), rtol=1e-5)
        relevance = jaxrel.lrp(dense, rules, argnums=1)(params, x)
        np.testing.assert_allclose(total["input"], relevance.sum(), rtol=1e-4, atol=1e-5)


def test_a_target_is_said_as_to_lrp(x64):
    params, x = dense_params(), normal(2, 4)
    total = jaxrel.conservation(dense, Epsilon(), argnums=1)(params, x, target=1).summary()
    np.testing.assert_allclose(total["output"], dense(params, x)[:, 1].sum(), rtol=1e-5)
    relevance = jaxrel.lrp(dense, Epsilon(), argnums=1)(params, x, target=1)
    np.testing.assert_allclose(total["input"], relevance.sum(), rtol=1e-4, atol=1e-5)


def test_conservation_tells_bias_from_stabiliser(x64):
    w, b, x = jnp.array([[1.0], [2.0]]), jnp.array([3.0]), jnp.array([[1.0, 1.0]])
    fun = lambda p, x: x @ p[0] + p[1]
    # z = 6: Epsilon(2) passes 6 * 3 / 8, the bias takes half of the 6, epsilon the rest.
    (one,) = jaxrel.conservation(fun, Epsilon(2.0), argnums=1)((w, b), x)
    np.testing.assert_allclose(
        [one.received, one.passed, one.bias, one.stabiliser, one.rule],
        [6, 2.25, 3, 0.75, 0],
        rtol=1e-6,
        atol=1e-6,
    )
    assert one.row is not None
    assert one.row.kind == "dense"


def test_an_output_that_is_its_bias_alone_loses_to_the_bias(x64):
    w, b, x = jnp.array([[1.0], [2.0]]), jnp.array([3.0]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
    for rule in (Epsilon(0.0), Gamma(0.25, 0.0), ZPlus(0.0)):
        (one,) = jaxrel.conservation(lambda p, x: x @ p[0] + p[1], rule, argnums=1)((w, b), x)
        # All contributions are positive: the shares are 3 and 3 of 6, and 0 and 3 of 3.
        np.testing.assert_allclose(
            [one.received, one.passed, one.bias, one.stabiliser, one.rule],
            [9, 3, 6, 0, 0],
            rtol=1e-6,
            atol=1e-6,
        )


def test_conservation_shows_what_stops(x64):
    fun = lambda p, x: jax.nn.softmax(x @ p) @ p.T
    table = jaxrel.conservation(fun, [(jaxrel.everything(), Epsilon())], argnums=1)(
        normal(4, 3), normal(2, 4)
    )
    assert [one.row.kind for one in table if one.row] == ["dense", "softmax", "dense"]
    assert "to stabiliser" in str(table)


def test_conservation_is_one_program(caplog):
    params, x = dense_params(), normal(2, 4)
    rules = AlphaBeta()
    want = jaxrel.conservation(dense, rules, argnums=1)(params, x)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = jaxrel.conservation(dense, rules, argnums=1)(params, x)
    compiled = [record for record in caplog.records if "Finished XLA" in record.message]
    assert len(compiled) == 1
    assert found.summary() == want.summary()
