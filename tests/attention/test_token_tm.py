"""TokenTM against its definition in plain loops, and what is left out of it."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.token_changes import token_change
from tests.attention.naive import random_maps
from tests.attention.small_models import MODEL, X


def change(before, after):
    """The ratio of lengths times the softmax of the cosines, token by token."""
    lengths = [(math.hypot(*x), math.hypot(*y)) for x, y in zip(before, after, strict=True)]
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / (p * q)
        for x, y, (p, q) in zip(before, after, lengths, strict=True)
    ]
    total = sum(math.exp(c) for c in cosines)
    return [q / p * math.exp(c) / total for c, (p, q) in zip(cosines, lengths, strict=True)]


def by_loop(attn, grad, values, b):
    """One example in float64: C = (I + W') (I + (A W) * G) C."""
    before, after = (np.asarray(values[name], np.float64) for name in ("before", "after"))
    layers, _, heads, tokens, _ = attn.shape
    relevance = np.zeros((tokens, tokens))
    for i in range(tokens):
        relevance[i, i] = math.hypot(*before[0, b, i])
    for n in range(layers):
        total = before[n, b] + after[n, b]
        w = change(before[n, b], total)
        moved = np.zeros((tokens, tokens))
        for i in range(tokens):
            for j in range(tokens):
                a = sum(float(attn[n, b, h, i, j]) for h in range(heads)) / heads
                g = sum(max(float(grad[n, b, h, i, j]), 0) for h in range(heads)) / heads
                moved[i, j] = a * w[j] * g
        relevance = relevance + moved @ relevance
        if n + 1 < layers:
            relevance = (1 + np.array(change(total, before[n + 1, b])))[:, None] * relevance
    return relevance


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
def test_it_is_its_definition(seed):
    attn, grad, values = random_maps(seed, heads=3)
    given = {name: values[name] for name in ("before", "after")}
    found = attention.token_tm(attn, grad, **given)
    for b in range(2):
        # float64: another order of the same sums.
        np.testing.assert_allclose(found[b], by_loop(attn, grad, values, b), rtol=1e-12)


def test_relevance_of_a_function(x64):
    """The stream after an MLP is what the next layer's attention is added to."""

    def fun(x):
        seen = []
        for n in range(3):
            w = jnp.asarray(np.random.default_rng(n).normal(size=(2, 4, 4)))
            attn = jax.nn.softmax((x @ w[0]) @ x.mT, axis=-1)
            out = attn @ (x @ w[1])
            seen.append((attn, x, out))
            x = x + out
            x = x + jnp.tanh(x @ w[0])
        return x[:, 1].sum(-1), seen

    x = jnp.asarray(np.random.default_rng(9).normal(size=(2, 5, 4)))
    explain = attention.relevance(lambda x: fun(x)[0], method="token_tm", target_token=1)
    seen = fun(x)[1]

    def with_maps(maps):
        """The same, with the maps added to."""
        y, at = x, iter(maps)
        for n in range(3):
            w = jnp.asarray(np.random.default_rng(n).normal(size=(2, 4, 4)))
            attn = jax.nn.softmax((y @ w[0]) @ y.mT, axis=-1) + next(at)
            y = y + attn @ (y @ w[1])
            y = y + jnp.tanh(y @ w[0])
        return y[:, 1].sum()

    grads = jax.grad(with_maps)([jnp.zeros((2, 5, 5))] * 3)
    attn, before, after = (np.stack(part) for part in zip(*seen, strict=True))
    values = {"before": before, "after": after}
    found = jax.jit(explain)(x)
    for b in range(2):
        want = by_loop(attn[:, :, None], np.stack(grads)[:, :, None], values, b)[1]
        np.testing.assert_allclose(found[b], want, rtol=1e-10)  # float64, fused otherwise


def test_the_last_mlp_is_left_out(x64):
    attn, grad, values = random_maps(4)
    given = {name: values[name] for name in ("before", "after")}
    found = attention.token_tm(attn, grad, **given)
    mlp = np.concatenate([values["before"][1:], values["value_grad"][-1:]])
    whole = attention.token_tm(attn, grad, **given, following=mlp)
    total = values["before"][-1] + values["after"][-1]
    rows = 1 + token_change(jnp.asarray(total), jnp.asarray(mlp[-1]))
    np.testing.assert_allclose(whole, rows[..., None] * found, rtol=1e-12)


def test_tokens_without_length_change_by_nothing():
    zeros, ones = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 2))
    np.testing.assert_array_equal(token_change(zeros, ones), np.zeros((1, 3)))
    np.testing.assert_array_equal(token_change(ones, zeros), np.zeros((1, 3)))
    np.testing.assert_allclose(token_change(ones, 2 * ones), np.full((1, 3), 2 / 3), rtol=1e-6)


def test_a_function_without_a_residual_stream():
    def fun(x):
        return (jax.nn.softmax(x @ x.mT) @ x)[:, 0].sum(-1)

    with pytest.raises(ValueError, match=r"method 'token_tm' needs the residual stream around"):
        attention.relevance(fun, method="token_tm")(X)


def test_batch_is_one_by_one():
    explain = jax.jit(attention.relevance(MODEL, method="token_tm"))
    together = explain(X)
    for i, x in enumerate(X):
        np.testing.assert_allclose(together[i], explain(x[None])[0], rtol=1e-5)
