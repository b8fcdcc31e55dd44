"""Relevance in the backward pass, with the whole map and by blocks, against the matrix form."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import blockwise, streaming
from jaxrel.attention.streaming import Carrier

LAYERS, BATCH, HEADS, TOKENS, WIDTH = 3, 2, 2, 7, 4
CLASS = 1

# float64: the forms differ only in the order of sums.
SAME = {"rtol": 1e-12, "atol": 1e-12}


def random_model(seed=0, tokens=TOKENS, dtype=jnp.float64):
    """A small pre-norm transformer's weights, layers stacked, and its input."""
    rng = np.random.default_rng(seed)
    width = HEADS * WIDTH

    def normal(*shape):
        return (rng.normal(size=shape) * shape[-2] ** -0.5).astype(dtype)

    weights = {
        "qkv": 1.5 * normal(LAYERS, width, 3 * width),
        "out": normal(LAYERS, width, width),
        "up": normal(LAYERS, width, 2 * width),
        "down": normal(LAYERS, 2 * width, width),
    }
    return weights, normal(width, 3), 3 * normal(BATCH, tokens, width)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def queries_keys_values(weights, x):
    heads = (norm(x) @ weights["qkv"]).reshape(*x.shape[:2], 3, HEADS, WIDTH)
    return jnp.moveaxis(heads, (2, 3), (0, 2))


def attention_map(q, k):
    return jax.nn.softmax(WIDTH**-0.5 * q @ k.mT, axis=-1)


def joined(weights, heads):
    """Head outputs to the attention output that is added to the stream."""
    batch, _, tokens, _ = heads.shape
    return jnp.swapaxes(heads, 1, 2).reshape(batch, tokens, -1) @ weights["out"]


def feed_forward(weights, x):
    return x + jax.nn.gelu(norm(x) @ weights["up"]) @ weights["down"]


def explained(head, x, target_token):
    return (x[:, target_token] @ head)[:, CLASS]


@functools.partial(jax.jit, static_argnums=(3, 4))
def matrix_form(weights, head, x, target_token, importance):
    """The whole matrix, from all maps and gradients side by side."""
    batch, tokens, width = x.shape
    probes = (
        jnp.zeros((LAYERS, batch, HEADS, tokens, tokens), x.dtype),
        jnp.zeros((LAYERS, batch, tokens, width), x.dtype),
    )

    def run(probes):
        def layer(x, inputs):
            weights, (on_attn, on_sum) = inputs
            q, k, v = queries_keys_values(weights, x)
            attn = attention_map(q, k) + on_attn
            after = joined(weights, attn @ v)
            return feed_forward(weights, x + after + on_sum), (attn, x, after)

        out, maps = jax.lax.scan(layer, x, (weights, probes))
        return explained(head, out, target_token).sum(), maps

    (grad, value_grad), (attn, before, after) = jax.grad(run, has_aux=True)(probes)
    if importance is None:
        return attention.equal(attn, grad)
    return attention.weighted(
        attn, grad, before=before, after=after, value_grad=value_grad, importance=importance
    )


@functools.partial(jax.jit, static_argnums=(3, 4), static_argnames="block")
def streaming_form(weights, head, x, target_token, importance, *, block=None, seeds=None):
    """One row, or one per seed, as the cotangent of a carrier; each layer rematerialised."""
    batch, tokens, _ = x.shape

    @jax.checkpoint
    def layer(state, weights):
        x, carrier = state
        q, k, v = queries_keys_values(weights, x)
        if block is None:
            carrier, attn = streaming.accumulate(carrier, attention_map(q, k))
            out = attn @ v
        else:
            out, carrier = blockwise(q, k, v, carrier, block=block)
        after = joined(weights, out)
        if importance is not None:
            carrier, after = streaming.weigh(carrier, x, after, importance)
        return (feed_forward(weights, x + after), carrier), None

    def run(carrier):
        (out, carrier), _ = jax.lax.scan(layer, (x, carrier), weights)
        return explained(head, out, target_token), carrier

    (y, _), pullback = jax.vjp(run, streaming.zeros(batch, tokens, x.dtype))
    if seeds is None:
        seed = streaming.seed(target_token, batch=batch, tokens=tokens, dtype=x.dtype)
        return pullback((jnp.ones_like(y), seed))[0].keep
    return jax.vmap(lambda seed: pullback((jnp.ones_like(y), seed))[0].keep)(seeds)


