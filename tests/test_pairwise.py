"""Relevance of pairs: BiLRP feature by feature, second derivatives, and their sums."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import pairwise_relevance

_rng = np.random.default_rng(0)
FEATURES = 4
W = [_rng.normal(size=shape) for shape in ((3, 5), (5, FEATURES), (2, 5), (5, FEATURES))]
X, Y = _rng.normal(size=(2, 6, 3)), _rng.normal(size=(2, 4, 2))
AT = ("x", "y")
# No bias and a stabiliser that does not count: LRP conserves.
EXACT = jaxrel.rules.Epsilon(1e-12)


def embed(x, name, first, second):
    x = jaxrel.tag(x, name)
    return jnp.maximum(x @ first, 0).mean(axis=1) @ second


def one(x):
    return embed(x, "x", W[0], W[1])


def other(y):
    return embed(y, "y", W[2], W[3])


@pytest.fixture
def inputs(x64):
    return jnp.asarray(X), jnp.asarray(Y)


def pairs(x, y, **options):
    return jax.jit(pairwise_relevance(one, other, at=AT, **options))((x,), (y,))


def feature_by_feature(x, y, rules):
    """BiLRP as it is defined: the product of the relevance of each feature on both sides."""
    found = np.zeros((2, 6, 4))
    for e in range(FEATURES):
        sides = [
            jaxrel.lrp(lambda z, f=f: f(z)[:, e], rules, argnums=None, at=(name,))(z)[name].sum(-1)  # noqa: B023
            for f, name, z in ((one, "x", x), (other, "y", y))
        ]
        for b in range(2):
            for i in range(6):
                for j in range(4):
                    found[b, i, j] += sides[0][b, i] * sides[1][b, j]
    return found


def test_bilrp_is_its_definition(inputs):
    score, found = pairs(*inputs, lrp=EXACT)
    np.testing.assert_allclose(score, (one(inputs[0]) * other(inputs[1])).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found, feature_by_feature(*inputs, EXACT), rtol=1e-8, atol=1e-12)


def test_it_sums_to_the_score(inputs):
    score, found = pairs(*inputs, lrp=EXACT)
    np.testing.assert_allclose(found.sum((1, 2)), score, rtol=1e-8)  # the stabiliser, 1e-12


def test_input_x_gradient_is_the_second_derivative(inputs):
    """x_i d2(score)/(dx_i dy_j) y_j, summed over the features of both tokens."""
    x, y = inputs
    _, found = pairs(x, y, method="input_x_gradient")
    for b in range(2):
        score = lambda x, y: (one(x[None]) * other(y[None])).sum()
        second = jax.jacobian(jax.grad(score), argnums=1)(x[b], y[b])
        want = np.zeros((6, 4))
        for i in range(6):
            for j in range(4):
                want[i, j] = np.asarray(x[b, i] @ second[i, :, j] @ y[b, j])
        np.testing.assert_allclose(found[b], want, rtol=1e-10, atol=1e-14)


def bent(x, name, scale):
    """An embedding that no gradient at one point describes."""
    return jnp.tanh(jaxrel.tag(x, name) @ scale).mean(axis=1) @ W[1]


def test_integrated_gradients_are_their_definition(inputs):
    """(x_i - a_i) J^T K (y_j - b_j), the Jacobians averaged over the middles of the steps."""
    x, y = inputs
    starts, steps = (0.3, -0.2), 5
    sides = [(lambda x: bent(x, "x", W[0]), x), (lambda y: bent(y, "y", W[2]), y)]
    each = []
    for (fun, value), start in zip(sides, starts, strict=True):
        way = value - start
        points = [start + (n + 0.5) / steps * way for n in range(steps)]
        # [batch, features, tokens]; an example's embedding depends on its own tokens alone.
        jacobian = [
            sum(jax.jacobian(lambda z: fun(z[None])[0])(p[b]) for p in points) / steps  # noqa: B023
            for b in range(2)
        ]
        each.append(np.einsum("beiw,biw->bei", np.stack(jacobian), way))
    explain = pairwise_relevance(
        *(fun for fun, _ in sides),
        at=AT,
        method="integrated_gradients",
        steps=steps,
        baseline=starts,
    )
    score, found = jax.jit(explain)((x,), (y,))
    np.testing.assert_allclose(score, (sides[0][0](x) * sides[1][0](y)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found, np.einsum("bei,bej->bij", *each), rtol=1e-10, atol=1e-14)


def test_integrated_gradients_are_complete(inputs):
    """They sum to the score, less those with one baseline, plus that of the two."""
    x, y = inputs
    one, other = lambda x: bent(x, "x", W[0]), lambda y: bent(y, "y", W[2])
    explain = pairwise_relevance(
        one, other, at=AT, method="integrated_gradients", steps=64, baseline=(0.3, -0.2)
    )
    _, found = jax.jit(explain)((x,), (y,))
    change = one(x) - one(jnp.full_like(x, 0.3)), other(y) - other(jnp.full_like(y, -0.2))
    want = (change[0] * change[1]).sum(-1)
    # 64 steps are off by 2e-4 at most; other baselines would be, by 8% and more.
    np.testing.assert_allclose(found.sum((1, 2)), want, rtol=1e-3)


def test_integrated_gradients_of_linear_embeddings_are_input_x_gradient(inputs):
    x, y = inputs
    sides = [
        lambda x: (jaxrel.tag(x, "x") @ W[0]).mean(1) @ W[1],
        lambda y: (jaxrel.tag(y, "y") @ W[2]).mean(1) @ W[1],
    ]
    found = [
        pairwise_relevance(*sides, at=AT, method=method)((x,), (y,))[1]
        for method in ("integrated_gradients", "input_x_gradient")
    ]
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_some_at_a_time_batches_and_vmap(inputs):
    x, y = inputs
    _, found = pairs(x, y)
    _, some = pairs(x, y, at_once=3)
    np.testing.assert_allclose(some, found, rtol=1e-12)
    for b in range(2):
        _, alone = pairs(x[b : b + 1], y[b : b + 1])
        np.testing.assert_allclose(alone[0], found[b], rtol=1e-12)
    _, mapped = jax.vmap(lambda x, y: pairs(x[None], y[None]))(x, y)
    np.testing.assert_allclose(mapped[:, 0], found, rtol=1e-12)


def test_what_is_wrong():
    with pytest.raises(
        ValueError, match="unknown method 'equal'; there are lrp, input_x_gradient, i"
    ):
        pairwise_relevance(one, other, at=AT, method="equal")
    with pytest.raises(ValueError, match="at_once must be 1 or more, got 0"):
        pairwise_relevance(one, other, at=AT, at_once=0)
    with pytest.raises(ValueError, match=r"baseline must be a pair, .* got \(0\.5,\)"):
        pairwise_relevance(one, other, at=AT, method="integrated_gradients", baseline=(0.5,))
    short = pairwise_relevance(one, lambda y: other(y)[:, :3], at=AT)
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 4\) and \(2, 3\)"):
        short((jnp.asarray(X, jnp.float32),), (jnp.asarray(Y, jnp.float32),))
