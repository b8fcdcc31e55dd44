"""`lrp` on what JAX programs are made of: every construct keeps the gradient and the relevance."""

import functools

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxrel
from jaxrel import composites
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Pass,
    SignalTakesAll,
    Stop,
    WSquare,
    ZBox,
    ZPlus,
)

RULES = nnx.Rngs(0)
W42 = np.ones((4, 2), np.float32)
F64 = {"rngs": RULES, "param_dtype": jnp.float64}
BARE = F64 | {"use_bias": False}


def normal(*shape):
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return jax.random.normal(jax.random.key(sum(shape) + len(shape)), shape, dtype)


def module(make):
    model = make()
    return (lambda model, x: model(x)), model


def raw(fun, *shape):
    return fun, normal(*shape)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs, use_bias=False, param_dtype=jnp.float64)

    def __call__(self, x):
        return x + jax.nn.silu(self.fc(x))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return forward(x, self.blocks)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.relu(linen.Dense(4, use_bias=False, param_dtype=jnp.float64)(x)), None


class LinenStack(linen.Module):
    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            linen.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned()(x, None)
        return linen.LayerNorm(use_bias=False, param_dtype=jnp.float64)(x)


def linen_case(model, *shape):
    return model.apply, model.init(jax.random.key(0), normal(*shape))


@jax.custom_vjp
def tanh_by_hand(x):
    return jnp.tanh(x)


tanh_by_hand.defvjp(lambda x: (jnp.tanh(x), x), lambda x, c: (c * (1 - jnp.tanh(x) ** 2),))


@jax.custom_jvp
def gelu_by_hand(x):
    return x * jax.nn.sigmoid(1.702 * x)


gelu_by_hand.defjvp(lambda p, t: jax.jvp(lambda x: x * jax.nn.sigmoid(1.702 * x), p, t))


def last(cell, x):
    """The last output of a recurrent cell that starts at zero."""
    state = jnp.zeros((len(x), cell.hidden_features))
    state = state if isinstance(cell, nnx.GRUCell) else (state, state)
    return lax.scan(lambda state, x: cell(state, x), state, x.swapaxes(0, 1))[1][-1]


def batch_norm(scale, x):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * scale


def conv1(x, w):
    return lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


