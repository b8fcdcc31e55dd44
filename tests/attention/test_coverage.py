"""No layer is left out unsaid: what is not recognised, or not tagged, is an error."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention

BATCH, TOKENS, WIDTH = 2, 5, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
W = (RNG.normal(size=(4, WIDTH, WIDTH)) * 0.4).astype(np.float32)


def attend(x, attn_of):
    scores = jnp.einsum("bqd,bkd->bqk", x @ W[0], x @ W[1])
    return jnp.einsum("bqk,bkd->bqd", attn_of(scores), x @ W[2]) @ W[3]


def softmax(scores):
    return jax.nn.softmax(scores)


# Spellings of softmax that are far from any pattern; should one be recognised, it is right.
def twice_halved(scores):
    e = jnp.exp(scores / 2)
    return e * e / jnp.einsum("bqk,bqk->bq", e, e)[..., None]


def cubed(scores):
    e = jnp.exp(scores / 3)
    e = e * e * e
    return e * jnp.sum(e, -1, keepdims=True) ** -1.0


def mapped(scores):
    total = sum(jnp.exp(scores[..., i]) for i in range(TOKENS))
    return jnp.exp(scores) / total[..., None]


SPELLINGS = (twice_halved, cubed, mapped)


def two_layers(first, second):
    def model(x):
        x = x + attend(x, first)
        return (x + attend(x, second))[:, 0].sum(-1)

    return model


@pytest.mark.parametrize("other", SPELLINGS)
def test_a_layer_that_is_not_recognised_is_named_or_right(other):
    want = attention.relevance(two_layers(softmax, softmax))(X)
    for model in (two_layers(softmax, other), two_layers(other, softmax)):
        try:
            got = attention.relevance(model)(X)
        except NotImplementedError as error:
            text = str(error)
            named = "test_coverage.py" in text and f"({other.__name__}" in text
            if not (named and "tag the map of every layer" in text):
                raise
        else:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 rounding


@pytest.mark.parametrize("method", ["equal", "weighted"])
@pytest.mark.parametrize("other", SPELLINGS)
def test_tags_on_the_maps_of_all_layers_are_the_way_out(other, method):
    """The advice of the error, followed."""
    tagged = lambda spelling: lambda scores: jaxrel.tag(spelling(scores), "maps")
    model = two_layers(tagged(softmax), tagged(other))
    want = attention.relevance(two_layers(softmax, softmax), method=method)(X)
    for names in ("maps", None):
        got = attention.relevance(model, attention=names, method=method)(X)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 rounding


@pytest.mark.parametrize("other", [softmax, *SPELLINGS])
def test_a_tag_on_one_layer_of_two_is_no_choice_of_a_stack(other):
    tagged = lambda scores: jaxrel.tag(softmax(scores), "maps")
    for model in (two_layers(tagged, other), two_layers(other, tagged)):
        with pytest.raises((ValueError, NotImplementedError), match=r"tag the maps? of"):
            attention.relevance(model, attention="maps", method="equal")(X)


def summed_by_hand(x):
    """Values multiplied entry by entry, and summed over the keys."""
    attn = jax.nn.softmax(x @ W[0] @ (x @ W[1]).swapaxes(1, 2))
    return (attn[..., None] * (x @ W[2])[:, None]).sum(2) @ W[3]


def key_by_key(x):
    """A softmax that is never held whole: one key after another, as kernels do it."""
    q, k, v = (x @ w for w in W[:3])

    def step(state, key):
        top, total, out = state
        scores = jnp.einsum("bqd,bd->bq", q, key[0])
        new = jnp.maximum(top, scores)
        old, share = jnp.exp(top - new), jnp.exp(scores - new)
        out = out * old[..., None] + share[..., None] * key[1][:, None]
        return (new, total * old + share, out), None

    zeros = jnp.zeros((BATCH, TOKENS))
    keys = jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)
    start = (zeros - 1e30, zeros, jnp.zeros_like(x))
    (_, total, out), _ = jax.lax.scan(step, start, keys)
    return out / total[..., None] @ W[3]


def divided_later(x):
    e = jnp.exp(x @ W[0] @ (x @ W[1]).swapaxes(1, 2))
    return (e @ (x @ W[2])) / e.sum(-1, keepdims=True) @ W[3]


def test_attention_that_divides_after_the_values_is_found():
    def model(x, second):
        x = x + attend(x, softmax)
        return (x + second(x))[:, 0].sum(-1)

    found, plain = (
        attention.relevance(lambda x, f=f: model(x, f), method="equal")(X)
        for f in (divided_later, lambda x: attend(x, softmax))
    )
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("other", [summed_by_hand, key_by_key])
def test_attention_without_a_map_that_meets_its_values_is_named(other):
    plain = lambda x: attend(x, softmax)
    np.testing.assert_allclose(other(X), plain(X), rtol=1e-4, atol=1e-5)  # float32 rounding
    for first, second in ((plain, other), (other, plain)):

        def model(x, first=first, second=second):
            x = x + first(x)
            return (x + second(x))[:, 0].sum(-1)

        with pytest.raises(NotImplementedError, match=rf"test_coverage.py.*\({other.__name__}"):
            attention.relevance(model, method="equal")(X)


def test_softmaxes_that_are_no_attention_are_no_obstacle():
    """Experts chosen by a softmax, classes, and a softmax over width, beside attention."""

    def model(x):
        gate = jax.nn.softmax(x @ W[0][:, :3])
        experts = jnp.stack([x @ w for w in W[:3]], -2)
        x = x + jnp.einsum("bte,bted->btd", gate, experts)
        x = x + (jax.nn.softmax(x @ W[1])[..., None] * W[2]).sum(-2)
        x = x + attend(x, softmax)
        return jax.nn.log_softmax(x[:, 0])[:, 0]

    (stack,) = attention.sites(model)(X)
    assert (stack.layers, stack.is_self) == (1, True)


def divided_after(x):
    e = jnp.exp(jnp.einsum("bqd,bkd->bqk", x @ W[0], x @ W[1]))
    values = jnp.concatenate([x @ W[2], x[..., :1] * 0 + 1], -1)
    both = jnp.einsum("bqk,bkd->bqd", e, values)
    return x + both[..., :-1] / both[..., -1:] @ W[3]


def test_a_sum_that_is_cut_out_of_the_product_is_seen():
    model = lambda x: divided_after(x + attend(x, softmax))[:, 0].sum(-1)
    with pytest.raises(NotImplementedError, match=r"test_coverage.py:\d+ \(divided_after\)"):
        attention.relevance(model)(X)


NORMS = {
    "power": lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6),
    "square root": lambda x: x / (jnp.mean(x**2.0, -1, keepdims=True) + 1e-6) ** 0.5,
    "length": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_of_queries_and_keys_are_no_attention(norm):
    """Query-key normalisation (Henry et al. 2020), as in Qwen 3 and Gemma 3."""

    def model(x, seen=()):
        for layer in range(2):
            scores = jnp.einsum("bqd,bkd->bqk", norm(x @ W[0]), norm(x @ W[1]))
            attn = jaxrel.tag(softmax(scores), f"map {layer}") if seen else softmax(scores)
            x = x + jnp.einsum("bqk,bkd->bqd", attn, x @ W[2]) @ W[3]
        return x[:, 0].sum(-1)

    names = ("map 0", "map 1")
    _, maps, grads = jaxrel.capture_with_grad(lambda x: model(x, names), names)(X)
    want = np.stack([np.eye(TOKENS)] * BATCH)
    for name in names:
        want += np.maximum(np.float64(maps[name]) * grads[name], 0) @ want
    (stack,) = attention.sites(model)(X)
    assert stack.layers == 2
    got = attention.relevance(model, method="equal")(X)
    np.testing.assert_allclose(got, want[:, 0], rtol=1e-5)  # float32 rounding
