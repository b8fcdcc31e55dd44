"""One function, however it is spelled, has one relevance; and what has no rule says so."""

import functools
import re

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import attention, composites, gradients
from jaxrel.propagation.rules import Epsilon, Gradient, SignalTakesAll

# Sums in another order, and an epsilon of 1e-13 beside sums of 1 or more.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EPS = 1e-13
RNG = np.random.default_rng(0)
X, WEIGHTS = RNG.normal(size=(2, 5, 6)), [RNG.normal(size=(6, 6)) * 0.4 for _ in range(4)]
CAUSAL = np.tril(np.ones((5, 5), bool))
ONES = np.ones((5, 1))
LOG2E = 1.4426950408889634


@pytest.fixture(autouse=True)
def _x64(x64):
    return


def top(s):
    return s.max(-1, keepdims=True)


def exp(s):
    return jnp.exp(s - lax.stop_gradient(top(s)))


def total(e):
    return e.sum(-1, keepdims=True)


def attend(softmax):
    def fun(x):
        weights = softmax(jnp.einsum("bqd,bkd->bqk", x @ WEIGHTS[0], x @ WEIGHTS[1]))
        mixed = jnp.einsum("bqk,bkd->bqd", weights, x @ WEIGHTS[2])
        return (x + mixed @ WEIGHTS[3]).sum((1, 2))

    return fun


def softmax(s):
    return jax.nn.softmax(s, -1)


SOFTMAXES = {
    "exp twice": lambda s: jnp.exp(s) / total(jnp.exp(s)),
    "exp twice, less the maximum": lambda s: jnp.exp(s - top(s)) / total(jnp.exp(s - top(s))),
    "less the maximum of all": lambda s: jnp.exp(s - s.max()) / total(jnp.exp(s - s.max())),
    "epsilon": lambda s: exp(s) / (total(exp(s)) + EPS),
    "at least epsilon": lambda s: exp(s) / jnp.maximum(total(exp(s)), EPS),
    "zero replaced": lambda s: exp(s) / jnp.where(total(exp(s)) == 0, 1.0, total(exp(s))),
    "reciprocal": lambda s: exp(s) * jnp.reciprocal(total(exp(s))),
    "times 1 / (sum + epsilon)": lambda s: exp(s) * (1 / (total(exp(s)) + EPS)),
    "times exp(-log(sum))": lambda s: exp(s) * jnp.exp(-jnp.log(total(exp(s)))),
    "exponent clipped": lambda s: _over_sum(jnp.exp(jnp.clip(s - top(s), -80, 0))),
    "scores clipped": lambda s: softmax(jnp.clip(s, -100, 100)),
    "result clipped": lambda s: jnp.clip(softmax(s), 1e-30, 1),
    "exp2": lambda s: _over_sum(jnp.exp2(s * LOG2E - top(s * LOG2E))),
    "expm1": lambda s: _over_sum(jnp.expm1(s) + 1),
    "2 ** s": lambda s: _over_sum(2.0 ** (s * LOG2E)),
    "e ** s": lambda s: _over_sum(jnp.power(np.e, s)),
    "@ ones": lambda s: exp(s) / (exp(s) @ jnp.ones((5, 1))),
    "@ ones from outside": lambda s: exp(s) / (exp(s) @ ONES),
    "einsum": lambda s: exp(s) / jnp.einsum("bqk->bq", exp(s))[..., None],
    "einsum with ones": lambda s: exp(s) / jnp.einsum("bqk,k->bq", exp(s), ONES[:, 0])[..., None],
    "mean": lambda s: exp(s) / (exp(s).mean(-1, keepdims=True) * 5),
    "last of a running sum": lambda s: exp(s) / jnp.cumsum(exp(s), -1)[..., -1:],
    "in two parts": lambda s: exp(s) / (total(exp(s)[..., :2]) + total(exp(s)[..., 2:])),
    "logsumexp by hand": lambda s: jnp.exp(s - (jnp.log(total(jnp.exp(s - top(s)))) + top(s))),
    "difference of logarithms": lambda s: jnp.exp(jnp.log(exp(s)) - jnp.log(total(exp(s)))),
    "normalised again": lambda s: _over_sum(softmax(s)),
    "sink beside the sum": lambda s: exp(s) / (total(exp(s)) + jnp.exp(-200 - top(s))),
    "sink as a key": lambda s: softmax(jnp.pad(s, [(0, 0)] * 2 + [(0, 1)], constant_values=-200.0))[
        ..., :-1
    ],
    "halves": lambda s: _over_sum(exp(s) * 0.5),
    "shifted": lambda s: softmax(s + 5.0),
    "one by one": jax.vmap(jax.vmap(lambda row: jnp.exp(row) / jnp.exp(row).sum())),
}


