"""LeGrad and Grad-ECLIP against their definitions in plain loops, and what they ask for."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention
from tests.attention.naive import random_inputs
from tests.attention.small_models import MODEL, X

PROJECTIONS = ("query", "key", "value", "mixed_grad")


@pytest.mark.usefixtures("x64")
def test_legrad_is_its_definition():
    _, grad, _ = random_inputs(0, heads=3)
    found = attention.legrad(grad)
    layers, batch, heads, tokens, _ = grad.shape
    for b in range(batch):
        for j in range(tokens):
            total = 0.0
            for n in range(layers):
                for h in range(heads):
                    for i in range(tokens):
                        total += max(float(grad[n, b, h, i, j]), 0)
            want = total / (layers * heads * tokens)
            # float64: another order of the same sum.
            np.testing.assert_allclose(found[b, :, j], np.full(tokens, want), rtol=1e-13)


def grad_eclip_by_loop(attn, values, b):
    """One example in float64, of the last layer."""
    q, k, v, w = (np.asarray(values[name][-1, b], np.float64) for name in PROJECTIONS)
    heads, tokens, _ = attn[-1, b].shape
    found = np.zeros((tokens, tokens))
    for i in range(tokens):
        seen = [j for j in range(tokens) if j != i and any(attn[-1, b, :, i, j] > 0)]
        cosines = {}
        for j in seen:
            lengths = math.hypot(*q[i].ravel()) * math.hypot(*k[j].ravel())
            cosines[j] = float((q[i] * k[j]).sum()) / lengths
        for j in seen:
            strength = sum(float(w[i, h] @ v[j, h]) for h in range(heads))
            spread = max(cosines.values()) - min(cosines.values())
            share = (cosines[j] - min(cosines.values())) / spread if spread else 1
            found[i, j] = max(strength, 0) * share
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("causal", [False, True])
def test_grad_eclip_is_its_definition(causal):
    attn, _, values = random_inputs(1, heads=3)
    if causal:
        attn = attn * np.tril(np.ones(attn.shape[-2:]))
    found = attention.grad_eclip(attn, **{name: values[name] for name in PROJECTIONS})
    assert found.any()
    for b in range(2):
        # float64: another order of the same sums.
        np.testing.assert_allclose(found[b], grad_eclip_by_loop(attn, values, b), atol=1e-13)


def test_grad_eclip_of_projections_that_do_not_fit():
    attn, _, values = random_inputs(2)
    given = {name: values[name] for name in PROJECTIONS} | {"key": values["key"][:, :, :-1]}
    with pytest.raises(ValueError, match=r"of one shape, got attn \(3, 2, 2, 5, 5\), query \(3, 2"):
        attention.grad_eclip(attn, **given)


# ---- of a function


def weights(n):
    return jnp.asarray(np.random.default_rng(n).normal(size=(4, 8, 8)) / 8**0.5)


def layer(x, n, tags=True):
    tag = jaxrel.tag if tags else lambda x, name: x
    q, k, v = ((x @ w).reshape(*x.shape[:2], 2, -1) for w in weights(n)[:3])
    q, k, v = (tag(y, f"a/{end}") for y, end in ((q, "query"), (k, "key"), (v, "value")))
    attn = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
    mixed = tag(jnp.einsum("bhqk,bkhd->bqhd", tag(attn, "a"), v), "a/mixed")
    return x + mixed.reshape(x.shape) @ weights(n)[3], (q, k, v, attn, mixed)


def read(token):
    return jnp.tanh(token).sum(-1)


def score(x, tags=True):
    for n in range(3):
        x, _ = layer(x, n, tags)
    return read(x[:, 0])


def layer_scores(x):
    total = jnp.zeros(len(x))
    for n in range(3):
        x, _ = layer(jax.lax.stop_gradient(x), n)
        total = total + read(x.mean(axis=1))
    return total


def test_grad_eclip_of_a_function(x64):
    x = jnp.asarray(X, jnp.float64)
    found = jax.jit(attention.relevance(score, method="grad_eclip", attention="a"))(x)
    start = x
    for n in range(2):
        start, _ = layer(start, n)
    _, (q, k, v, attn, _) = layer(start, 2)

    def head(mixed):
        return read((start + mixed.reshape(x.shape) @ weights(2)[3])[:, 0]).sum()

    w = jax.grad(head)(jnp.einsum("bhqk,bkhd->bqhd", attn, v))
    values = {name: y[None] for name, y in zip(PROJECTIONS, (q, k, v, w), strict=True)}
    for b in range(len(x)):
        want = grad_eclip_by_loop(np.asarray(attn)[None], values, b)[0]
        np.testing.assert_allclose(found[b], want, rtol=1e-10, atol=1e-14)  # float64


def test_legrad_of_a_function(x64):
    """Each layer's map has the gradient of its own layer's score, by that layer alone."""
    x = jnp.asarray(X, jnp.float64)
    options = {"method": "legrad", "attention": "a", "layer_scores": layer_scores}
    found = jax.jit(attention.relevance(score, **options))(x)
    grads = []
    for n in range(3):

        def own(attn, x=x, n=n):
            v = (x @ weights(n)[2]).reshape(*x.shape[:2], 2, -1)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(x.shape)
            return read((x + mixed @ weights(n)[3]).mean(axis=1)).sum()

        x, (*_, attn, _) = layer(x, n)
        grads.append(jax.grad(own)(attn))
    want = np.maximum(np.stack(grads), 0).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found, want, rtol=1e-10)  # float64, fused otherwise
    several = attention.relevance(score, **options | {"method": ("legrad", "equal")})(x := X)
    alone = attention.relevance(score, method="equal", attention="a")(x)
    np.testing.assert_allclose(several["equal"], alone, rtol=2e-5)  # streamed alone


@pytest.mark.parametrize("method", attention.ENCODER_METHODS)
def test_masks_are_the_choice_by_index(method):
    options = {"method": method, "attention": "a", "layer_scores": layer_scores}
    for layers, heads in (([0, 2], None), (None, [1]), ([1], [0])):
        by_index = attention.relevance(score, layers=layers, heads=heads, **options)(X)
        masks = {
            what: None if chosen is None else jnp.isin(jnp.arange(count), jnp.asarray(chosen))
            for what, chosen, count in (("layers", layers, 3), ("heads", heads, 2))
        }
        found = jax.jit(lambda x, masks: attention.relevance(score, **options, **masks)(x))(
            X, masks
        )
        # float32: the scale of the heads rounds once more, and the program is fused otherwise.
        np.testing.assert_allclose(found, by_index, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("method", attention.ENCODER_METHODS)
def test_batch_is_one_by_one_and_vmap(method):
    options = {"method": method, "attention": "a", "layer_scores": layer_scores}
    explain = jax.jit(attention.relevance(score, **options))
    together = explain(X)
    mapped = jax.vmap(lambda x: attention.relevance(score, **options)(x[None])[0])(jnp.asarray(X))
    for i, x in enumerate(X):
        # float32: a product of matrices may sum in another order in a larger batch.
        np.testing.assert_allclose(together[i], explain(x[None])[0], rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(mapped[i], together[i], rtol=2e-5, atol=1e-7)


def test_what_they_ask_for():
    with pytest.raises(ValueError, match=r"method 'legrad' scores the tokens of every layer by th"):
        attention.relevance(MODEL, method="legrad")
    untagged = attention.relevance(lambda x: score(x, tags=False), method="grad_eclip")
    with pytest.raises(ValueError, match=r"Nothing is tagged attention/query, attention/key, atte"):
        untagged(X)


def test_layer_scores_of_another_model():
    def shorter(x):
        return read(layer(x, 0)[0].mean(axis=1))

    explain = attention.relevance(score, method="legrad", attention="a", layer_scores=shorter)
    with pytest.raises(
        ValueError, match=r"layer_scores has 'a': self-attention, layers 1, .*and t"
    ):
        explain(X)
