"""The residual sum around an attention, wherever it stands and whatever is done on the way."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import attention

BATCH, TOKENS, WIDTH = 2, 5, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TOKENS, WIDTH))
W = RNG.normal(size=(8, WIDTH, WIDTH)) * 0.4
GAMMA = RNG.normal(size=WIDTH)


def norm(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def attend(x):
    attn = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ W[0], x @ W[1]))
    return jnp.einsum("bqk,bkd->bqd", attn, x @ W[2]) @ W[3]


def mlp(x):
    return jax.nn.gelu(x @ W[4]) @ W[5]


def drop(x):
    return jnp.where(np.arange(WIDTH) % 2 == 0, x * 2, 0)


# What is added to what: the stream before the sum, and what the attention makes of it.
STREAMS = {
    "pre-norm": (lambda x: x, lambda x: attend(norm(x))),
    "pre- and post-norm": (lambda x: x, lambda x: norm(attend(norm(x)))),
    "layer norm after": (lambda x: x, lambda x: jax.nn.standardize(attend(x)) * GAMMA + 1),
    "stream scaled": (lambda x: x * 0.5, lambda x: attend(norm(x))),
    "both scaled": (lambda x: x / 2, lambda x: attend(x) * 0.25),
    "layer scale": (lambda x: x, lambda x: attend(norm(x)) * GAMMA),
    "gate": (lambda x: x, lambda x: attend(x) * jax.nn.sigmoid(x @ W[6])),
    "highway": (
        lambda x: x * (1 - jax.nn.sigmoid(x @ W[6])),
        lambda x: attend(x) * jax.nn.sigmoid(x @ W[6]),
    ),
    "parallel": (lambda x: x, lambda x: GAMMA * (attend(norm(x)) + mlp(norm(x)))),
    "parallel, stream first": (lambda x: x + mlp(x), attend),
    "remat": (lambda x: x, jax.checkpoint(lambda x: attend(norm(x)))),
    "remat with a norm outside": (lambda x: x, lambda x: norm(jax.checkpoint(attend)(x))),
    "remat in remat": (lambda x: x, jax.checkpoint(lambda x: jax.checkpoint(attend)(x) * 2)),
    "jit": (lambda x: x, jax.jit(attend)),
    "dropout": (lambda x: x, lambda x: drop(attend(x))),
    "activation": (lambda x: x, lambda x: jax.nn.silu(attend(x))),
    "cast": (lambda x: x, lambda x: attend(x).astype(jnp.float32).astype(x.dtype)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_default_method_compares_what_is_added(name):
    """One layer: alpha I + beta A, with the weights of the two summands computed by hand."""
    before, after = STREAMS[name]
    options = {"target_token": None, "importance": lambda value, grad: jnp.abs(value).sum(-1)}
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        model = lambda x: norm(before(x) + after(x))[:, 0].sum(-1)
        (stack,) = attention.sites(model)(x)
        assert (stack.is_self, stack.has_residual) == (True, True)
        moved = attention.relevance(model, method="equal", target_token=None)(x) - np.eye(TOKENS)
        got = attention.relevance(model, **options)(x)
        u, v = (np.abs(np.asarray(f(x))).sum(-1)[..., None] for f in (before, after))
        moved = np.asarray(moved)
    want = 2 * u / (u + v) * np.eye(TOKENS) + 2 * v / (u + v) * moved
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("name", STREAMS)
def test_two_layers_are_one_stack_streamed_or_stacked(name):
    before, after = STREAMS[name]

    def model(x):
        for scale in (1.0, 0.7):
            x = before(x * scale) + after(x * scale)
        return x[:, 0].sum(-1)

    with jax.enable_x64(True):
        x = jnp.asarray(X)
        (stack,) = attention.sites(model)(x)
        assert stack.layers == 2
        got, want = (attention.relevance(model, form=f)(x) for f in ("streaming", "stacked"))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)  # float64 rounding


def test_a_long_skip_is_not_the_residual_of_an_attention():
    """The sum with the input stands after another attention: no layer's residual is known."""
    model = lambda x: (x + attend(attend(x)))[:, 0].sum(-1)
    (stack,) = attention.sites(model)(X.astype(np.float32))
    assert [site.residual is None for site in stack.sites] == [True, False]
    with pytest.raises(ValueError, match="needs the residual stream"):
        attention.relevance(model)(X.astype(np.float32))


# [batch, tokens, width] to another order of axes.
ORDERS = {"tokens first": (1, 0, 2), "channels first": (0, 2, 1), "channels before all": (2, 0, 1)}


def _ordered(name, x):
    return x.transpose(ORDERS[name])


def _by_name(name, x):
    return x.transpose(np.argsort(ORDERS[name]))


@pytest.mark.parametrize("method", ["weighted", "token_tm"])
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("examples", [1, 2, TOKENS])
def test_the_axes_of_a_stream_in_any_order(name, method, examples):
    def layers(x, change, back):
        x = change(x)
        for scale in (1.0, 0.7):
            x = x + change(attend(back(x) * scale))
        return back(x)[:, 1].sum(-1)

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(examples, TOKENS, WIDTH)))
        other = lambda x: layers(x, lambda x: _ordered(name, x), lambda x: _by_name(name, x))
        plain = lambda x: layers(x, lambda x: x, lambda x: x)
        options = {"method": method, "target_token": 1}
        got, want = (jax.jit(attention.relevance(f, **options))(x) for f in (other, plain))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.swapaxes(0, 1)])
def test_tags_are_read_as_batch_tokens_width(change):
    """What the error asks for gives the right number; in another order it is refused."""

    def model(x, tag=lambda value, name: value):
        for _ in range(2):
            attn = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ W[0], x @ W[1]))
            out = tag(attn[:, None], "maps")[:, 0] @ (x @ W[2])
            x = change(tag(change(x), "maps/before") + tag(change(out), "maps/after"))
        return x[:, 0].sum(-1)

    tagged = attention.relevance(lambda x: model(x, jaxrel.tag), attention="maps")
    x = jnp.asarray(X, jnp.float32)
    if change(x).shape != x.shape:
        with pytest.raises(ValueError, match=r"must be \[batch, tokens, width\] = \(2, 5, width\)"):
            tagged(x)
        return
    np.testing.assert_allclose(tagged(x), attention.relevance(model)(x), rtol=1e-5, atol=1e-6)
