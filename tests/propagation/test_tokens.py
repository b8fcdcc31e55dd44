"""Integer tokens have the relevance of what they look up."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from tests.propagation.networks import normal

TOKENS = jnp.array([[1, 2, 2, 4], [0, 3, 1, 1]])


def read(x):
    """Embeddings [batch, tokens, 8] to a score for each example."""
    maps = jax.nn.softmax(x @ x.swapaxes(1, 2) / 3)
    return (jax.nn.gelu(maps @ x @ normal(8, 8)) + x).mean(1) @ normal(8)


class Model(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(11, 8, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return read(self.embed(tokens) * 2)


@pytest.mark.parametrize("way", ["index", "take", "embed", "jit", "one-hot", "equal"])
def test_tokens_have_the_relevance_of_their_rows(way):
    model, table = Model(), normal(11, 8)
    fun = {
        "index": lambda tokens: read(table[tokens]),
        "take": lambda tokens: read(jnp.take(table, tokens, 0)),
        "embed": model,
        "one-hot": lambda tokens: read(jax.nn.one_hot(tokens, 11) @ table),
        "equal": lambda tokens: read(
            jnp.einsum("btv,vd->btd", jnp.float32(tokens[..., None] == jnp.arange(11)), table)
        ),
        "jit": jax.jit(lambda tokens: read(table[tokens])),
    }[way]
    table, scale = (model.embed.embedding[...], 2) if way == "embed" else (table, 1)
    rows = jaxrel.lrp(lambda x: read(x * scale), composites.attn_lrp())(table[TOKENS])
    found = jax.jit(jaxrel.lrp(fun, composites.attn_lrp()))(TOKENS)
    assert found.shape == TOKENS.shape
    np.testing.assert_allclose(found, rows.sum(-1), rtol=1e-4, atol=1e-5)
    total = jaxrel.conservation(fun, composites.attn_lrp())(TOKENS)
    np.testing.assert_allclose(total.input, rows.sum(), rtol=1e-4)


def test_a_head_that_is_the_table_looks_nothing_up():
    table = normal(11, 8)

    def logits(x):
        return (x + jnp.tanh(x @ normal(8, 8)))[:, -1] @ table.T

    rows = jaxrel.lrp(lambda x: logits(x)[:, 3], composites.attn_lrp())(table[TOKENS])
    found = jaxrel.lrp(lambda tokens: logits(table[tokens])[:, 3], composites.attn_lrp())(TOKENS)
    np.testing.assert_allclose(found, rows.sum(-1), rtol=1e-4, atol=1e-5)


def test_integers_that_look_nothing_up_are_refused():
    with pytest.raises(TypeError, match="holds no real numbers"):
        jaxrel.lrp(lambda tokens: tokens.sum(1) * 1.0, composites.attn_lrp())(TOKENS)
