"""How slopes are fitted, and what is counted in a compiled program."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.benchmarks import scaling


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_the_slope_of_a_power_law_is_its_power(power):
    sizes = [1, 2, 8, 32]
    found = scaling.slope(sizes, [3.5 * size**power for size in sizes])
    # A few roundings of float64 logarithms.
    np.testing.assert_allclose(found, power, atol=1e-14)


def test_the_slope_is_that_of_least_squares():
    sizes, figures = np.array([1, 2, 4, 16]), np.array([1.0, 3.0, 3.5, 30.0])
    x, y = np.log(sizes), np.log(figures)
    expected = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    np.testing.assert_allclose(scaling.slope(sizes, figures), expected, rtol=1e-13)


def kept_of_powers():
    """Each method grows along every axis by powers of its own: time by 1, memory by 1 to 4."""
    return {
        size.key: {
            method: {
                "seconds": float(np.prod(list(vars(size).values()))),
                "temp": 2.0**20 * size.tokens**power,
                "collectives": size.devices - 1,
            }
            for power, method in enumerate(scaling.METHODS, start=1)
        }
        for axis in scaling.AXES
        for size in axis.sizes
    }


def test_tables_have_the_ends_and_the_slopes():
    kept = kept_of_powers()
    tokens = scaling.table(scaling.AXES[1], kept)
    assert [row["slope of MiB"] for row in tokens.rows] == ["1.00", "2.00", "3.00", "4.00"]
    assert [row["MiB: less grad's"] for row in tokens.rows] == ["0.00", "1.00", "2.00", "3.00"]
    assert (tokens.rows[0]["MiB at 128"], tokens.rows[0]["MiB at 2048"]) == (128, 2048)
    devices = scaling.table(scaling.AXES[3], kept)
    assert {row["slope of s"] for row in devices.rows} == {"1.00"}
    assert {row["collectives"] for row in devices.rows} == {"7"}
    assert "to 3.00 (AttnLRP, over tokens) of memory." in scaling.summary(kept)


@pytest.mark.devices(2)
def test_collectives_are_counted():
    mesh = jax.make_mesh((2,), ("examples",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("examples")))
    of = lambda fun: scaling.collectives(jax.jit(fun).lower(x).compile().as_text())
    assert of(lambda x: jnp.tanh(x).sum(1)) == 0
    assert of(lambda x: jnp.tanh(x).sum(0)) == 1
