"""The importance of token values, and the weights made of it."""

import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from tests.attention.naive import random_maps


def test_weights_sum_to_two_and_stay_at_one_where_nothing_is_important():
    alpha, beta = attention.weights(jnp.array([3.0, 0, 0, 2]), jnp.array([1.0, 5, 0, 0]))
    np.testing.assert_array_equal(alpha, [1.5, 0, 1, 2])
    np.testing.assert_array_equal(beta, [0.5, 2, 1, 0])


def test_weights_do_not_hide_a_nan():
    alpha, beta = attention.weights(jnp.array([jnp.nan]), jnp.array([1.0]))
    assert np.isnan(alpha).all()
    assert np.isnan(beta).all()


@pytest.mark.parametrize(
    ("name", "expected"), [("grad_value", 8.0), ("norm", 5.0), ("abs_grad_value", 1.0)]
)
def test_measures_by_hand(name, expected):
    value, grad = jnp.array([[3.0, -4.0]]), jnp.array([[-3.0, -2.0]])
    np.testing.assert_array_equal(attention.measure(name)(value, grad), [expected])


def test_unknown_measure():
    with pytest.raises(ValueError, match=r"'size' is unknown; expected one of grad_value, norm"):
        attention.measure("size")


def test_measure_of_another_shape():
    attn, grad, values = random_maps(20, dtype=np.float32)
    expected = r"expected one number per token, \(2, 5\), .* got \(2, 5, 4\)"
    with pytest.raises(ValueError, match=expected):
        attention.weighted(attn, grad, **values, importance=lambda value, grad: value)