def largest(value, grad):
    """A user's own measure."""
    return jnp.abs(value * grad).max(axis=-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("importance", [None, "grad_value", "norm", "abs_grad_value", largest])
def test_matrix_streaming_and_blockwise_are_one(importance):
    model = random_model()
    expected = attention.row(matrix_form(*model, 2, importance), 2)
    assert expected.dtype == jnp.float64
    np.testing.assert_allclose(streaming_form(*model, 2, importance), expected, **SAME)
    np.testing.assert_allclose(streaming_form(*model, 2, importance, block=3), expected, **SAME)


@pytest.mark.usefixtures("x64")
@settings(max_examples=2, deadline=None, database=None)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 9), block=st.integers(1, 10))
def test_forms_agree_over_shapes(seed, tokens, block):
    model = random_model(seed, tokens)
    expected = attention.row(matrix_form(*model, tokens - 1, "grad_value"), tokens - 1)
    for size in (None, block):
        row = streaming_form(*model, tokens - 1, "grad_value", block=size)
        np.testing.assert_allclose(row, expected, **SAME)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block", [None, 3])
def test_every_row_at_once(block):
    model = random_model(1)
    seeds = [
        streaming.seed(i, batch=BATCH, tokens=TOKENS, dtype=jnp.float64) for i in range(TOKENS)
    ]
    seeds = jax.tree.map(lambda *rows: jnp.stack(rows), *seeds)
    matrix = streaming_form(*model, 0, "norm", block=block, seeds=seeds)
    expected = matrix_form(*model, 0, "norm")
    np.testing.assert_allclose(jnp.swapaxes(matrix, 0, 1), expected, **SAME)


def test_forms_agree_in_float32():
    model = random_model(2, dtype=jnp.float32)
    expected = attention.row(matrix_form(*model, 0, "grad_value"), 0)
    row = streaming_form(*model, 0, "grad_value", block=4)
    assert row.dtype == jnp.float32
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)  # float32 rounding


# ---- the carrier by itself


def test_forward_is_the_identity():
    attn, values = jnp.full((1, 1, 2, 2), 0.5), jnp.arange(6.0).reshape(1, 2, 3)
    carrier = streaming.zeros(1, 2)
    same, out = streaming.accumulate(carrier, attn)
    np.testing.assert_array_equal(out, attn)
    same, out = streaming.weigh(same, -values, values)
    np.testing.assert_array_equal(out, values)
    assert not any(x.any() for x in same)


def test_accumulate_by_hand():
    attn = jnp.array([[[[1, 0], [0.5, 0.5]]]])
    attn_grad = jnp.array([[[[1.0, 7], [1, -1]]]])
    relevance = Carrier(keep=jnp.array([[1.0, 2]]), move=jnp.array([[10.0, 4]]))
    _, pullback = jax.vjp(streaming.accumulate, streaming.zeros(1, 2), attn)
    new, passed = pullback((relevance, attn_grad))
    # keep + move A, with A = [[1, 0], [.5, 0]]
    np.testing.assert_array_equal(new.keep, [[1 + 10 + 2, 2]])
    np.testing.assert_array_equal(new.move, new.keep)
    np.testing.assert_array_equal(passed, attn_grad)


def test_weigh_by_hand():
    before, after = jnp.array([[[3.0], [0]]]), jnp.array([[[-1.0], [0]]])
    relevance = Carrier(keep=jnp.array([[2.0, 5]]), move=jnp.array([[2.0, 5]]))
    _, pullback = jax.vjp(
        functools.partial(streaming.weigh, importance="norm"), streaming.zeros(1, 2), before, after
    )
    new, before_grad, after_grad = pullback((relevance, jnp.array([[[7.0], [8]]])))
    np.testing.assert_array_equal(new.keep, [[3, 5]])
    np.testing.assert_array_equal(new.move, [[1, 5]])
    assert not before_grad.any()
    np.testing.assert_array_equal(after_grad, [[[7], [8]]])


@pytest.mark.parametrize("target_token", [1, -1, np.array([1, -1])])
def test_seed(target_token):
    for part in streaming.seed(target_token, batch=2, tokens=2):
        np.testing.assert_array_equal(part, [[0, 1], [0, 1]])


def test_missing_target_token():
    with pytest.raises(
        ValueError, match="target_token: 2 does not exist; there are 2 tokens, 0 to 1"
    ):
        streaming.seed(2, batch=1, tokens=2)


def test_shapes_that_do_not_fit():
    carrier, width = streaming.zeros(1, 3), jnp.ones((1, 3, 4))
    with pytest.raises(ValueError, match=r"accumulate: .* got map \(1, 2, 3, 4\) and carrier"):
        streaming.accumulate(carrier, jnp.ones((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"weigh: .* got before \(1, 3, 4\), after \(1, 3, 4\)"):
        streaming.weigh(streaming.zeros(1, 2), width, width)
    q, k, v = jnp.ones((3, BATCH, HEADS, TOKENS, WIDTH))
    with pytest.raises(ValueError, match=r"expected a carrier .* = \(2, 7\), got \(1, 3\)"):
        blockwise(q, k, v, carrier, block=2)
