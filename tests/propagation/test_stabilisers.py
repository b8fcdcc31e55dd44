"""Stabilisers: away from zero, by sign, in every dtype."""

import dataclasses
import math

import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.propagation.bilinear import Bilinear
from jaxrel.propagation.rules import (
    Epsilon,
    clipped,
    scaled,
    stabilise,
    where_zero,
)
from tests.propagation.by_hand import (
    BIASED,
    DTYPES,
    OPS,
    RULES,
    Example,
    ready,
)

STABILISERS = {
    "0": 0.0,
    "1e-12": 1e-12,
    "1e-6": 1e-6,
    "0.25": 0.25,
    "clipped 0": clipped(0.0),
    "clipped": clipped(1e-6),
    "scaled": scaled(1e-6),
    "where zero": where_zero(1e-12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STABILISERS)
def test_stabilise_is_sign_aware_and_finite(x64, name, dtype):
    tiny = float(jnp.finfo(dtype).tiny)
    values = [0.0, -0.0, 1.0, -1.0, 32 * tiny, -32 * tiny, 1e-3, -1e-3]
    z = jnp.array(values, dtype)
    found = stabilise(z, STABILISERS[name])
    assert found.dtype == z.dtype
    assert found.shape == z.shape
    np.testing.assert_array_equal(found > 0, [value >= 0 for value in values])
    assert jnp.isfinite(1 / found).all()
    assert (abs(found) >= abs(z)).all()


def test_stabilise_by_a_function_of_the_user(x64):
    z = jnp.array([0.0, -2.0])
    np.testing.assert_array_equal(stabilise(z, lambda z: z + 3), [3.0, 1.0])


def test_scaled_takes_each_example_by_itself(x64):
    z = jnp.array([[3.0, -4.0], [0.0, 0.0], [30.0, -40.0]])
    found = stabilise(z, scaled(0.1))
    size = 0.1 * math.sqrt(12.5)
    np.testing.assert_allclose(found[0], [3 + size, -4 - size], rtol=1e-15)
    np.testing.assert_allclose(found[2], 10 * found[0], rtol=1e-15)
    assert jnp.isfinite(1 / found[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["fused", "ignored", "separate"])
@pytest.mark.parametrize("name", RULES)
def test_nothing_to_share_is_finite_without_a_stabiliser(x64, name, bias, dtype):
    # An example of zeros; outputs that no positive, no negative, and no weight at all reaches.
    x = jnp.array([[0, 0, 0], [1, 2, 0], [-1, -2, -3]], dtype)
    w = jnp.array([[-1, 1, 0, 1], [-2, 2, 0, -1], [-3, 1, 0, 1]], dtype)
    # Large against the smallest number there is: its quotient by that is an infinity.
    b = jnp.array([1e3, -1e3, 1e3, 0], dtype)
    z = x @ w + b
    rule = ready(name, Example("dense", x, w, b, z, z))
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    changes = {} if name == "gradient" else {key: 0.0}
    changes |= {"bias": bias} if name in BIASED else {}
    rule = dataclasses.replace(rule, **changes)
    for nonneg in (False, True):
        op = Bilinear(OPS["dense"][0], x, nonneg=nonneg)
        found = rule.bwd(op, abs(x) if nonneg else x, w, b, z, jnp.ones_like(z))
        assert found.dtype == x.dtype
        assert jnp.isfinite(found).all()
        if not rule.direct and name != "gradient":
            assert (x[0] * found[0] == 0).all()


@pytest.mark.parametrize("make", [clipped, scaled, where_zero])
def test_equal_stabilisers_make_equal_rules(make):
    """A rule is a static argument of compiled programs: another function would compile again."""
    assert Epsilon(make(0.5)) == Epsilon(make(0.5))
    assert Epsilon(make(0.5)) != Epsilon(make(0.25))
