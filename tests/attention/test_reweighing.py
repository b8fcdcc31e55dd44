"""Attention without the columns of sinks, and layers by weights, against plain loops."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import METHODS

LAYERS, HEADS, BATCH, TOKENS, WIDTH = 3, 2, 2, 5, 6
_rng = np.random.default_rng(0)
WEIGHTS = _rng.normal(size=(LAYERS, 3, WIDTH, WIDTH))
X = _rng.normal(size=(BATCH, TOKENS, WIDTH))
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))
FROM_MAPS = tuple(name for name in METHODS if "lrp" not in name)


def decode(x, added=None):
    """A causal decoder read at its last token, and its maps."""
    maps = []
    for n, (q, k, v) in enumerate(jnp.asarray(WEIGHTS, x.dtype)):
        heads = [(x @ w).reshape(BATCH, TOKENS, HEADS, -1).swapaxes(1, 2) for w in (q, k, v)]
        scores = jnp.where(CAUSAL, heads[0] @ heads[1].mT, -jnp.inf)
        attn = jax.nn.softmax(scores, -1)
        attn = attn if added is None else attn + added[n]
        maps.append(attn)
        x = x + (attn @ heads[2]).swapaxes(1, 2).reshape(x.shape)
    return jnp.sin(x[:, -1]).sum(-1), jnp.stack(maps)


def score(x):
    return decode(x)[0]


def equal_by_loop(x, closed, weights):
    """Equal accumulation of each example in float64, closed[b] being the sinks."""
    zeros = np.zeros((LAYERS, BATCH, HEADS, TOKENS, TOKENS))
    grad = np.asarray(jax.grad(lambda added: decode(x, added)[0].sum())(jnp.asarray(zeros)))
    attn = np.asarray(decode(x)[1])
    found = np.zeros((BATCH, TOKENS))
    for b in range(BATCH):
        r = np.eye(TOKENS)
        for n in range(LAYERS):
            abar = np.zeros((TOKENS, TOKENS))
            for i in range(TOKENS):
                for j in range(TOKENS):
                    if j in closed[b] and i != j:
                        continue
                    for h in range(HEADS):
                        abar[i, j] += max(attn[n, b, h, i, j] * grad[n, b, h, i, j], 0) / HEADS
            r = r + weights[n] * abar @ r
        found[b] = r[-1]
    return found


@pytest.mark.parametrize("form", ["streaming", "stacked"])
def test_sinks_are_left_out(x64, form):
    x = jnp.asarray(X)
    options = {"method": "equal", "target_token": -1, "form": form}
    found = attention.relevance(score, **options, sinks=[0, 2])(x)
    want = equal_by_loop(x, [{0, 2}] * BATCH, np.ones(LAYERS))
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-14)  # float64
    assert not found[:, [0, 2]].any()
    mask = np.zeros((BATCH, TOKENS), bool)
    mask[0, 0] = mask[1, :2] = True
    explain = jax.jit(lambda x, mask: attention.relevance(score, **options, sinks=mask)(x))
    want = equal_by_loop(x, [{0}, {0, 1}], np.ones(LAYERS))
    np.testing.assert_allclose(explain(x, mask), want, rtol=1e-10, atol=1e-14)


def test_a_sink_keeps_what_it_has_of_itself(x64):
    whole = attention.relevance(score, method="equal", target_token=None)(jnp.asarray(X))
    found = attention.relevance(score, method="equal", target_token=None, sinks=[0])(jnp.asarray(X))
    np.testing.assert_allclose(found[:, 0], whole[:, 0], rtol=1e-12)
    assert not found[:, 1:, 0].any()


@pytest.mark.parametrize("form", ["streaming", "stacked"])
def test_weighted_accumulation_with_sinks(form):
    other = {"streaming": "stacked", "stacked": "streaming"}[form]
    options = {"target_token": -1, "sinks": [0]}
    x = jnp.asarray(X, jnp.float32)
    found = attention.relevance(score, form=form, **options)(x)
    want = attention.relevance(score, form=other, **options)(x)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)  # float32, in another order


@pytest.mark.parametrize("method", METHODS)
def test_no_method_moves_relevance_to_a_sink(method):
    x = jnp.asarray(X, jnp.float32)
    found = attention.relevance(score, method=method, target_token=-1, sinks=[0])(x)
    assert not found[:, 0].any()
    assert found.any()
    none = attention.relevance(score, method=method, target_token=-1, sinks=[])(x)
    usual = attention.relevance(score, method=method, target_token=-1)(x)
    np.testing.assert_array_equal(none, usual)


def test_rollout_shares_among_the_rest(x64):
    x = jnp.asarray(X)
    attn = np.asarray(decode(x)[1])
    found = attention.relevance(score, method="rollout", target_token=None, sinks=[0])(x)
    for b in range(BATCH):
        flow = np.eye(TOKENS)
        for n in range(LAYERS):
            mean = attn[n, b].mean(0)
            mean[1:, 0] = 0
            mixed = mean + np.eye(TOKENS)
            flow = mixed / mixed.sum(-1, keepdims=True) @ flow
        np.testing.assert_allclose(found[b], flow, rtol=1e-12, atol=1e-15)


def test_layers_by_weights(x64):
    x, weights = jnp.asarray(X), np.array([0.5, 0.0, 2.0])
    explain = lambda x, w: attention.relevance(
        score, method="equal", target_token=-1, layer_weights=w
    )(x)
    want = equal_by_loop(x, [set()] * BATCH, weights)
    np.testing.assert_allclose(jax.jit(explain)(x, weights), want, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(explain(x, weights), want, rtol=1e-10, atol=1e-14)
    mapped = jax.vmap(explain, (None, 0))(x, jnp.stack([weights, np.ones(LAYERS)]))
    np.testing.assert_allclose(mapped[0], want, rtol=1e-10, atol=1e-14)
    usual = attention.relevance(score, method="equal", target_token=-1)(x)
    np.testing.assert_allclose(mapped[1], usual, rtol=1e-10, atol=1e-14)


def test_weights_of_zero_and_one_are_a_choice_of_layers():
    x = jnp.asarray(X, jnp.float32)
    methods = ("equal", "weighted", "equal_lrp")
    options = {"method": methods, "target_token": -1}
    weights = attention.relevance(score, **options, layer_weights=np.array([1.0, 0.0, 1.0]))(x)
    chosen = attention.relevance(score, **options, layers=[0, 2])(x)
    for name in ("equal", "equal_lrp"):
        np.testing.assert_allclose(weights[name], chosen[name], rtol=2e-5, atol=1e-6)
    # Weighted accumulation of a layer whose map is 0 still weighs the branch around it.
    assert not np.allclose(weights["weighted"], chosen["weighted"])


def test_by_stack():
    x = jnp.asarray(X, jnp.float32)
    options = {"method": "equal", "target_token": -1, "attention": "attention"}
    for given in ({"sinks": [0]}, {"layer_weights": np.array([1.0, 2.0, 3.0])}):
        plain = attention.relevance(score, **options, **given)(x)
        mapping = {name: {"attention": value} for name, value in given.items()}
        np.testing.assert_array_equal(attention.relevance(score, **options, **mapping)(x), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": [5]}, r"tokens that are sinks: 5 does not exist; there are 5 tokens"),
        ({"sinks": np.ones(4, bool)}, r"sinks: a bool array is \[5\] or \[2, 5\] for the tokens"),
        ({"layer_weights": np.ones(2)}, r"weight for each of the 3 layers of 'attention', got sha"),
        ({"layer_weights": np.array([1, -1, 1.0])}, r"weights are 0 or more, got -1.0; a negative"),
        ({"layer_weights": np.array([1, np.nan, 1])}, r"weights are 0 or more, got nan"),
        ({"layer_weights": np.ones(3), "form": "streaming"}, r"form='streaming' computes one targ"),
    ],
)
def test_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        attention.relevance(score, method="equal", target_token=-1, **options)(
            jnp.asarray(X, jnp.float32)
        )
