"""LRP with attention by blocks of queries: the numbers of whole maps, and no whole map."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, rules
from tests.attention.test_by_blocks import (
    PROGRAMS,
    heads_of,
    joined,
    mask_outside,
    rematted,
    tokens_of,
    weights,
    whole_maps,
)

# float64: the forms differ only in the order of sums.
SAME = {"rtol": 1e-11, "atol": 1e-12}
COMPOSITES = {"attn_lrp": composites.attn_lrp(), "cp_lrp": composites.cp_lrp()}
GRADIENT = jaxrel.Composite([(jaxrel.everything(), rules.Gradient())])


def decoder(x):
    """Causal layers with a soft cap, a scan over them, and an MLP."""

    def layer(x, w):
        q, k, v = (heads_of(x, part) for part in w[:3])
        scores = 5 * jnp.tanh(q @ k.mT / 5)
        place = jnp.arange(x.shape[1])
        attn = jax.nn.softmax(jnp.where(place[:, None] >= place, scores, -1e30))
        x = x + joined(attn @ v) @ w[3]
        return x + jax.nn.silu(x @ w[0]) @ w[1], None

    return lax.scan(jax.checkpoint(layer), x, weights())[0][:, -1]


def of_scores(x):
    return mask_outside(x)[:, None] * jnp.ones(3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("fun", [decoder, of_scores], ids=["decoder", "mask outside"])
def test_relevance_is_that_of_whole_maps(name, fun):
    rules = [(jaxrel.op("activation"), jaxrel.rules.Gradient()), *COMPOSITES[name].entries]
    x = jnp.asarray(tokens_of())
    whole = jax.jit(jaxrel.lrp(fun, rules))(x, target=1)
    assert whole.any()
    for block in (1, 3, 50):
        found = jax.jit(jaxrel.lrp(fun, rules, block=block))(x, target=1)
        np.testing.assert_allclose(found, whole, **SAME)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fun", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_the_derivative_as_the_only_rule_gives_the_gradient(fun):
    x = jnp.asarray(tokens_of())
    run = jax.jit(lambda x: jaxrel.lrp_vjp(fun, GRADIENT, gradient=True, block=2)(x)[1](None))
    np.testing.assert_allclose(run(x), jax.grad(lambda x: fun(x).sum())(x), **SAME)


def test_no_array_of_tokens_by_tokens_is_made():
    x = jnp.asarray(tokens_of(tokens=37), jnp.float32)  # no other size is as large
    entries = [(jaxrel.op("activation"), jaxrel.rules.Gradient())]
    entries += COMPOSITES["attn_lrp"].entries
    assert whole_maps(jaxrel.lrp(decoder, entries), x)
    assert not whole_maps(jaxrel.lrp(decoder, entries, block=8), x)


def test_errors_say_where_and_what_to_do():
    def together(x):
        scores = x @ x.mT
        attn = jax.nn.softmax(scores) / (1 + scores.sum(-2, keepdims=True) ** 2)
        return (attn @ x).sum((1, 2))

    def tagged(x):
        attn = jaxrel.tag(jax.nn.softmax(x @ x.mT), "maps")
        return (attn @ x).sum((1, 2))

    x = jnp.asarray(tokens_of(), jnp.float32)
    with pytest.raises(
        NotImplementedError,
        match=r"lrp: block=2, and the attention at .*test_by_blocks.*cannot be computed by blocks "
        r"of queries: \w+ at .*together\) takes its queries together.*Leave out block",
    ):
        jaxrel.lrp(together, GRADIENT, block=2)(x)
    with pytest.raises(
        NotImplementedError, match=r"relevance is asked for at 'maps', inside of .*Leave out block"
    ):
        jaxrel.lrp(tagged, COMPOSITES["attn_lrp"], at="maps", block=2)(x)
    scaled = [
        (jaxrel.op("softmax"), rules.Stop()),
        (jaxrel.op("activation"), rules.Gradient()),
        (jaxrel.everything(), rules.Epsilon(rules.scaled(0.1))),
    ]
    with pytest.raises(
        NotImplementedError, match=r"Epsilon\(epsilon=\.\.\.\) at .* is not known to share each"
    ):
        jaxrel.lrp(mask_outside, scaled, block=2)(x)
    with pytest.raises(ValueError, match="lrp: block must be 1 or more queries, got 0"):
        jaxrel.lrp(functools.partial(rematted), GRADIENT, block=0)