# The division comes after the product with the values, [batch, query, key] @ [batch, key, width].
LATE = {
    "sum": lambda s, v: (exp(s) @ v) / total(exp(s)),
    "reciprocal": lambda s, v: (exp(s) @ v) * (1 / (total(exp(s)) + EPS)),
    "einsum": lambda s, v: (
        jnp.einsum("bqk,bkd->bdq", exp(s), v) / exp(s).sum(-1)[:, None]
    ).swapaxes(1, 2),
    "values first": lambda s, v: (
        jnp.einsum("bkd,bkq->bqd", v, exp(s).swapaxes(1, 2)) / total(exp(s))
    ),
    "in a scan": lambda s, v: lax.scan(
        lambda c, s: (c, (exp(s) @ v) / total(exp(s))), 0.0, s[None]
    )[1][0],
    "rematerialised": lambda s, v: jax.checkpoint(lambda s, v: (exp(s) @ v) / total(exp(s)))(s, v),
}


def attend_late(product, mask):
    def fun(x):
        s = jnp.einsum("bqd,bkd->bqk", x @ WEIGHTS[0], x @ WEIGHTS[1])
        return (x + product(jnp.where(mask, s, -1e9), x @ WEIGHTS[2]) @ WEIGHTS[3]).sum((1, 2))

    return fun


@pytest.mark.parametrize("name", LATE)
def test_a_softmax_that_divides_after_the_product_with_the_values(name):
    late = attend_late(LATE[name], CAUSAL)
    plain = attend_late(lambda s, v: softmax(s) @ v, CAUSAL)
    for composite in (composites.attn_lrp(), composites.cp_lrp()):
        found, right = (jaxrel.lrp(f, composite)(X) for f in (late, plain))
        np.testing.assert_allclose(found, right, **CLOSE)
    explain = functools.partial(
        attention.relevance, method=("equal", "weighted"), target_token=None
    )
    found, right = (explain(f)(X) for f in (late, plain))
    for method in right:
        np.testing.assert_allclose(found[method], right[method], **CLOSE)


def test_a_product_that_is_read_elsewhere_is_divided_where_it_is():
    tagged = attend_late(lambda s, v: jaxrel.tag(exp(s) @ v, "sums") / total(exp(s)), CAUSAL)
    with pytest.raises(NotImplementedError, match="divides after the product with the values"):
        jaxrel.lrp(tagged, composites.attn_lrp())(X)
    with pytest.raises(NotImplementedError, match="is not recognised"):
        attention.relevance(tagged)(X)


def _over_sum(e):
    return e / total(e)


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        rules = {"attn_lrp": composites.attn_lrp(), "cp_lrp": composites.cp_lrp()}
        return {name: jaxrel.lrp(attend(softmax), rule)(X) for name, rule in rules.items()}


@pytest.mark.parametrize("composite", ["attn_lrp", "cp_lrp"])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_in_any_spelling(expected, name, composite):
    found = jaxrel.lrp(attend(SOFTMAXES[name]), getattr(composites, composite)())(X)
    np.testing.assert_allclose(found, expected[composite], **CLOSE)


