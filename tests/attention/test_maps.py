"""Attention maps as data: head mean, selections, target tokens, and errors."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import maps
from tests.attention.naive import random_maps


def test_eq_5_head_mean():
    attn = jnp.array([[[0.5, 0.25, 0.25], [0, 1, 0]], [[1, 0, 0], [0.5, 0, 0.5]]])
    grad = jnp.array([[[2.0, -4, 4], [8, 1, 0]], [[-1, 5, 2], [2, 0, 4]]])
    expected = [[0.5, 0, 0.5], [0.5, 0.5, 1]]
    np.testing.assert_array_equal(attention.head_mean(attn, grad), expected)


# ---- selections


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (slice(-1, None), (2,)),
        (slice(1, 3), (1, 2)),
        (slice(None, None, 2), (0, 2)),
        (slice(None, None, -1), (0, 1, 2)),
        ([-1, 0], (0, 2)),
        ((1, 1), (1,)),
        (range(3), (0, 1, 2)),
        (np.array([2]), (2,)),
        (None, (0, 1, 2)),
    ],
)
def test_selection(selection, chosen):
    assert maps.indices(selection, 3, "layers") == chosen


@pytest.mark.parametrize("target_token", [2, -3, np.int64(2), np.array([2, 2]), jnp.array([2, -3])])
def test_row(target_token):
    relevance = np.arange(50, dtype=np.float32).reshape(2, 5, 5)
    np.testing.assert_array_equal(attention.row(relevance, target_token), relevance[:, 2])
    np.testing.assert_array_equal(jax.jit(attention.row)(relevance, target_token), relevance[:, 2])


def test_row_of_a_missing_token_under_jit_is_nan():
    assert np.isnan(jax.jit(attention.row)(jnp.ones((1, 3, 3)), 3)).all()


# ---- errors


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ([12], "layers: 12 does not exist; there are 3 layers, 0 to 2 (or -3 to -1 from the end)"),
        ([0, -4], "layers: -4 does not exist; there are 3 layers"),
        (slice(0, 5), "layers: 5 does not exist; there are 3 layers"),
        (slice(-5, None), "layers: -5 does not exist; there are 3 layers"),
        (slice(2, 2), "selects none; there are 3 layers"),
        ([], "layers: [] selects none; there are 3 layers"),
    ],
)
def test_missing_layers(selection, text):
    with pytest.raises(ValueError, match="layers") as error:
        maps.indices(selection, 3, "layers")
    assert text in str(error.value)


@pytest.mark.parametrize("selection", [-1, 1.5, "12", [0.5]])
def test_selection_of_another_type(selection):
    with pytest.raises(TypeError, match=r"expected None, a slice .* layers=slice\(-2, None\)"):
        maps.indices(selection, 3, "layers")


@pytest.mark.parametrize(
    ("target_token", "error", "text"),
    [
        (5, ValueError, "target_token: 5 does not exist; there are 5 tokens, 0 to 4"),
        (np.array([0, -6]), ValueError, "target_token: -6 does not exist; there are 5 tokens"),
        (np.array([0, 1, 2]), ValueError, "one for each of 2 examples, got shape (3,)"),
        (0.5, TypeError, "target_token: expected integers, got float"),
    ],
)
def test_target_token_that_does_not_fit(target_token, error, text):
    with pytest.raises(error, match="target_token") as caught:
        maps.token_index(target_token, batch=2, tokens=5)
    assert text in str(caught.value)


def test_row_of_a_missing_token():
    with pytest.raises(ValueError, match="target_token: 3 does not exist; there are 3 tokens"):
        attention.row(np.ones((1, 3, 3), np.float32), 3)


def test_maps_of_two_shapes():
    attn, grad, _ = random_maps(17, dtype=np.float32)
    with pytest.raises(ValueError, match=r"one shape, got attn \(3, .*\), grad \(2, .*\)"):
        attention.equal(attn, grad[:2])


def test_maps_between_two_streams():
    attn, grad, _ = random_maps(18, dtype=np.float32)
    with pytest.raises(ValueError, match=r"as many queries as keys, got .*see bimodal"):
        attention.equal(attn[..., :3], grad[..., :3])


@pytest.mark.parametrize("name", ["before", "after", "value_grad"])
def test_values_of_another_shape(name):
    attn, grad, values = random_maps(19, dtype=np.float32)
    values[name] = values[name][:, :, :-1]
    expected = rf"one shape \(3, 2, 5, width\), got .*{name} \(3, 2, 4, 4\)"
    with pytest.raises(ValueError, match=expected):
        attention.weighted(attn, grad, **values)


@pytest.mark.parametrize("broken", ["attn", "grad"])
def test_nan_is_reported_with_its_layer(broken):
    given_maps = dict(zip(("attn", "grad"), random_maps(21, dtype=np.float32)[:2], strict=True))
    given_maps[broken][1, 0, 0, 2, 2] = np.nan
    expected = rf"{broken}: NaN or infinity in layer 1 of 3"
    with pytest.raises(ValueError, match=rf"equal: {expected}"):
        attention.equal(**given_maps)
    attention.equal(**given_maps, layers=[-1])
    # Under jit it cannot be reported, and must not be hidden.
    assert np.isnan(jax.jit(attention.equal)(**given_maps)).any()


def test_nan_in_the_values_is_reported_with_its_layer():
    attn, grad, values = random_maps(22, dtype=np.float32)
    values["after"][2, 1, 0, 0] = np.inf
    with pytest.raises(ValueError, match="weighted: after: NaN or infinity in layer 2 of 3"):
        attention.weighted(attn, grad, **values)


def test_constant_maps_are_checked_while_another_function_is_traced():
    attn, grad, _ = random_maps(23, dtype=np.float32)
    scaled = jax.jit(lambda scale: scale * attention.equal(attn, grad))(2.0)
    np.testing.assert_allclose(scaled, 2 * attention.equal(attn, grad), rtol=1e-6)  # fusion
    attn[0] = np.nan
    with pytest.raises(ValueError, match="attn: NaN or infinity in layer 0 of 3"):
        jax.jit(lambda scale: scale * attention.equal(attn, grad))(2.0)
