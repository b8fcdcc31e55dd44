"""Rules that give relevance directly: at tags on the way, and where constants stand beside it."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, everything, first
from jaxrel.propagation.rules import Epsilon, Flat, Rule, WSquare, ZBox
from tests.propagation.networks import normal

DIRECT = [Flat(), WSquare(), ZBox(-1.0, 2.0)]


def conv(x, w, padding="VALID"):
    """Along the second axis: [batch, time, channels]."""
    return lax.conv_general_dilated(x, w, (1,), padding, dimension_numbers=("NHC", "HIO", "NHC"))


def by_hand(rule: Rule, x, w, left, right, c):
    """Relevance of x [time, channels] for c * its convolution with zeros around it, in NumPy."""
    found, z = np.zeros_like(x), np.zeros((len(x) + left + right - len(w) + 1, w.shape[2]))
    for t, j in np.ndindex(z.shape):
        seen = [(t + k - left, k) for k in range(len(w)) if 0 <= t + k - left < len(x)]
        z[t, j] = sum(x[i] @ w[k, :, j] for i, k in seen)
        if isinstance(rule, Flat):
            parts = np.array([np.ones(x.shape[1]) for _ in seen])
        elif isinstance(rule, WSquare):
            parts = np.array([w[k, :, j] ** 2 for _, k in seen])
        else:
            parts = [
                x[i] * (v := w[k, :, j]) + np.maximum(v, 0) + 2 * -v.clip(max=0) for i, k in seen
            ]
            parts = np.array(parts)
        total = parts.sum() + 1e-6 * (1 if parts.sum() >= 0 else -1)
        for (i, _), part in zip(seen, parts, strict=True):
            found[i] += part / total * z[t, j] * c[t, j]
    return found


def padded_by(way):
    """Functions that put (2, 1) zeros around the time axis, each in its own way."""
    zeros = lambda x, n: jnp.zeros((len(x), n, x.shape[2]), x.dtype)
    return {
        "pad": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0))),
        "concatenate": lambda x: jnp.concatenate([zeros(x, 2), x, zeros(x, 1)], 1),
        "update": lambda x: lax.dynamic_update_slice(zeros(x, x.shape[1] + 3), x, (0, 2, 0)),
        "set": lambda x: zeros(x, x.shape[1] + 3).at[:, 2:-1].set(x),
        "where": lambda x: jnp.where(
            (jnp.arange(x.shape[1] + 3) >= 2)[:, None] & (jnp.arange(x.shape[1] + 3) < 7)[:, None],
            jnp.pad(x, ((0, 0), (2, 1), (0, 0)), mode="edge"),
            0.0,
        ),
        "then scaled": lambda x: jnp.pad(x * 2, ((0, 0), (2, 1), (0, 0))) / 2,
    }[way]


@pytest.mark.parametrize("rule", DIRECT, ids=str)
@pytest.mark.parametrize("way", ["pad", "concatenate", "update", "set", "where", "then scaled"])
def test_zeros_put_around_the_input_take_no_relevance(x64, rule, way):
    x, w, seed = normal(2, 5, 3), normal(3, 3, 4), normal(2, 6, 4)
    x, pad = x.at[0, 1:3].set(0.0), padded_by(way)
    rules = [(first(), rule)]
    # The scale gives each output a relevance of its own, seed * value.
    found = jax.jit(jaxrel.lrp(lambda x: conv(pad(x), w) * seed, rules))(x)
    own = jaxrel.lrp(lambda x: conv(x, w, [(2, 1)]) * seed, rules)(x)
    np.testing.assert_allclose(found, own, rtol=1e-12)
    for one, got, c in zip(np.asarray(x), found, np.asarray(seed), strict=True):
        # Sums of a dozen float64 terms, whose total may cancel to 1e-3 of them.
        np.testing.assert_allclose(got, by_hand(rule, one, np.asarray(w), 2, 1, c), rtol=1e-9)
    balance = jaxrel.conservation(lambda x: conv(pad(x), w), [(first(), rule)])(x).summary()
    # The sums are kept in float32.
    assert abs(balance["elsewhere"]) + abs(balance["bias"]) < 1e-5 * abs(balance["output"])


@pytest.mark.parametrize("wrap", ["remat", "scan", "cond"])
def test_zeros_put_around_the_input_before_a_body(x64, wrap):
    x, w = normal(2, 5, 3), normal(3, 3, 4)
    rules = [(first(), Flat()), (everything(), Epsilon())]
    run = {
        "remat": jax.checkpoint(lambda x: conv(x, w)),
        "scan": lambda x: lax.map(lambda one: conv(one[None], w)[0], x),
        "cond": lambda x: lax.cond(w[0, 0, 0] < 9, lambda x: conv(x, w), lambda x: conv(x, -w), x),
    }[wrap]
    found = jaxrel.lrp(lambda x: run(jnp.pad(x, ((0, 0), (2, 0), (0, 0)))), rules)(x)
    expected = jaxrel.lrp(lambda x: conv(x, w, [(2, 0)]), rules)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("rule", DIRECT, ids=str)
def test_a_tag_before_a_direct_rule_has_the_inputs_relevance(x64, rule):
    x, w, b = normal(2, 5, 3).at[0, 1:3].set(0.0), normal(3, 3, 4), normal(4)

    def fun(x):
        y = jaxrel.tag(jaxrel.tag(x, "raw").transpose(0, 2, 1) / 255, "pixels")
        return jax.nn.relu(conv(y.transpose(0, 2, 1), w, "SAME") + b).sum(1)

    rules = [(first(), rule), (everything(), Epsilon())]
    relevance, places = jax.jit(jaxrel.lrp(fun, rules, at=("raw", "pixels")))(x)
    assert jnp.abs(relevance[0, 1:3]).min() > 0
    np.testing.assert_allclose(places["raw"], relevance, rtol=1e-12)
    np.testing.assert_allclose(places["pixels"].transpose(0, 2, 1), relevance, rtol=1e-12)
    # In the network above nothing is given directly: a tag there is as it was.
    later = lambda x: jnp.tanh(jaxrel.tag(fun(x), "later") @ normal(4, 2))
    _, places = jaxrel.lrp(later, rules, at="later")(x)
    _, plain = jaxrel.lrp(later, Epsilon(), at="later")(x)
    np.testing.assert_allclose(places["later"], plain["later"], rtol=1e-12)


@pytest.mark.parametrize("rule", DIRECT, ids=str)
@pytest.mark.parametrize("wrap", ["plain", "remat", "scan"])
def test_black_pixels_of_integer_images_are_relevant_at_their_tag(x64, rule, wrap):
    image = jnp.zeros((2, 5, 3), jnp.uint8).at[0, 1:3].set(200)
    w, b = normal(3, 3, 4), jnp.full(4, 0.5)
    head = lambda y: (conv(jnp.pad(y, ((0, 0), (1, 1), (0, 0))), w) + b).sum(1)

    def tagged(image):
        one = lambda image: head(jaxrel.tag(image.astype(jnp.float64) / 255, "pixels"))
        if wrap == "scan":
            return lax.map(lambda x: one(x[None])[0], image)
        return jax.checkpoint(one)(image) if wrap == "remat" else one(image)

    rules = [(first(), rule)]
    found = jaxrel.lrp(tagged, rules, argnums=None, at="pixels")(image)["pixels"]
    expected = jaxrel.lrp(head, rules)(image.astype(jnp.float64) / 255)
    assert jnp.abs(expected[1]).min() > 0
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-12)
    balance = jaxrel.conservation(tagged, rules, argnums=None, at="pixels")(image).summary()
    assert abs(balance["elsewhere"]) < 1e-5 * abs(balance["output"])


def test_presets_with_flat_and_causal_padding(x64):
    x, w = normal(2, 5, 3), normal(3, 3, 4)
    fun = lambda x: conv(jnp.pad(x, ((0, 0), (2, 0), (0, 0))), w)
    relevance = jaxrel.lrp(fun, composites.epsilon_plus_flat())(x)
    # 1e-6 is the stabiliser, beside at least 3 inputs.
    np.testing.assert_allclose(relevance.sum((1, 2)), fun(x).sum((1, 2)), rtol=1e-5)


# Rows of weights that a mean or a resize of the time axis has, [out, 6].
FIXED = {
    "mean": (lambda x: x.reshape(2, 3, 2, 3).mean(2), np.kron(np.eye(3), [[0.5, 0.5]])),
    "window": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID") / 2,
        np.kron(np.eye(3), [[0.5, 0.5]]),
    ),
    "resize": (
        lambda x: jax.image.resize(x, (2, 3, 3), "bilinear", antialias=False),
        np.kron(np.eye(3), [[0.5, 0.5]]),
    ),
    "padded": (
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))).reshape(2, 4, 2, 3).mean(2),
        np.kron(np.eye(4), [[0.5, 0.5]])[:, 1:-1],
    ),
}


@pytest.mark.parametrize("rule", DIRECT, ids=str)
@pytest.mark.parametrize("name", FIXED)
def test_black_pixels_before_a_mean_or_a_resize(x64, name, rule):
    change, weights = FIXED[name]
    x, w = jnp.abs(normal(2, 6, 3)).at[0, :4].set(0.0), normal(3, 3, 4)
    found = jaxrel.lrp(lambda x: conv(change(x), w), [(first(), rule)])(x)
    direct = jaxrel.lrp(lambda y: conv(y, w), [(first(), rule)])(change(x))
    shares = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(found, jnp.einsum("btc,ts->bsc", direct, shares), rtol=1e-9)
    assert jnp.abs(found[0, :4]).min() > 0


@pytest.mark.parametrize("rule", DIRECT, ids=str)
@pytest.mark.parametrize("wrap", ["remat", "scan", "cond", "padded", "padded in one branch"])
def test_what_is_done_to_the_input_in_a_body_of_its_own(x64, wrap, rule):
    x, w = jnp.abs(normal(2, 5, 3)).at[0, 1:3].set(0.0), normal(3, 3, 4)
    plain = lambda x: x * 2 - 1
    padded = lambda x: jnp.pad(plain(x), ((0, 0), (2, 0), (0, 0)))
    longer = lambda x: jnp.concatenate([plain(x[:, :2]), plain(x)], 1)
    run = {
        "remat": jax.checkpoint(plain),
        "scan": lambda x: lax.map(plain, x),
        "cond": lambda x: lax.cond(w[0, 0, 0] < 9, plain, lambda x: x, x),
        "padded": jax.checkpoint(padded),
        "padded in one branch": lambda x: lax.cond(w[0, 0, 0] < 9, padded, longer, x),
    }[wrap]
    change = padded if "padded" in wrap else plain
    rules = [(first(), rule)]
    found = jax.jit(jaxrel.lrp(lambda x: conv(run(x), w), rules))(x)
    expected = jaxrel.lrp(lambda x: conv(change(x), w), rules)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