def test_attention_maps_are_found_in_these_spellings():
    for name in (
        "exp twice",
        "epsilon",
        "reciprocal",
        "exp2",
        "@ ones",
        "normalised again",
        "result clipped",
        "sink as a key",
    ):
        (stack,) = attention.sites(attend(SOFTMAXES[name]))(X)
        assert stack.layers == 1, name


def test_a_softmax_that_is_masked_and_normalised_again_is_the_masked_softmax():
    again = attend(lambda s: _over_sum(softmax(s) * CAUSAL))
    once = attend(lambda s: softmax(jnp.where(CAUSAL, s, -jnp.inf)))
    for composite in (composites.attn_lrp(), composites.cp_lrp()):
        found, right = (jaxrel.lrp(f, composite)(X) for f in (again, once))
        np.testing.assert_allclose(found, right, **CLOSE)


def test_near_ties_do_not_explode():
    x = jnp.array([[5.0, 4.9999, 0.0]])
    weights = jnp.array([[1.0], [2.0], [3.0]])
    found = jaxrel.lrp(
        lambda x: _over_sum(jnp.exp(x @ jnp.eye(3))) @ weights, composites.attn_lrp(0.0)
    )(x)
    p = np.exp(np.asarray(x)) / np.exp(np.asarray(x)).sum()
    slope = p.T * (np.asarray(weights) - p @ np.asarray(weights))
    np.testing.assert_allclose(found, x * slope.T, rtol=1e-9)


def by_sum(s, ids):
    e = jnp.exp(s - jax.ops.segment_max(s, ids, 3)[ids])
    return e / jax.ops.segment_sum(e, ids, 3)[ids]


def by_reciprocal(s, ids):
    e = jnp.exp(s)
    return e * (1 / jax.ops.segment_sum(e, ids, 3))[ids]


def by_logarithm(s, ids):
    top = jax.ops.segment_max(s, ids, 3)
    return jnp.exp(s - (jnp.log(jax.ops.segment_sum(jnp.exp(s - top[ids]), ids, 3)) + top)[ids])


def graph_attention(shift, keep=lambda weights: weights, softmax=by_sum):
    senders, receivers = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 1, 2, 0])
    rng = np.random.default_rng(1)
    w, a, b = (rng.normal(size=shape) for shape in ((4, 4), 4, 4))

    def fun(x):
        h = x @ w
        s = jax.nn.leaky_relu((h @ a)[senders] + (h @ b)[receivers], 0.2) + shift
        weights = keep(softmax(s, receivers))
        return jax.ops.segment_sum(weights[:, None] * h[senders], receivers, 3)

    return fun


@pytest.mark.parametrize("softmax", [by_sum, by_reciprocal, by_logarithm])
def test_a_softmax_by_segment(softmax):
    x = jnp.asarray(RNG.normal(size=(3, 4)))
    constant = graph_attention(0.0, lax.stop_gradient)
    value, back = jax.vjp(constant, x)
    right = x * back(jnp.ones_like(value))[0]
    found = jaxrel.lrp(graph_attention(0.0, softmax=softmax), composites.cp_lrp(0.0))(x)
    np.testing.assert_allclose(found, right, **CLOSE)
    spelled = graph_attention(5.0, softmax=softmax), graph_attention(0.0)
    shifted = [jaxrel.lrp(fun, composites.attn_lrp(0.0))(x) for fun in spelled]
    np.testing.assert_allclose(*shifted, **CLOSE)


def test_what_only_looks_like_a_softmax():
    other = lambda x: jnp.exp(x @ WEIGHTS[0] - jax.nn.logsumexp(x @ WEIGHTS[1], -1, keepdims=True))
    with pytest.raises(NotImplementedError, match=r"activation \(.*no activation.*jax.nn.softmax"):
        jaxrel.lrp(other, composites.cp_lrp())(X)
    # Values that are multiplied before the division are no mask.
    pooled = lambda e, v: (e * v / e.sum(1, keepdims=True)).sum(1)
    with pytest.raises(NotImplementedError, match="if it is part of a softmax"):
        jaxrel.lrp(lambda x: pooled(jnp.exp(x @ WEIGHTS[0]), x @ WEIGHTS[1]), Epsilon())(X)


