"""`lrp` on what JAX programs are made of: every construct keeps gradient and relevance."""

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxrel
from jaxrel.propagation.rules import (
    Epsilon,
    Gradient,
    SignalTakesAll,
)
from tests.propagation.networks import BARE, F64, RNGS, conv1, last, normal


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


def batch_norm(scale, x):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * scale


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
        lambda: module(lambda: nnx.LayerNorm(8, use_bias=False, rngs=RNGS)),
        (2, 5, 8),
        KEEPS,
    ),
    "rms norm": (lambda: module(lambda: nnx.RMSNorm(8, rngs=RNGS)), (2, 5, 8), KEEPS),
    "group norm": (
        lambda: module(lambda: nnx.GroupNorm(8, 2, use_bias=False, rngs=RNGS)),
        (2, 5, 8),
        KEEPS,
    ),
    "batch norm by batch": (lambda: raw(batch_norm, 4), (6, 4), KEEPS),
    "scan of remat (nnx)": (lambda: module(lambda: Stack(RNGS)), (3, 4), KEEPS),
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
        lambda: raw(lambda w, x: (x @ w) / (jax.nn.sigmoid(x @ w.T) + 1), 4, 4),
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
