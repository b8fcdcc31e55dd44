"""Which tokens a score is read from, and what is said of another target token."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel import attention

TOKENS, WIDTH = 5, 8
_rngs = nnx.Rngs(0)
NORM, HEAD = nnx.LayerNorm(WIDTH, rngs=_rngs), nnx.Linear(WIDTH, 3, rngs=_rngs)
W = 0.5 * jax.random.normal(jax.random.key(1), (4, WIDTH, WIDTH))
X = jax.random.normal(jax.random.key(0), (2, TOKENS, WIDTH))
MASK = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])[None, :, None]


def layer(x):
    queries, keys, values = (x @ w for w in W[:3])
    scores = jnp.einsum("bqd,bkd->bqk", queries, keys) / WIDTH**0.5
    return x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), values) @ W[3]


PROGRAMS = {
    "unrolled": lambda x: layer(layer(x)),
    "scan": lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0],
    "remat": jax.checkpoint(lambda x: layer(layer(x))),
}
ALL = list(range(TOKENS))
# What is read after the last layer, and of which tokens; None where it is not known.
READ = {
    "the first": (lambda x: HEAD(NORM(x)[:, 0])[:, 1], [0]),
    "the last, after the head": (lambda x: HEAD(NORM(x))[:, -1, 1], [TOKENS - 1]),
    "mean": (lambda x: HEAD(NORM(x).mean(1))[:, 1], ALL),
    "mean of logits": (lambda x: HEAD(jax.nn.gelu(x))[..., 1].mean(1), ALL),
    "highest": (lambda x: x.max(1)[:, 0], ALL),
    "all but the first": (lambda x: x[:, 1:].mean(1)[:, 0], ALL[1:]),
    "two": (lambda x: (x[:, 0] + x[:, 3]).sum(-1), [0, 3]),
    "moved": (lambda x: jnp.swapaxes(x, 1, 2).reshape(2, 2, 4, TOKENS)[..., 2].sum((1, 2)), [2]),
    "one beside what is not used": (lambda x: (x.mean(1), x[:, 3])[1].sum(-1), [3]),
    "masked": (lambda x: (x * MASK).sum((1, 2)), None),
    "of each example": (lambda x: x[jnp.arange(2), jnp.array([1, 3])].sum(-1), None),
    "weights": (lambda x: x.reshape(2, -1) @ jnp.ones(TOKENS * WIDTH), None),
    "neighbours": (lambda x: jnp.cumsum(x, axis=1)[:, 2].sum(-1), None),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
@pytest.mark.parametrize(("readout", "read"), READ.values(), ids=READ.keys())
def test_which_tokens_are_read(program, readout, read):
    (stack,) = attention.sites(lambda x: readout(program(x)))(X)
    found = None if stack.read is None else stack.read.tolist()
    assert found == read


def score_of(readout):
    return lambda x: readout(PROGRAMS["unrolled"](x))


def test_another_target_token_is_told_and_the_advice_is_right():
    last = score_of(lambda x: x[:, 3].sum(-1))
    with pytest.warns(UserWarning, match=r"reads token 3 alone, and target_token=0 .*: give targ"):
        wrong = attention.relevance(last)(X)
    right = attention.relevance(last, target_token=3)(X)
    # The first token's row is that token alone: no gradient reaches it in the last layer.
    assert not np.allclose(wrong, right, atol=0.1)
    np.testing.assert_allclose(attention.relevance(last, target_token=-2)(X), right)


def test_of_a_mean_of_tokens_the_rows_are_those_of_each_token():
    mean = score_of(lambda x: x[:, 1:].mean(1).sum(-1))
    message = r"reads 4 tokens \(1, 2, 3, .*relevance\[:, \[1, 2, 3, 4\]\]\.mean\(axis=1\)"
    explain = functools.partial(attention.relevance, mean, method="equal")
    rows = explain(target_token=None)(X)
    for token in range(1, TOKENS):
        with pytest.warns(UserWarning, match=message):
            row = jax.jit(explain(target_token=token))(X)
        np.testing.assert_allclose(rows[:, token], row, rtol=1e-5, atol=1e-6)


def test_what_is_asked_on_purpose_is_not_told():
    mean = score_of(lambda x: x.mean((1, 2)))
    attention.relevance(mean, target_token=None)(X)
    attention.relevance(mean, target_token=jnp.array([0, 1]))(X)
    jax.jit(lambda x, token: attention.relevance(mean, target_token=token)(x))(X, 0)


def test_a_target_token_that_is_none_is_an_error_and_no_warning():
    last = score_of(lambda x: x[:, 3].sum(-1))
    with pytest.raises(ValueError, match="target_token: 5 does not exist"):
        attention.relevance(last, target_token=TOKENS)(X)
    with pytest.raises(TypeError, match="target_token: expected integers"):
        attention.relevance(last, target_token=0.5)(X)


def test_a_sum_over_examples_is_told():
    fun = score_of(lambda x: x[:, 0].sum(-1))
    message = "one scalar, and .* attends within 2 parts of 5 tokens, .* return one score for each"
    with pytest.warns(UserWarning, match=message):
        merged = attention.relevance(lambda x: fun(x).sum())(X)
    assert merged.shape == (1, 2 * TOKENS)
    assert attention.relevance(fun)(X).shape == (2, TOKENS)
    # One example without a batch is not told.
    alone = attention.relevance(lambda x: fun(x[None])[0])(X[0])
    np.testing.assert_allclose(alone, attention.relevance(fun)(X)[:1], rtol=1e-5, atol=1e-6)