def test_logsumexp_passes_by_its_softmax():
    w = WEIGHTS[0]
    z = np.asarray(X[0] @ w)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    for logsumexp in (
        lambda z: jax.nn.logsumexp(z, -1),
        lambda z: jnp.log(jnp.exp(z).sum(-1)),
        lambda z: jnp.log(jnp.exp(z - top(z)).sum(-1)) + top(z)[..., 0],
    ):
        found = jaxrel.lrp(lambda x, f=logsumexp: f(x @ w), Epsilon(0.0))(X[0])
        np.testing.assert_allclose(found, X[0] * (p @ w.T), **CLOSE)
    seed = jnp.eye(6)[0]
    found = jaxrel.lrp(lambda x: jax.nn.log_softmax(x @ w), Epsilon(0.0))(
        X[0], seed=lambda z: z * seed
    )
    np.testing.assert_allclose(found, X[0] * ((np.asarray(seed) - p) @ w.T), **CLOSE)


SCORES = {
    "soft cap": lambda s: 5 * jnp.tanh(s / 5),
    "leaky relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("masked", [-1e9, -2.3819763e38, float(np.finfo("float32").min), -np.inf])
@pytest.mark.parametrize("name", SCORES)
def test_an_activation_of_scores_before_their_mask(name, masked, dtype):
    x = X.astype(dtype)

    def last(x, mask):
        q, k, v = (x @ w.astype(x.dtype) for w in WEIGHTS[:3])
        scores = SCORES[name](jnp.einsum("bqd,bkd->bqk", q, k))
        scores = jnp.where(CAUSAL, scores, masked) if mask else scores
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, -1), v)[:, 2]

    def alone(x):
        q, k, v = (x @ w.astype(x.dtype) for w in WEIGHTS[:3])
        scores = SCORES[name](jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, -1), v)[:, 2]

    found = jaxrel.lrp(lambda x: last(x, True), composites.attn_lrp())(x)
    # Token 2 sees the first three tokens alone.
    right = jaxrel.lrp(alone, composites.attn_lrp())(x[:, :3])
    close = CLOSE if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found[:, :3], right, **close)
    np.testing.assert_array_equal(found[:, 3:], 0)


GATES = {
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "clip": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),
    "exp": lambda x: 1 / (1 + jnp.exp(-x)),
    "exp twice": lambda x: jnp.exp(x) / (1 + jnp.exp(x)),
    "tanh": lambda x: 0.5 * jnp.tanh(x / 2) + 0.5,
    "one less": lambda x: 1 - jax.nn.sigmoid(x),
}


