"""Contrasts of classes: their values, their derivatives, and every method that explains them."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import attention, composites, contrast, contrastive

_rng = np.random.default_rng(0)
LOGITS = _rng.normal(size=(3, 5))


def by_loop(logits, target, against):
    """The logit less the log of the sum of the exponentials of the others."""
    return logits[target] - math.log(sum(math.exp(logits[j]) for j in against))


@pytest.mark.usefixtures("x64")
def test_values_and_derivatives():
    mask = np.array([False, True, True, False, False])
    for against, others in ((None, [0, 1, 2, 4]), (1, [1]), (-1, [4]), (mask, [1, 2])):
        found = contrast(jnp.asarray(LOGITS), 3, against)
        want = [by_loop(one, 3, others) for one in LOGITS]
        np.testing.assert_allclose(found, want, rtol=1e-13)  # float64
        grads = jax.grad(lambda x, a=against: contrast(x, 3, a).sum())(jnp.asarray(LOGITS))
        for one, grad in zip(LOGITS, grads, strict=True):
            total = sum(math.exp(one[j]) for j in others)
            want = [-math.exp(one[j]) / total if j in others else j == 3 for j in range(5)]
            np.testing.assert_allclose(grad, want, rtol=1e-13)


def test_one_class_for_each_example():
    targets, against = np.array([0, 1, 2]), np.array([4, 4, 1])
    found = jax.jit(contrast)(LOGITS, targets, against)
    want = LOGITS[[0, 1, 2], [0, 1, 2]] - LOGITS[[0, 1, 2], [4, 4, 1]]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_the_log_of_the_odds():
    found = jax.nn.sigmoid(contrast(LOGITS, 2))
    np.testing.assert_allclose(found, jax.nn.softmax(LOGITS)[:, 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("target", "against", "error", "message"),
    [
        (5, None, ValueError, r"target 5 does not exist; there are 5 classes, 0 to 4 \(or -5 to"),
        (0, -6, ValueError, r"against -6 does not exist"),
        (1, 1, ValueError, r"a class is contrasted with itself; leave the target out of against="),
        (1, np.zeros(5, bool), ValueError, r"a class is contrasted with no other"),
        ("a", None, TypeError, r"target is the index of a class, got 'a'"),
        (1.0, None, TypeError, r"target is the index of a class, got 1.0"),
    ],
)
def test_classes_that_make_no_contrast(target, against, error, message):
    with pytest.raises(error, match=message):
        contrast(LOGITS, target, against)


def test_one_class_alone():
    with pytest.raises(ValueError, match="there is one class, and no other to contrast it with"):
        contrast(LOGITS[:, :1], 0)


# ---- explained

WEIGHTS = jnp.asarray(_rng.normal(size=(4, 6, 6)) / 6**0.5, jnp.float32)
HEAD = jnp.asarray(_rng.normal(size=(6, 5)), jnp.float32)
X = jnp.asarray(_rng.normal(size=(2, 4, 6)), jnp.float32)


def logits(x):
    q, k, v, mlp = (lambda y, w=w: y @ w for w in WEIGHTS)
    x = x + jax.nn.softmax(q(x) @ k(x).mT) @ v(x)
    return (x + nnx.relu(mlp(x)))[:, 0] @ HEAD


def test_gradients_are_linear_in_it():
    found = jaxrel.lrp(contrastive(logits, 1, against=3), jaxrel.rules.Gradient())(X)
    apart = jaxrel.lrp(logits, jaxrel.rules.Gradient())
    want = apart(X, target=1) - apart(X, target=3)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)  # float32


def test_lrp_gives_each_class_its_share():
    """Against one class and against all, as a seed by hand."""
    for against, others in ((3, [3]), (None, [0, 2, 3, 4])):
        found = jaxrel.lrp(contrastive(logits, 1, against), composites.attn_lrp())(X)
        out = logits(X)
        shares = jax.nn.softmax(out[:, jnp.asarray(others)])
        seed = jnp.zeros_like(out).at[:, jnp.asarray(others)].set(-shares)
        seed = seed.at[:, 1].set(1.0) * out
        want = jaxrel.lrp(logits, composites.attn_lrp())(X, seed=seed)
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)  # the stabiliser of a sum


def test_every_method_of_attention():
    explain = attention.relevance(contrastive(logits, 1), method=attention.METHODS)
    plain = attention.relevance(lambda x: logits(x)[:, 1], method=attention.METHODS)
    found, other = jax.jit(explain)(X), jax.jit(plain)(X)
    for name in attention.METHODS:
        assert np.isfinite(found[name]).all()
        same = np.allclose(found[name], other[name])
        assert same == (name in ("raw", "rollout")), name
    for i in range(len(X)):
        alone = explain(X[i : i + 1])
        np.testing.assert_allclose(alone["equal"][0], found["equal"][i], rtol=2e-5, atol=1e-6)
