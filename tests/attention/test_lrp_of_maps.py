"""The methods that read the relevance of the maps by LRP."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention


def tagged_model(p, x):
    """Two layers of attention over one stream; the maps are tagged."""

    def layer(x, p):
        q, k, v = (x @ p[name] for name in "qkv")
        maps = jaxrel.tag(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2)[:, None], "maps")
        return x + jnp.tanh((maps @ v[:, None])[:, 0] @ p["o"]), None

    return jax.lax.scan(layer, x, p)[0][:, 0].sum(-1)


def tagged_params():
    keys = jax.random.split(jax.random.key(3), 4)
    return {n: jax.random.normal(k, (2, 6, 6)) / 2 for n, k in zip("qkvo", keys, strict=True)}


@pytest.mark.parametrize("rules", [None, jaxrel.composites.epsilon_plus()], ids=["attn", "plus"])
def test_methods_that_read_the_maps_relevance(rules):
    p, x = tagged_params(), jax.random.normal(jax.random.key(4), (3, 5, 6))
    composite = rules or jaxrel.composites.attn_lrp()
    _, places = jaxrel.lrp(tagged_model, composite, argnums=1, at="maps")(p, x)
    _, _, grads = jaxrel.capture_with_grad(tagged_model, "maps")(p, x)
    explain = attention.relevance(
        tagged_model, method=("equal_lrp", "partial_lrp", "equal"), rules=rules, argnums=1
    )
    found = jax.jit(explain)(p, x)
    wanted = {
        "equal_lrp": attention.equal(places["maps"], grads["maps"])[:, 0],
        "partial_lrp": places["maps"][-1].mean(1)[:, 0],
    }
    for method, want in wanted.items():
        # float32: another order of the same sums.
        np.testing.assert_allclose(found[method], want, rtol=2e-5, atol=1e-6)
    assert not np.allclose(found["equal_lrp"], found["equal"], rtol=1e-2)


def test_maps_relevance_of_integer_tokens():
    p = tagged_params()
    table = jax.random.normal(jax.random.key(5), (9, 6))
    tokens = jnp.array([[1, 2, 3, 4, 0], [5, 6, 7, 8, 8]])

    def fun(p, tokens):
        return tagged_model(p["layers"], p["table"][tokens])

    embedded = attention.relevance(tagged_model, method="equal_lrp", argnums=1)
    found = attention.relevance(fun, method="equal_lrp", argnums=1)(
        {"layers": p, "table": table}, tokens
    )
    np.testing.assert_allclose(found, embedded(p, table[tokens]), rtol=2e-5, atol=1e-6)


def test_rules_that_differ_by_layer_are_refused_for_maps():
    p, x = tagged_params(), jnp.ones((1, 3, 6))
    rules = [(jaxrel.layer(0), jaxrel.rules.ZPlus()), (jaxrel.everything(), jaxrel.rules.Epsilon())]
    explain = attention.relevance(tagged_model, method="equal_lrp", rules=rules, argnums=1)
    with pytest.raises(NotImplementedError, match="cut the scan over layers"):
        explain(p, x)