# name: (make (fun, params), shape of x, what Epsilon(1e-12) with constant gates keeps)
KEEPS, LOSES = True, False
CONSTRUCTS = {
    "linear": (lambda: module(lambda: nnx.Linear(4, 3, **BARE)), (2, 4), KEEPS),
    "linear with bias": (lambda: module(lambda: nnx.Linear(4, 3, **F64)), (2, 4), KEEPS),
    "general": (
        lambda: module(lambda: nnx.LinearGeneral((4, 5), (2, 3), axis=(1, 2), **BARE)),
        (2, 4, 5),
        KEEPS,
    ),
    "einsum": (
        lambda: module(lambda: nnx.Einsum("abc,cd->abd", (4, 3), None, **F64)),
        (2, 3, 4),
        KEEPS,
    ),
    "kernel first": (lambda: raw(lambda w, x: (w @ x.T).T, 3, 4), (2, 4), KEEPS),
    "transposed conv": (
        lambda: module(lambda: nnx.ConvTranspose(3, 4, (3, 3), strides=(2, 2), **BARE)),
        (2, 6, 6, 3),
        KEEPS,
    ),
    "grouped conv": (
        lambda: module(lambda: nnx.Conv(4, 4, (3,), feature_group_count=2, strides=2, **BARE)),
        (2, 8, 4),
        KEEPS,
    ),
    "circular conv": (
        lambda: module(lambda: nnx.Conv(4, 4, (3, 3), padding="CIRCULAR", **BARE)),
        (2, 6, 6, 4),
        KEEPS,
    ),
    "vmapped conv": (
        lambda: raw(lambda w, x: jax.vmap(lambda x: conv1(x, w))(x), 3, 3, 3, 4),
        (2, 6, 6, 3),
        KEEPS,
    ),
    "attention": (
        lambda: module(lambda: nnx.MultiHeadAttention(2, 8, decode=False, **BARE)),
        (2, 5, 8),
        LOSES,
    ),
    "dot_product_attention": (
        lambda: raw(
            lambda w, x: jax.nn.dot_product_attention(
                *[(x @ w).reshape(2, 3, 2, 2)] * 3, is_causal=True
            ),
            4,
            4,
        ),
        (2, 3, 4),
        LOSES,
    ),
    "layer norm": (
        lambda: module(lambda: nnx.LayerNorm(8, use_bias=False, rngs=RULES)),
        (2, 5, 8),
        KEEPS,
    ),
    "rms norm": (lambda: module(lambda: nnx.RMSNorm(8, rngs=RULES)), (2, 5, 8), KEEPS),
    "group norm": (
        lambda: module(lambda: nnx.GroupNorm(8, 2, use_bias=False, rngs=RULES)),
        (2, 5, 8),
        KEEPS,
    ),
    "batch norm by batch": (lambda: raw(batch_norm, 4), (6, 4), KEEPS),
    "scan of remat (nnx)": (lambda: module(lambda: Stack(RULES)), (3, 4), KEEPS),
    "scan of remat (linen)": (lambda: linen_case(LinenStack(), 2, 4), (2, 4), KEEPS),
    "linen attention": (
        lambda: linen_case(
            linen.MultiHeadDotProductAttention(
                num_heads=2, use_bias=False, param_dtype=jnp.float64
            ),
            2,
            3,
            4,
        ),
        (2, 3, 4),
        LOSES,
    ),
    "lstm": (
        lambda: (last, nnx.OptimizedLSTMCell(4, 5, **F64)),
        (2, 6, 4),
        KEEPS,
    ),
    "gru": (lambda: (last, nnx.GRUCell(4, 5, **F64)), (2, 6, 4), KEEPS),
    "linen rnn": (
        lambda: linen_case(linen.RNN(linen.OptimizedLSTMCell(5, param_dtype=jnp.float64)), 2, 3, 4),
        (2, 3, 4),
        KEEPS,
    ),
    "jit inside": (
        lambda: raw(lambda w, x: jax.jit(lambda x: jax.nn.relu(x @ w))(x), 4, 3),
        (2, 4),
        KEEPS,
    ),
    "vmap inside": (
        lambda: raw(lambda w, x: jax.vmap(lambda x: jax.nn.gelu(x @ w))(x), 4, 3),
        (2, 4),
        KEEPS,
    ),
    "ensemble by vmap": (
        lambda: raw(lambda w, x: jax.vmap(lambda w: jax.nn.relu(x @ w))(w).sum(0), 5, 4, 3),
        (2, 4),
        KEEPS,
    ),
    "cond": (
        lambda: raw(
            lambda w, x: lax.cond(w.sum() > 0, lambda x: jax.nn.relu(x @ w), lambda x: x @ w, x),
            4,
            4,
        ),
        (2, 4),
        KEEPS,
    ),
    "fori_loop": (
        lambda: raw(lambda w, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "while without relevance": (
        lambda: raw(
            lambda w, x: (x * lax.while_loop(lambda c: c < 3.0, lambda c: c + 1.0, 0.0)) @ w,
            4,
            4,
        ),
        (2, 4),
        KEEPS,
    ),
    "custom_vjp": (lambda: raw(lambda w, x: tanh_by_hand(x @ w), 4, 4), (2, 4), KEEPS),
    "custom_jvp": (lambda: raw(lambda w, x: gelu_by_hand(x @ w), 4, 4), (2, 4), KEEPS),
    "checkpoint_name": (
        lambda: raw(lambda w, x: jnp.tanh(checkpoint_name(x @ w, "h")), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "reduce_max": (lambda: raw(lambda w, x: (x @ w).max(-1), 4, 4), (2, 4), KEEPS),
    "prod": (lambda: raw(lambda w, x: (x @ w).prod(-1), 4, 4), (2, 4), KEEPS),
    "top_k": (lambda: raw(lambda w, x: lax.top_k(x @ w, 2)[0], 4, 4), (2, 4), KEEPS),
    "sort": (lambda: raw(lambda w, x: jnp.sort(x @ w, -1), 4, 4), (2, 4), KEEPS),
    "cumsum": (lambda: raw(lambda w, x: jnp.cumsum(x @ w, -1), 4, 4), (2, 4), KEEPS),
    "l2 norm": (
        lambda: raw(lambda w, x: x @ w / jnp.linalg.norm(x @ w, axis=-1, keepdims=True), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "cosine": (
        lambda: raw(
            lambda w, x: ((x @ w) / jnp.linalg.norm(x @ w, axis=-1, keepdims=True)) @ w[0], 4, 4
        ),
        (2, 4),
        KEEPS,
    ),
    "norm as output": (
        lambda: raw(lambda w, x: jnp.linalg.norm(x @ w, axis=-1), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "weight norm": (
        lambda: raw(lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "outer product": (
        lambda: raw(lambda w, x: jnp.einsum("bi,bj->bij", x @ w, x @ w), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "take": (
        lambda: raw(lambda w, x: jnp.take(x @ w, np.array([0, 2]), axis=1), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "scatter": (
        lambda: raw(lambda w, x: jnp.zeros((2, 8)).at[:, np.array([1, 3, 5, 7])].add(x @ w), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "update slice": (
        lambda: raw(lambda w, x: lax.dynamic_update_slice(jnp.zeros((4, 4)), x @ w, (1, 0)), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "quotient": (
        lambda: raw(lambda w, x: (x @ w) / (jnp.exp(x @ w.T) + 1), 4, 4),
        (2, 4),
        LOSES,
    ),
    "where": (
        lambda: raw(lambda w, x: jnp.where(x @ w > 0, x @ w, 0.1 * (x @ w)), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "resize": (
        lambda: raw(lambda w, x: jax.image.resize(x @ w, (2, 5), "bilinear"), 4, 4),
        (2, 4),
        KEEPS,
    ),
    "residual with bias": (
        lambda: raw(lambda w, x: x + jnp.tanh(x) @ w + w[0], 4, 4),
        (2, 4),
        KEEPS,
    ),
    "average pool": (
        lambda: raw(lambda w, x: nnx.avg_pool(x, (2, 2), (2, 2)) @ w, 3, 4),
        (2, 4, 4, 3),
        KEEPS,
    ),
}
for name in (
    "relu gelu silu elu leaky_relu tanh hard_swish mish selu celu relu6 soft_sign hard_tanh glu"
).split():
    CONSTRUCTS[name] = (
        lambda name=name: raw(lambda w, x: getattr(jax.nn, name)(x @ w), 4, 6),
        (2, 4),
        KEEPS,
    )

KEEPING = jaxrel.Composite(
    [
        (jaxrel.op("product"), SignalTakesAll()),
        (jaxrel.op("dense", "conv"), Epsilon(1e-12, bias="ignored")),
    ]
)


@pytest.fixture(params=CONSTRUCTS)
def construct(request, x64):
    make, shape, keeps = CONSTRUCTS[request.param]
    fun, params = make()
    return fun, params, normal(*shape), keeps


def test_gradient_everywhere_is_the_gradient(construct):
    fun, params, x, _ = construct
    found = jax.jit(jaxrel.lrp(fun, Gradient(), argnums=1))(params, x)
    # By way of its jaxpr: modules that scan refuse to be closed over by grad.
    closed, leaves = jax.make_jaxpr(fun)(params, x), jax.tree.leaves(params)
    plain = lambda x: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves, x)[0].sum()
    expected = x * jax.jit(jax.grad(plain))(x)
    # The same operations in the same order; XLA may fuse the last product differently.
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


def test_the_value_is_the_functions(construct):
    fun, params, x, _ = construct
    value, _ = jax.jit(jaxrel.value_and_lrp(fun, KEEPING, argnums=1))(params, x)
    # Rules may take additions in another order.
    np.testing.assert_allclose(value, jax.jit(fun)(params, x), rtol=1e-13, atol=1e-13)


def test_relevance_is_kept(construct):
    fun, params, x, keeps = construct
    value, found = jax.jit(jaxrel.value_and_lrp(fun, KEEPING, argnums=1))(params, x)
    assert jnp.all(jnp.isfinite(found))
    if keeps:
        # What epsilon = 1e-12 takes from sums that nearly cancel.
        np.testing.assert_allclose(found.sum(), value.sum(), rtol=1e-7, atol=1e-8)


# Seeds, arguments, places.


def dense(params, x):
    hidden = jaxrel.tag(jax.nn.relu(x @ params["w1"] + params["b1"]), "hidden")
    return hidden @ params["w2"]


def dense_params():
    return {"w1": normal(4, 6), "b1": normal(6), "w2": normal(6, 3)}


def test_a_seed_is_the_relevance_of_the_output(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jax.jit(jaxrel.lrp(dense, Epsilon(1e-12, bias="ignored"), argnums=1))
    seed = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0]])
    relevance = explain(params, x, seed=seed)
    # Rounding, and epsilon.
    np.testing.assert_allclose(relevance.sum(1), seed.sum(1), rtol=1e-8)
    both = explain(params, x, seed=seed + 1) - explain(params, x, seed=jnp.ones((2, 3)))
    np.testing.assert_allclose(both, relevance, rtol=1e-9, atol=1e-9)


def test_a_seed_may_be_a_function_of_the_output(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, Epsilon(), argnums=1)
    contrast = lambda out: out.at[:, 1].multiply(-1.0).at[:, 2].set(0.0)
    np.testing.assert_array_equal(
        explain(params, x, seed=contrast), explain(params, x, seed=contrast(dense(params, x)))
    )


def test_many_targets_by_vmap(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, ZPlus(), argnums=1)
    seeds = jnp.eye(3)[:, None] * dense(params, x)
    together = jax.vmap(lambda seed: explain(params, x, seed=seed))(seeds)
    for seed, one in zip(seeds, together, strict=True):
        np.testing.assert_allclose(one, explain(params, x, seed=seed), rtol=1e-13, atol=1e-15)


def test_modules_and_closures_name_their_parameters():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3))
    rules = [(jaxrel.path("kernel"), Epsilon())]
    expected = jaxrel.lrp(lambda m, x: m(x), rules, argnums=1)(model, x)
    for fun in (model, model.__call__, lambda x: model(x), functools.partial(model)):
        np.testing.assert_array_equal(jaxrel.lrp(fun, rules)(x), expected)
        assert jaxrel.plan(fun, rules)(x)[0].paths == ("kernel",)


def test_several_arguments_and_structures(x64):
    params = dense_params()
    x = {"a": normal(2, 4), "b": (normal(2, 4), jnp.arange(3))}

    def fun(params, x, y):
        return dense(params, x["a"] * y + x["b"][0])

    found, of_y = jaxrel.lrp(fun, Epsilon(), argnums=(1, 2))(params, x, jnp.float64(2.0))
    assert jax.tree.structure(found) == jax.tree.structure(x)
    assert found["b"][0].shape == (2, 4)
    assert not found["b"][1].any()
    assert of_y.shape == ()


def test_aux_is_passed_through(x64):
    params, x = dense_params(), normal(2, 4)

    def fun(params, x):
        out = dense(params, x)
        return out, {"twice": 2 * out, "shape": out.shape[0]}

    plain = jaxrel.lrp(dense, Epsilon(), argnums=1)(params, x)
    relevance, aux = jaxrel.lrp(fun, Epsilon(), argnums=1, has_aux=True)(params, x)
    np.testing.assert_array_equal(relevance, plain)
    np.testing.assert_array_equal(aux["twice"], 2 * dense(params, x))
    (value, aux), _ = jaxrel.value_and_lrp(fun, Epsilon(), argnums=1, has_aux=True)(params, x)
    np.testing.assert_array_equal(value * 2, aux["twice"])


def test_relevance_at_a_tag_is_kept_between_layers(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, Epsilon(1e-12, bias="ignored"), argnums=1, at="hidden")
    relevance, places = explain(params, x)
    assert places["hidden"].shape == (2, 6)
    # Epsilon 1e-12.
    np.testing.assert_allclose(places["hidden"].sum(), dense(params, x).sum(), rtol=1e-9)
    np.testing.assert_allclose(relevance.sum(), places["hidden"].sum(), rtol=1e-9)


def test_a_tag_in_a_scan_is_stacked(x64):
    w = normal(3, 4, 4)

    def fun(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(jaxrel.tag(x, "x") @ w), None), x, w)[0]

    x = normal(2, 4)
    _, places = jaxrel.lrp(fun, Epsilon(1e-12), argnums=1, at="x")(w, x)
    assert places["x"].shape == (3, 2, 4)
    np.testing.assert_allclose(places["x"].sum((1, 2)), fun(w, x).sum(), rtol=1e-8)


def test_integer_tokens_are_explained_where_they_are_looked_up(x64):
    params = dense_params() | {"table": normal(10, 4)}

    def fun(params, tokens):
        return dense(params, jaxrel.tag(params["table"][tokens], "embed").mean(1))

    tokens = jnp.array([[1, 2, 3], [4, 5, 1]])
    explain = jaxrel.lrp(fun, Epsilon(1e-12, bias="ignored"), argnums=None, at="embed")
    places = jax.jit(explain)(params, tokens)
    assert places["embed"].shape == (2, 3, 4)
    np.testing.assert_allclose(places["embed"].sum(), fun(params, tokens).sum(), rtol=1e-9)
    with pytest.raises(TypeError, match=r"no real numbers \(int.*argnums=None, at='embed'"):
        jaxrel.lrp(fun, Epsilon(), argnums=1)(params, tokens)


@pytest.mark.parametrize("rule", [Epsilon(1e-12), ZPlus(1e-12), Gamma(0.25, 1e-12), AlphaBeta()])
def test_relevance_of_weights_is_the_sum_of_the_messages(x64, rule):
    params, x = dense_params() | {"b1": jnp.zeros(6)}, normal(2, 4)
    explain = jaxrel.lrp(dense, rule, argnums=1, at=(jaxrel.path("w*"), "hidden"))
    relevance, places = explain(params, x)
    assert places["w1"].shape == (4, 6)
    # Messages through w1 sum over outputs and batch to the input's relevance, by feature.
    np.testing.assert_allclose(places["w1"].sum(1), relevance.sum(0), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(places["w2"].sum(1), places["hidden"].sum(0), rtol=1e-8, atol=1e-10)


# Rules for inputs of zero.


@pytest.mark.parametrize("rule", [Flat(), WSquare(), ZBox(-1.0, 1.0)], ids=str)
def test_black_pixels_can_be_relevant(x64, rule):
    w = normal(3, 3, 3, 4)
    x = jnp.zeros((1, 6, 6, 3))

    def fun(w, x):
        y = (x.transpose(0, 3, 1, 2).reshape(1, 3, 6, 6) - 0.5) / 0.25
        return jax.nn.relu(conv1(y[0].transpose(1, 2, 0), w)).sum((0, 1))

    rules = [(jaxrel.first(), rule), (jaxrel.everything(), Epsilon())]
    relevance = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(w, x)
    # Everything arrives although every input is 0; 1e-6 is the stabiliser.
    np.testing.assert_allclose(relevance.sum(), fun(w, x).sum(), rtol=1e-4)
    note = jaxrel.plan(fun, rules, argnums=1)(w, x)[0]
    assert note.first
    assert "not at an input" not in note.note


def black_pixels_by_hand(wrap, w, b, x):
    """What `test_black_pixels_in_bodies` expects, in NumPy."""
    if wrap == "carry":
        rules = [Flat(), *3 * [Epsilon(0.01)]]
        return relevance_by_hand(rules, [*zip(w, b, strict=True)], x)
    if wrap != "scan":
        out = np.maximum((x - 0.5) @ w[0] + b[0], 0)
        return np.broadcast_to(out.sum(-1, keepdims=True) / (5 + 1e-6), x.shape)
    states = [np.zeros(5)]
    for row in x:
        states.append(np.tanh(states[-1] + row @ w[0]))
    r, found = states[-1], np.zeros_like(x)
    for n in reversed(range(len(x))):
        c = r / (states[n] + x[n] @ w[0])
        found[n] = (c * (x[n] @ w[0])).sum() / (5 + 1e-6)
        r = c * states[n]
    return found


@pytest.mark.parametrize("wrap", ["remat", "scan", "carry", "cond"])
def test_black_pixels_in_bodies(x64, wrap):
    p, x = stack_params(), normal(3, 5).at[:, :2].set(0.0)
    rules = [(jaxrel.first(), Flat()), (jaxrel.everything(), Epsilon(0.01))]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(4)]
    first = lambda p, x: jax.nn.relu((x - 0.5) @ p[0]["w"] + p[0]["b"])
    if wrap == "remat":
        fun, args = jax.checkpoint(first), (layers, x)
    elif wrap == "scan":
        # Time steps: the input is scanned over, the state is not the input.
        def first(p, x):
            h = jnp.zeros(5)
            for row in x:
                h = jnp.tanh(h + row @ p[0]["w"])
            return h

        def fun(p, x):
            return lax.scan(lambda h, row: (jnp.tanh(h + row @ p[0]["w"]), None), jnp.zeros(5), x)[
                0
            ]

        args = (layers, x)
    elif wrap == "carry":
        first, fun, args = (lambda _, x: unrolled(layers, x)), scanned, (p, x)
    else:
        fun = lambda p, x: lax.cond(p[0]["w"].sum() < 99, lambda x: first(p, x), lambda x: x, x)
        args = (layers, x)
    expected = jaxrel.lrp(first, rules, argnums=1)(*args)
    assert jnp.abs(expected[:, :2]).min() > 0
    np.testing.assert_allclose(jaxrel.lrp(fun, rules, argnums=1)(*args), expected, rtol=1e-10)
    by_hand = black_pixels_by_hand(wrap, *map(np.asarray, (p["w"], p["b"], x)))
    np.testing.assert_allclose(expected, by_hand, rtol=1e-10)


def test_direct_rules_in_the_middle_say_what_they_cannot_do(x64):
    params, x = dense_params(), normal(2, 4)
    rules = [(jaxrel.path("w2"), WSquare()), (jaxrel.everything(), Epsilon())]
    assert "no relevance where x = 0" in jaxrel.plan(dense, rules, argnums=1)(params, x)[-1].note
    assert jnp.all(jnp.isfinite(jaxrel.lrp(dense, rules, argnums=1)(params, x)))


# Bias and normalisation.


def test_a_bias_after_a_residual_belongs_to_the_product(x64):
    w, b, x = normal(4, 4), normal(4), normal(2, 4)
    plain = lambda p, x: x + (jnp.tanh(x) @ p[0] + p[1])
    moved = lambda p, x: x + jnp.tanh(x) @ p[0] + p[1]
    for rule in (Epsilon(0.1), ZPlus(), AlphaBeta(), Gamma()):
        a, b_ = (jaxrel.lrp(f, rule, argnums=1)((w, b), x) for f in (plain, moved))
        np.testing.assert_allclose(a, b_, rtol=1e-12)


def test_bias_fused_separate_and_ignored(x64):
    params, x = dense_params(), normal(2, 4)
    plans = {
        bias: jaxrel.plan(dense, ZPlus(bias=bias), argnums=1)(params, x)[0].bias
        for bias in ("fused", "separate", "ignored")
    }
    assert plans == {b: b for b in plans}
    # Separate: the sum is an operation of its own, so the product hands on what it gets.
    separate = jaxrel.lrp(dense, Epsilon(1e-12, bias="separate"), argnums=1)(params, x)
    fused = jaxrel.lrp(dense, Epsilon(1e-12), argnums=1)(params, x)
    np.testing.assert_allclose(separate, fused, rtol=1e-8)
    zplus = [
        jaxrel.lrp(dense, ZPlus(bias=bias), argnums=1)(params, x)
        for bias in ("fused", "separate", "ignored")
    ]
    assert not np.allclose(zplus[0], zplus[1])
    assert not np.allclose(zplus[1], zplus[2])


@pytest.mark.parametrize("rule", [Epsilon(), ZPlus(), AlphaBeta(), Gamma()], ids=str)
@pytest.mark.parametrize("layout", ["nnx", "dense", "kernel first"])
def test_batch_norm_is_folded_as_by_hand(x64, rule, layout):
    scale, shift, mean, var = normal(5), normal(5) / 3, normal(5) / 5, normal(5) ** 2 + 0.5
    s = scale / jnp.sqrt(var)
    if layout == "nnx":
        w, x = normal(3, 3, 3, 5), normal(2, 6, 6, 3)
        product = jax.vmap(conv1, (0, None))
        folded = w * s
    elif layout == "dense":
        w, x = normal(4, 5), normal(2, 4)
        product, folded = (lambda x, w: x @ w), w * s
    else:
        w, x = normal(5, 4), normal(2, 4)
        product, folded = (lambda x, w: jnp.einsum("oi,bi->bo", w, x)), w * s[:, None]

    def normalised(p, x):
        return jax.nn.relu((product(x, p) - mean) * s + shift)

    def by_hand(p, x):
        return jax.nn.relu(product(x, p) + (shift - mean * s))

    found = jaxrel.lrp(normalised, rule, argnums=1)(w, x)
    expected = jaxrel.lrp(by_hand, rule, argnums=1)(folded, x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


# Layers.


def stack_params():
    return {"w": normal(4, 5, 5) / 2, "b": normal(4, 5) / 4}


def scanned(p, x):
    def step(x, layer):
        return x + jax.nn.relu(x @ layer["w"] + layer["b"]), None

    return lax.scan(step, x, p)[0]


def unrolled(layers, x):
    for layer in layers:
        x = x + jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


PER_LAYER = {
    "one layer": [(jaxrel.layer(2), Gamma(1.0)), (jaxrel.everything(), Epsilon(0.01))],
    "a slice": [(jaxrel.layer(slice(1, 3)), ZPlus()), (jaxrel.everything(), Epsilon(0.01))],
    "steps": [(jaxrel.layer(slice(0, 4, 2)), ZPlus()), (jaxrel.everything(), Epsilon(0.01))],
    "not": [(~jaxrel.layer(0), AlphaBeta()), (jaxrel.everything(), Gamma())],
    "first": [(jaxrel.first(), Flat()), (jaxrel.everything(), Epsilon(0.01))],
    "both": [
        (jaxrel.first(), Gamma(2.0)),
        (jaxrel.layer(3) | jaxrel.layer(1), ZPlus()),
        (jaxrel.everything(), Epsilon(0.01)),
    ],
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PER_LAYER)
def test_rules_by_layer_in_a_scan(x64, name, reverse):
    p, x = stack_params(), normal(3, 5)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(4)]
    rules = PER_LAYER[name]
    if reverse:

        def fun(p, x):
            step = lambda x, q: (x + jax.nn.relu(x @ q["w"] + q["b"]), None)
            return lax.scan(step, x, p, reverse=True)[0]

        # Executed last to first; a layer keeps its index in the stack.
        flat = lambda layers, x: unrolled(layers[::-1], x)
    else:
        fun, flat = scanned, unrolled
    expected = jaxrel.lrp(flat, rules, argnums=1)(layers, x)
    found = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(p, x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def shared_by_hand(rule, w, b, h, r):
    """The relevance of a layer's inputs, in NumPy: that of its outputs in shares of a total."""
    if isinstance(rule, Flat):
        parts, total = np.ones((1, *w.shape)), len(w) + 1e-6
    elif isinstance(rule, WSquare):
        parts, total = w[None] ** 2, (w**2).sum(0) + b**2 + 1e-6
    else:
        z = h @ w + b
        parts, total = h[..., None] * w, z + np.where(z >= 0, rule.epsilon, -rule.epsilon)
    return (parts @ (r / total)[..., None])[..., 0]


def relevance_by_hand(rules, layers, x):
    """The relevance of x in `unrolled`, by a loop in NumPy."""
    states = [x]
    for w, b in layers:
        states.append(states[-1] + np.maximum(states[-1] @ w + b, 0))
    r = states[-1]
    for n, (w, b) in reversed([*enumerate(layers)]):
        h, y = states[n], states[n + 1] - states[n]
        c = r / np.where(h + y == 0, 1, h + y)
        share = shared_by_hand(rules[n], w, b, h, c * y)
        # Behind the first layer relevance is a factor of the value: zeros take none.
        r = c * h + (share if n == 0 else np.where(h == 0, 0, share))
    return r


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("one", "others"), [(Flat(), Flat()), (WSquare(), WSquare()), (Flat(), Epsilon(0.01))], ids=str
)
def test_direct_rules_in_a_scan_as_by_hand(x64, one, others, reverse):
    p, x = stack_params(), normal(3, 5).at[:, :2].set(0.0)

    def fun(p, x):
        step = lambda x, q: (x + jax.nn.relu(x @ q["w"] + q["b"]), None)
        return lax.scan(step, x, p, reverse=reverse)[0]

    rules = [(jaxrel.first(), one), (jaxrel.everything(), others)]
    found = jax.jit(jaxrel.lrp(fun, rules, argnums=1))(p, x)
    layers = [*zip(np.asarray(p["w"]), np.asarray(p["b"]), strict=True)]
    layers = layers[::-1] if reverse else layers
    expected = relevance_by_hand([one, others, others, others], layers, np.asarray(x))
    assert np.abs(expected[:, :2]).min() > 0
    # Where relevance is made a factor of the value, that is moved away from 0 by 1e-9.
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_negative_layers_count_from_the_end_of_a_stack(x64):
    p, x = stack_params(), normal(3, 5)
    rules = lambda where: [(where, Gamma(1.0)), (jaxrel.everything(), Epsilon(0.01))]
    a, b = (
        jaxrel.lrp(scanned, rules(where), argnums=1)(p, x)
        for where in (jaxrel.layer(-1), jaxrel.layer(3))
    )
    np.testing.assert_array_equal(a, b)
    plan = jaxrel.plan(scanned, rules(jaxrel.layer(-1)), argnums=1)(p, x)
    assert [row.layers for row in plan if row.kind == "dense"] == ["0-2", "3"]


def test_time_is_no_stack_of_layers(x64):
    cell = nnx.OptimizedLSTMCell(4, 5, **F64)
    x = normal(2, 6, 4)
    rules = [(jaxrel.layer(0), Gamma()), (jaxrel.everything(), Epsilon())]
    with pytest.raises(ValueError, match=r"layer\(0\).*matches no operation"):
        jaxrel.lrp(last, rules, argnums=1)(cell, x)


# Composition with JAX's own transformations.


def test_grad_of_relevance(x64):
    params, x = dense_params(), normal(2, 4)

    def loss(params, rule):
        return (jaxrel.lrp(dense, rule, argnums=1)(params, x) ** 2).sum()

    for rule in (Epsilon(0.1), ZPlus(0.1), Gamma(0.3, 0.1)):
        grad = jax.grad(loss)(params, rule)["w1"][1, 2]
        step = 1e-6
        moved = [loss(params | {"w1": params["w1"].at[1, 2].add(h)}, rule) for h in (step, -step)]
        # Central differences: error of order step^2, rounding 1e-16 / step.
        np.testing.assert_allclose(grad, (moved[0] - moved[1]) / (2 * step), rtol=1e-6)


def test_inside_scan_and_lax_map(x64):
    params, x = dense_params(), normal(5, 2, 4)
    explain = jaxrel.lrp(dense, ZPlus(), argnums=1)
    mapped = lax.map(lambda x: explain(params, x), x)
    np.testing.assert_allclose(mapped, jax.vmap(explain, (None, 0))(params, x), rtol=1e-13)


@pytest.mark.devices(8)
def test_sharded_over_devices():
    mesh = jax.make_mesh((8,), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    params, x = jax.tree.map(jnp.float32, (dense_params(), normal(16, 4)))
    explain = jax.jit(jaxrel.lrp(dense, ZPlus(), argnums=1))
    found = explain(params, jax.device_put(x, sharding))
    assert len(found.sharding.device_set) == 8
    # float32, sums in another order over denominators that partly cancel.
    np.testing.assert_allclose(found, explain(params, x), rtol=1e-5, atol=1e-6)


def test_relevance_is_float32_for_a_bfloat16_model():
    params, x = jax.tree.map(jnp.bfloat16, (dense_params(), normal(2, 4)))
    relevance = jaxrel.lrp(dense, Epsilon(), argnums=1)(params, x)
    assert relevance.dtype == jnp.float32


def test_values_that_a_jitted_function_brings_with_it(x64):
    params, x, seed = dense_params(), normal(2, 4), normal(2, 3)
    explain = jaxrel.lrp(dense, Epsilon(), argnums=1)
    expected = explain(params, x, seed=seed)
    for call in (
        jax.jit(lambda x: explain(params, x, seed=seed)),
        jax.jit(lambda x: explain(dense_params(), x, seed=seed)),
    ):
        np.testing.assert_allclose(call(x), expected, rtol=1e-12)
    bad = seed / 0
    with pytest.raises(ValueError, match="seed holds NaN"):
        jax.jit(lambda x: explain(params, x, seed=bad))(x)


# Conservation.


def test_conservation_accounts_for_everything(x64):
    params, x = dense_params(), normal(2, 4)
    for rules in (Epsilon(0.3), AlphaBeta(stabiliser=0.1), ZPlus(), Gradient(), Gamma()):
        table = jaxrel.conservation(dense, rules, argnums=1)(params, x)
        total = table.summary()
        # The sums are kept in float32.
        assert abs(total["elsewhere"]) < 1e-5 * max(1, abs(total["output"]))
        np.testing.assert_allclose(total["output"], dense(params, x).sum(), rtol=1e-5)
        relevance = jaxrel.lrp(dense, rules, argnums=1)(params, x)
        np.testing.assert_allclose(total["input"], relevance.sum(), rtol=1e-4, atol=1e-5)


def test_conservation_tells_bias_from_stabiliser(x64):
    w, b, x = jnp.array([[1.0], [2.0]]), jnp.array([3.0]), jnp.array([[1.0, 1.0]])
    fun = lambda p, x: x @ p[0] + p[1]
    # z = 6: Epsilon(2) passes 6 * 3 / 8, the bias takes half of the 6, epsilon the rest.
    (one,) = jaxrel.conservation(fun, Epsilon(2.0), argnums=1)((w, b), x)
    np.testing.assert_allclose(
        [one.received, one.passed, one.bias, one.stabiliser, one.rule],
        [6, 2.25, 3, 0.75, 0],
        rtol=1e-6,
        atol=1e-6,
    )
    assert one.row is not None
    assert one.row.kind == "dense"


def test_conservation_shows_what_stops(x64):
    fun = lambda p, x: jax.nn.softmax(x @ p) @ p.T
    table = jaxrel.conservation(fun, [(jaxrel.everything(), Epsilon())], argnums=1)(
        normal(4, 3), normal(2, 4)
    )
    assert [one.row.kind for one in table if one.row] == ["dense", "softmax", "dense"]
    assert "to stabiliser" in str(table)


# The plan.


def test_the_plan_says_what_happens(x64):
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), rngs=RULES),
        nnx.BatchNorm(4, use_running_average=True, rngs=RULES),
        nnx.relu,
        lambda x: x.mean((1, 2)),
        nnx.Linear(4, 2, rngs=RULES),
    )
    x = jnp.ones((1, 6, 6, 3))
    table = jaxrel.plan(lambda m, x: m(x), composites.epsilon_plus_flat(), argnums=1)(model, x)
    assert [row.kind for row in table] == ["conv", "activation", "mean", "dense"]
    conv, relu, _, linear = table
    assert conv.rule == Flat()
    assert conv.first
    assert "folded" in conv.note
    assert conv.paths == ("layers/0/kernel",)
    assert relu.rule == Pass()
    assert relu.default
    assert relu.note == "relu"
    assert linear.bias == "fused"
    assert "x >= 0" in linear.note
    text = str(table)
    assert "test_lrp.py" in text
    assert "Flat()" in text
    assert "layers/4/kernel" in text


def test_the_plan_shows_what_is_not_covered():
    table = jaxrel.plan(lambda x: jnp.fft.fft(x).real @ W42, [])(jnp.ones(4))
    assert {row.kind for row in table.uncovered} >= {"fft", "dense"}
    assert "NONE" in str(table)


# Errors.

FFT = lambda x: jnp.abs(jnp.fft.rfft(x))
WHILE = lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))


@pytest.mark.parametrize(
    ("fun", "rules", "kind", "text"),
    [
        (
            FFT,
            Epsilon(),
            NotImplementedError,
            r"fft \(.*test_lrp.py:\d+.*op\('fft'\), jaxrel.rules",
        ),
        (lambda x: WHILE(x)[1], Epsilon(), NotImplementedError, r"while.*use lax.scan"),
        (lambda x: x @ W42, [], NotImplementedError, r"dense.*op\('dense'\)"),
        (lambda x: (x, x), Epsilon(), TypeError, "must return one real array"),
        (lambda x: x > 0, Epsilon(), TypeError, "must return one real array.*bool"),
        (lambda x: x, Epsilon, TypeError, "rules must be a Composite"),
        (
            lambda x: x @ W42,
            [(jaxrel.path("nothing/*"), ZPlus()), (jaxrel.everything(), Epsilon())],
            ValueError,
            r"entry 0.*path\('nothing/\*'\).*matches no operation",
        ),
        (
            lambda x: x @ W42,
            [(jaxrel.everything(), Epsilon()), (jaxrel.op("fft"), Gradient())],
            ValueError,
            r"entry 1.*op\('fft'\).*matches no operation.*Kinds: dense",
        ),
    ],
    ids=["fft", "while", "uncovered", "tuple", "bool", "class", "path", "op"],
)
def test_errors_say_where_and_what_to_do(fun, rules, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        jaxrel.lrp(fun, rules)(jnp.arange(1.0, 5.0))


def test_a_hidden_entry_is_an_error():
    params, x = {"w": jnp.ones((4, 2))}, jnp.ones((1, 4))
    rules = [(jaxrel.everything(), Epsilon()), (jaxrel.path("w"), ZPlus())]
    with pytest.raises(ValueError, match=r"entry 1.*never decides: entry 0.*comes first"):
        jaxrel.lrp(lambda p, x: x @ p["w"], rules, argnums=1)(params, x)


def test_unknown_operations_may_be_a_warning():
    x = jnp.arange(1.0, 5.0)
    with pytest.warns(UserWarning, match=r"(?s)fft.*plain derivative is used"):
        found = jaxrel.lrp(FFT, Epsilon(), unknown="warn")(x)
    expected = x * jax.grad(lambda x: FFT(x).sum())(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_shard_map_inside_is_refused():
    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec()
    inner = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match="inside the shard_map"):
        jaxrel.lrp(lambda x: inner(x), Epsilon())(jnp.ones(4))


def test_python_code_inside_is_refused():
    def fun(x):
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(NotImplementedError, match="Python code is opaque"):
        jaxrel.lrp(fun, Epsilon())(jnp.ones(4))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda f, x: f(x, seed=jnp.ones(3)), ValueError, r"seed has shape \(3,\).*output \(4,\)"),
        (lambda f, x: f(x, seed=x / 0), ValueError, "seed holds NaN or infinity"),
        (lambda f, x: f(x.at[1].set(jnp.nan)), ValueError, r"argument 0 \(x\) holds NaN.* 1 of 4"),
        (lambda f, x: f(x.astype(int)), TypeError, "no real numbers"),
    ],
    ids=["shape", "inf", "nan", "int"],
)
def test_bad_calls(call, kind, text):
    def fun(x):
        return x * 2.0

    with pytest.raises(kind, match=text):
        call(jaxrel.lrp(fun, Epsilon()), jnp.arange(4.0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"argnums=3.*1 argument"):
        jaxrel.lrp(jnp.tanh, Epsilon(), argnums=3)(jnp.ones(2))
    with pytest.raises(ValueError, match="argnums=None explains no argument"):
        jaxrel.lrp(jnp.tanh, Epsilon(), argnums=None)
    with pytest.raises(ValueError, match="tags nothing named 'h'; its tags: 'a'"):
        jaxrel.lrp(lambda x: jaxrel.tag(x, "a"), Epsilon(), at="h")(jnp.ones(2))
    fun = lambda w, x: x @ w
    with pytest.raises(ValueError, match=r"path\('v'\) matches no parameter; there are w"):
        jaxrel.lrp(fun, Epsilon(), argnums=1, at=jaxrel.path("v"))(jnp.ones((2, 2)), jnp.ones(2))


@pytest.mark.parametrize(
    ("entries", "kind", "text"),
    [
        ([Epsilon()], TypeError, r"entry 0 must be a pair \(where, rule\)"),
        ([("conv", Epsilon())], TypeError, "entry 0 begins with 'conv'"),
        ([(jaxrel.op("conv"), Epsilon)], TypeError, r"did you mean Epsilon\(\)"),
        ([(jaxrel.op("softmax"), Epsilon())], ValueError, "uses Epsilon.* on 'softmax'; it is for"),
        ([(jaxrel.op("dense"), Pass())], ValueError, "it is for activation"),
    ],
)
def test_bad_composites(entries, kind, text):
    with pytest.raises(kind, match=text):
        jaxrel.Composite(entries)


def test_conditions_combine_and_read_well():
    where = jaxrel.path("a/*") & ~jaxrel.first() | jaxrel.op("conv", "dense") & jaxrel.layer(2)
    assert repr(where) == ("((path('a/*') & ~first()) | (op('conv', 'dense') & layer(2)))")
    with pytest.raises(ValueError, match="expected a glob"):
        jaxrel.path("")
    with pytest.raises(ValueError, match="expected names"):
        jaxrel.op()
    with pytest.raises(TypeError, match="int or a slice"):
        jaxrel.layer("a")


def test_ones_own_entries_come_first():
    mine = jaxrel.Composite([(jaxrel.op("conv"), Stop())])
    assert (mine + composites.epsilon_plus()).entries[0] == mine.entries[0]