@pytest.mark.parametrize("name", GATES)
def test_relevance_passes_every_spelling_of_a_sigmoid_unchanged(name):
    x = jnp.array([[-2.2, -2.0, -0.5, 0.5, 1.0, 4.0]])
    found = jaxrel.lrp(GATES[name], Epsilon())(x, seed=jnp.ones_like(x))
    np.testing.assert_allclose(found, 1.0, rtol=1e-12)
    # Behind a linear map its number is no bias of that.
    w = np.diag([1.0, -2.0, 3.0, 0.5, 1.5, 2.0])
    found = jaxrel.lrp(lambda x: GATES[name](x @ w), Epsilon(0.0))(x)
    np.testing.assert_allclose(found, GATES[name](x @ w), rtol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_a_sigmoid_in_any_spelling_is_a_gate(name):
    fun = lambda x: GATES[name](x @ WEIGHTS[0]) * (x @ WEIGHTS[1])
    rules = [(jaxrel.op("product"), SignalTakesAll()), (jaxrel.everything(), Epsilon(0.0))]
    found = jaxrel.lrp(fun, rules)(X)
    constant = GATES[name](jnp.asarray(X) @ WEIGHTS[0])
    np.testing.assert_allclose(found, X * (constant @ WEIGHTS[1].T), **CLOSE)


TANH = lambda g: jnp.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
# Gated units with the activation's factors apart, and the activation.
UNITS = {
    "h * 0.5 * g * (1 + tanh)": (lambda h, g: h * 0.5 * g * (1 + TANH(g)), jax.nn.gelu),
    "g * h * 0.5 * (1 + tanh)": (lambda h, g: g * h * 0.5 * (1 + TANH(g)), jax.nn.gelu),
    "h * g * sigmoid": (lambda h, g: h * g * jax.nn.sigmoid(g), jax.nn.silu),
    "sigmoid * (g * h)": (lambda h, g: jax.nn.sigmoid(g) * (g * h), jax.nn.silu),
    "h * g / (1 + exp)": (lambda h, g: h * g / (1 + jnp.exp(-g)), jax.nn.silu),
    "h * g * relu6": (lambda h, g: h * g * jax.nn.relu6(g + 3) / 6, jax.nn.hard_swish),
    "twice relu": (lambda h, g: h * jax.nn.relu(g) * jax.nn.relu(g), lambda g: jax.nn.relu(g) ** 2),
    "einsum": (lambda h, g: jnp.einsum("btd,btd->btd", h, jax.nn.silu(g)), jax.nn.silu),
}


@pytest.mark.parametrize("name", UNITS)
def test_a_gated_unit_whose_factors_are_in_any_order(name):
    spelled, activation = UNITS[name]
    units = (spelled, lambda h, g: h * activation(g))
    # In a scan too.
    funs = [
        lambda x, f=f: lax.scan(lambda h, w: (f(h @ w, x @ WEIGHTS[1]), None), x, WEIGHTS[2][None])[
            0
        ]
        for f in units
    ]
    for rules in (composites.attn_lrp(), composites.cp_lrp(), composites.captioning()):
        found, right = (jaxrel.lrp(f, rules)(X) for f in funs)
        np.testing.assert_allclose(found, right, **CLOSE)
    found, right = (gradients.guided_backprop(f)(X) for f in funs)
    np.testing.assert_allclose(found, right, **CLOSE)


def test_a_gated_unit_by_hand():
    """Half of relevance to each factor, and the activation's half passes it unchanged."""
    h, g = X @ WEIGHTS[0], X @ WEIGHTS[1]
    out = h * g / (1 + np.exp(-g))
    right = X * ((out / 2 / h) @ WEIGHTS[0].T + (out / 2 / g) @ WEIGHTS[1].T)
    fun = lambda x: (x @ WEIGHTS[0]) * (x @ WEIGHTS[1]) * jax.nn.sigmoid(x @ WEIGHTS[1])
    found = jaxrel.lrp(fun, composites.attn_lrp(0.0))(X)
    np.testing.assert_allclose(found, right, **CLOSE)


def test_a_factor_that_is_tagged_stays_where_it_is():
    def fun(x):
        return jaxrel.tag((x @ WEIGHTS[0]) * (x @ WEIGHTS[1]), "both") * jax.nn.sigmoid(
            x @ WEIGHTS[1]
        )

    _, at = jaxrel.lrp(fun, composites.attn_lrp(0.0), at="both")(X)
    both = (X @ WEIGHTS[0]) * (X @ WEIGHTS[1])
    np.testing.assert_allclose(at["both"], both / (1 + np.exp(-X @ WEIGHTS[1])) / 2, **CLOSE)


# Where what a gate and a signal are made of stands in one array: of six gates, and of two of three.
CUTS = {
    "slice": lambda gate, x: gate(x)[:, 3:],
    "split": lambda gate, x: jnp.split(gate(x), 2, axis=-1)[1],
    "unstack": lambda gate, x: jnp.unstack(gate(x).reshape(-1, 2, 3), axis=1)[1],
    "concatenate": lambda gate, x: jnp.concatenate([gate(x[:, 3:4]), gate(x[:, 4:])], axis=-1),
    "stack": lambda gate, x: jnp.stack([gate(x[:, i]) for i in (3, 4, 5)], axis=-1),
    "where": lambda gate, x: jnp.where(jnp.arange(3) == 1, gate(x[:, 3:]), gate(2 * x[:, 3:])),
    "one less": lambda gate, x: 1 - jnp.split(gate(x), 2, axis=-1)[1],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["sigmoid", *GATES])
def test_a_gate_stays_one_where_it_is_cut_out(name, cut):
    """As in a GRU whose two gates are one sigmoid."""
    gate = GATES.get(name, jax.nn.sigmoid)
    fun = lambda x: CUTS[cut](gate, x @ WEIGHTS[0]) * (x @ WEIGHTS[1])[:, :3]
    rules = [(jaxrel.op("product"), SignalTakesAll()), (jaxrel.everything(), Epsilon(0.0))]
    x = X[0]
    constant = CUTS[cut](gate, jnp.asarray(x @ WEIGHTS[0]))
    expected = x * (constant @ WEIGHTS[1][:, :3].T)
    np.testing.assert_allclose(jaxrel.lrp(fun, rules)(x), expected, **CLOSE)


@pytest.mark.parametrize(
    "f",
    [
        jnp.exp,
        jnp.cos,
        lambda x: jnp.exp(-((x - np.arange(6.0)) ** 2)),
        lambda x: 1 / (1 + x * x),
        lambda x: jnp.log(jnp.abs(x)),
        lambda x: jnp.sqrt(jnp.abs(x) + 1),
        lambda x: jnp.exp(x) + 1,
        lambda x: jnp.where(x >= 0, x, np.finfo("float32").min),
        lambda x: jnp.where(x > 0, x, -np.inf),
        jax.nn.softplus,
        jax.nn.log_sigmoid,
        lambda x: jnp.log(1 + jnp.exp(2 * x)),
    ],
    ids=[
        *("exp", "cos", "rbf", "cauchy", "log", "sqrt", "exp + 1", "threshold", "infinite"),
        *("softplus", "log_sigmoid", "softplus by hand"),
    ],
)
def test_what_is_no_activation_is_named_and_its_advice_is_the_derivative(f):
    fun = lambda x: f(x @ WEIGHTS[0])
    with pytest.raises(NotImplementedError, match=r"no activation \(not 0 at 0") as error:
        jaxrel.lrp(fun, Epsilon(0.0))(X)
    (name,) = re.findall(r"jaxrel.op\('(.*?)'\)", str(error.value))
    rules = [(jaxrel.op(name), Gradient()), (jaxrel.everything(), Epsilon(0.0))]
    # A linear map's bias, the centres, keep their share of what is left.
    slope = jax.grad(lambda x: fun(x).sum())(X)
    np.testing.assert_allclose(jaxrel.lrp(fun, rules)(X), X * slope, rtol=1e-7, atol=1e-9)


def test_a_number_added_after_an_activation_is_no_part_of_it():
    w = WEIGHTS[0]
    plain, more = (
        jaxrel.lrp(lambda x, a=a: (jax.nn.leaky_relu(x @ w) + a) * 1.0, Gradient())(X)
        for a in (0.0, 5.0)
    )
    np.testing.assert_allclose(plain, more, **CLOSE)


def _norms():
    squares = lambda h: (h * h).sum(-1, keepdims=True)
    size = lambda h: jnp.linalg.norm(h, axis=-1, keepdims=True)
    rows, zeros = np.arange(60) // 6, np.zeros(6, int)
    by_row = lambda h: jax.ops.segment_sum((h * h).ravel(), rows, 10)
    return {
        "einsum": lambda h: h / jnp.sqrt(jnp.einsum("bti,bti->bt", h, h)[..., None]),
        "vdot": jax.vmap(jax.vmap(lambda h: h / jnp.sqrt(jnp.vdot(h, h)))),
        "matmul": lambda h: h / jnp.sqrt((h[..., None, :] @ h[..., None])[..., 0]),
        "@ ones": lambda h: h / jnp.sqrt((h * h) @ jnp.ones((6, 1))),
        "norm": lambda h: h / size(h),
        "at least epsilon": lambda h: h / jnp.maximum(size(h), EPS),
        "squares at least epsilon": lambda h: h * lax.rsqrt(jnp.maximum(squares(h), EPS)),
        "epsilon": lambda h: h / (jnp.sqrt(squares(h)) + EPS),
        "power": lambda h: h * squares(h) ** -0.5,
        "reciprocal": lambda h: h * (1 / jnp.sqrt(squares(h))),
        "last of a running sum": lambda h: h / jnp.sqrt(jnp.cumsum(h * h, -1)[..., -1:]),
        "by segment": lambda h: h / jnp.sqrt(by_row(h)[rows]).reshape(h.shape),
        "by segment, picked before": lambda h: h * lax.rsqrt(by_row(h)[rows].reshape(h.shape)),
        "picked": lambda h: h / size(h)[..., zeros],
        "side by side": lambda h: h / jnp.concatenate([size(h)] * 6, -1),
        "in two halves": lambda h: jnp.concatenate(
            [h[i : i + 1] / size for i, size in enumerate(jnp.split(size(h), 2))]
        ),
        "moved squares": lambda h: (
            h * lax.rsqrt((h * h).reshape(2, 5, 2, 3).sum((2, 3))[..., None])
        ),
        "logarithm": lambda h: h / jnp.exp(0.5 * jnp.log(squares(h))),
        "logarithm, reciprocal": lambda h: h * jnp.exp(jnp.log(squares(h)) / -2),
    }


@pytest.mark.parametrize("name", _norms())
def test_a_norm_in_any_spelling(name):
    fun = lambda norm: lambda x: norm(x @ WEIGHTS[0]) @ WEIGHTS[1]
    plain = fun(lambda h: h * lax.rsqrt((h * h).sum(-1, keepdims=True)))
    spelled = fun(_norms()[name])
    found, right = (jaxrel.lrp(f, composites.attn_lrp())(X) for f in (spelled, plain))
    np.testing.assert_allclose(found, right, **CLOSE)
    # There is no activation in it.
    guided, slope = gradients.guided_backprop(spelled)(X), gradients.gradient(spelled)(X)
    np.testing.assert_allclose(guided, slope, **CLOSE)


@pytest.mark.parametrize(
    "scaling",
    [
        lambda x, h: h * (jnp.abs(x).sum(-1, keepdims=True) > 0),
        lambda x, h: jnp.where(jnp.abs(x).sum(-1, keepdims=True) > 0, h, 0.0),
        lambda x, h: h * (x.sum(-1) > 0)[..., None].astype(h.dtype),
        lambda x, h: (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3),
        lambda x, h: h * lax.stop_gradient(jnp.tanh(x)),
        lambda x, h: h * jnp.sign(jnp.abs(x).sum(-1, keepdims=True)),
        lambda x, h: h * jnp.minimum(jnp.ceil(jnp.abs(x).sum(-1, keepdims=True)), 1),
    ],
    ids=[
        *("padding", "padding by where", "padding by cast", "std + epsilon", "constant"),
        *("padding by sign", "padding by ceil"),
    ],
)
def test_scalings_and_masks_are_no_activations(scaling):
    x = jnp.asarray(X).at[1, 3:].set(0.0)
    fun = lambda x: scaling(x, x @ WEIGHTS[0]) @ WEIGHTS[1]
    slope = gradients.gradient(fun)(x)
    for method in (gradients.guided_backprop, gradients.deconvnet):
        np.testing.assert_allclose(method(fun)(x), slope, **CLOSE)
