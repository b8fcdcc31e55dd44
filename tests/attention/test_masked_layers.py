"""A choice of layers and heads as bool arrays, traced, is the choice by index."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.methods import METHODS

LAYERS, HEADS, TOKENS, WIDTH = 3, 2, 4, 6


@pytest.fixture(scope="module")
def model():
    """Three layers of attention on a residual stream, with two heads each."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(LAYERS, 3, WIDTH, WIDTH)), jnp.float32)

    def fun(x):
        for q, k, v in weights:
            heads = [(x @ w).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for w in (q, k, v)]
            attn = jax.nn.softmax(heads[0] @ heads[1].mT, -1)
            x = x + (attn @ heads[2]).swapaxes(1, 2).reshape(x.shape)
        return jnp.sin(x[:, 0]).sum(-1)

    return fun, jnp.asarray(rng.normal(size=(2, TOKENS, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def masked(model):
    """One program for all choices."""
    return jax.jit(
        lambda x, layers, heads: attention.relevance(
            model[0], method=METHODS, layers=layers, heads=heads
        )(x)
    )


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("heads", [None, [1]])
def test_masks_are_the_choice_by_index(model, masked, layers, heads):
    fun, x = model
    by_index = attention.relevance(fun, method=METHODS, layers=layers, heads=heads)(x)
    mask = np.isin(np.arange(LAYERS), layers)
    head_mask = None if heads is None else np.isin(np.arange(HEADS), heads)
    found = masked(x, jnp.asarray(mask), None if heads is None else jnp.asarray(head_mask))
    for name in METHODS:
        wanted = np.asarray(by_index[name])
        # float32: the scale of the heads rounds once more, and the program is fused otherwise.
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())


def test_an_array_of_indices_is_no_mask(model):
    fun, x = model
    by_index = attention.relevance(fun, method="equal", layers=[0, 1, 2])(x)
    for array in (np.array([0, 1, 2]), jnp.array([0, 1, 2])):
        found = attention.relevance(fun, method="equal", layers=array)(x)
        np.testing.assert_array_equal(found, by_index)
        assert attention.layers_followed(fun, method="equal", layers=array)(x).followed == 3
    mask = np.array([True, False, True])
    assert attention.layers_followed(fun, method="equal", layers=mask)(x).followed == 2


def test_indices_that_are_traced(model):
    fun, x = model
    explain = jax.jit(lambda x, i: attention.relevance(fun, method="raw", layers=i)(x))
    with pytest.raises(TypeError, match="layers: indices cannot be traced; choose inside jit with"):
        explain(x, jnp.array([0, 1, 2]))


def test_a_mask_that_chooses_none(model):
    fun, x = model
    with pytest.raises(ValueError, match="the bool array selects none of the 3 layers"):
        attention.relevance(fun, method="raw", layers=np.zeros(3, bool))(x)


def test_a_mask_of_another_length(model):
    fun, x = model
    with pytest.raises(ValueError, match=r"an entry for each of the 3 layers, got shape \(2,\)"):
        attention.relevance(fun, method="raw", layers=np.ones(2, bool))(x)
