"""Relevance in the backward pass, with the whole map and by blocks, against the matrix form."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import streaming as carriers
from jaxrel.attention.blocks import blockwise
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
            carrier, attn = carriers.accumulate(carrier, attention_map(q, k))
            out = attn @ v
        else:
            out, carrier = blockwise(q, k, v, carrier, block=block)
        after = joined(weights, out)
        if importance is not None:
            carrier, after = carriers.weigh(carrier, x, after, importance)
        return (feed_forward(weights, x + after), carrier), None

    def run(carrier):
        (out, carrier), _ = jax.lax.scan(layer, (x, carrier), weights)
        return explained(head, out, target_token), carrier

    (y, _), pullback = jax.vjp(run, carriers.zeros(batch, tokens, x.dtype))
    if seeds is None:
        seed = carriers.seed(target_token, batch=batch, tokens=tokens, dtype=x.dtype)
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
    seeds = [carriers.seed(i, batch=BATCH, tokens=TOKENS, dtype=jnp.float64) for i in range(TOKENS)]
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


# ---- the blockwise operation by itself


def dense(q, k, v, carrier, *, mask=None, causal=False, scale=None):
    """The same attention with the whole map."""
    allowed = jnp.ones((1, 1, q.shape[2], k.shape[2]), bool)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    if causal:
        allowed = jnp.tril(allowed)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    carrier, attn = carriers.accumulate(
        carrier, jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    )
    return attn @ v, carrier


def random_heads(seed=0, tokens=TOKENS, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    shape = (BATCH, HEADS, tokens, WIDTH)
    q, k = (jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(2))
    v, out_grad = (jnp.asarray(rng.normal(size=(*shape[:3], 3)), dtype) for _ in range(2))
    rows = Carrier(*jnp.asarray(rng.uniform(size=(2, BATCH, tokens)), dtype))
    return (q, k, v, jax.tree.map(jnp.zeros_like, rows)), (out_grad, rows)


def out_and_pulled_back(inputs, cotangents, attend=blockwise, **options):
    """Output, gradients and relevance, in one program."""

    @jax.jit
    def run(inputs, cotangents):
        out, pullback = jax.vjp(functools.partial(attend, **options), *inputs)
        return out, pullback(cotangents)

    return run(inputs, cotangents)


MASK = np.array([[True] * 5 + [False] * 2, [True] * 7])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("block", "options"),
    [
        (1, {}),
        (7, {}),
        (50, {"scale": 0.3}),
        (3, {"causal": True}),
        (3, {"mask": MASK}),
        (4, {"mask": MASK, "causal": True}),
    ],
)
def test_output_gradients_and_relevance_are_those_of_the_whole_map(block, options):
    ours = out_and_pulled_back(*random_heads(), block=block, **options)
    theirs = out_and_pulled_back(*random_heads(), attend=dense, **options)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, **SAME)


def test_query_with_no_key_gives_nothing():
    inputs, cotangents = random_heads(dtype=jnp.float32)
    mask = np.array([[True] * TOKENS, [False] * TOKENS])
    (out, _), pulled_back = out_and_pulled_back(inputs, cotangents, block=3, mask=mask)
    *grads, relevance = pulled_back
    assert not out[1].any()
    assert not any(grad[1].any() for grad in grads)
    np.testing.assert_array_equal(relevance.keep[1], cotangents[1].keep[1])
    assert all(np.isfinite(x).all() for x in (out, *grads, *relevance))


def test_large_scores_stay_finite():
    (q, k, v, carrier), cotangents = random_heads(dtype=jnp.float32)
    everything = out_and_pulled_back((1e4 * q, 1e4 * k, v, carrier), cotangents, block=3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(everything))


def test_low_precision_inputs_give_float32_relevance():
    inputs, (out_grad, rows) = random_heads(dtype=jnp.float32)
    low = [x.astype(jnp.bfloat16) for x in inputs[:3]]
    low_grad = out_grad.astype(jnp.bfloat16)
    (out, _), pulled_back = out_and_pulled_back((*low, inputs[3]), (low_grad, rows), block=3)
    *grads, relevance = pulled_back
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in relevance} == {jnp.dtype(jnp.float32)}
    rounded = [x.astype(jnp.float32) for x in low]
    rounded_grad = low_grad.astype(jnp.float32)
    _, exact = out_and_pulled_back((*rounded, inputs[3]), (rounded_grad, rows), block=3)
    expected = exact[-1]
    # From the same rounded inputs, relevance is float32 throughout.
    np.testing.assert_allclose(relevance.keep, expected.keep, rtol=1e-5, atol=1e-5)


def shapes_in(jaxpr):
    """Shapes of all values in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_whole_map_is_never_formed():
    tokens = 37  # no other size here
    inputs, cotangents = random_heads(tokens=tokens, dtype=jnp.float32)

    def run(attend, inputs, cotangents):
        return jax.vjp(attend, *inputs)[1](cotangents)

    def whole_maps(attend):
        program = jax.make_jaxpr(functools.partial(run, attend))(inputs, cotangents)
        padded = {37, 40}
        return [s for s in shapes_in(program.jaxpr) if sum(size in padded for size in s) > 1]

    assert whole_maps(dense)
    assert not whole_maps(functools.partial(blockwise, block=8, causal=True))


# ---- the carrier by itself


def test_forward_is_the_identity():
    attn, values = jnp.full((1, 1, 2, 2), 0.5), jnp.arange(6.0).reshape(1, 2, 3)
    carrier = carriers.zeros(1, 2)
    same, out = carriers.accumulate(carrier, attn)
    np.testing.assert_array_equal(out, attn)
    same, out = carriers.weigh(same, -values, values)
    np.testing.assert_array_equal(out, values)
    assert not any(x.any() for x in same)


def test_accumulate_by_hand():
    attn = jnp.array([[[[1, 0], [0.5, 0.5]]]])
    attn_grad = jnp.array([[[[1.0, 7], [1, -1]]]])
    relevance = Carrier(keep=jnp.array([[1.0, 2]]), move=jnp.array([[10.0, 4]]))
    _, pullback = jax.vjp(carriers.accumulate, carriers.zeros(1, 2), attn)
    new, passed = pullback((relevance, attn_grad))
    # keep + move A, with A = [[1, 0], [.5, 0]]
    np.testing.assert_array_equal(new.keep, [[1 + 10 + 2, 2]])
    np.testing.assert_array_equal(new.move, new.keep)
    np.testing.assert_array_equal(passed, attn_grad)


def test_weigh_by_hand():
    before, after = jnp.array([[[3.0], [0]]]), jnp.array([[[-1.0], [0]]])
    relevance = Carrier(keep=jnp.array([[2.0, 5]]), move=jnp.array([[2.0, 5]]))
    _, pullback = jax.vjp(
        functools.partial(carriers.weigh, importance="norm"), carriers.zeros(1, 2), before, after
    )
    new, before_grad, after_grad = pullback((relevance, jnp.array([[[7.0], [8]]])))
    np.testing.assert_array_equal(new.keep, [[3, 5]])
    np.testing.assert_array_equal(new.move, [[1, 5]])
    assert not before_grad.any()
    np.testing.assert_array_equal(after_grad, [[[7], [8]]])


@pytest.mark.parametrize("target_token", [1, -1, np.array([1, -1])])
def test_seed(target_token):
    for part in carriers.seed(target_token, batch=2, tokens=2):
        np.testing.assert_array_equal(part, [[0, 1], [0, 1]])


# ---- errors


def test_missing_target_token():
    with pytest.raises(
        ValueError, match="target_token: 2 does not exist; there are 2 tokens, 0 to 1"
    ):
        carriers.seed(2, batch=1, tokens=2)


def test_shapes_that_do_not_fit():
    carrier, width = carriers.zeros(1, 3), jnp.ones((1, 3, 4))
    with pytest.raises(ValueError, match=r"accumulate: .* got map \(1, 2, 3, 4\) and carrier"):
        carriers.accumulate(carrier, jnp.ones((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"weigh: .* got before \(1, 3, 4\), after \(1, 3, 4\)"):
        carriers.weigh(carriers.zeros(1, 2), width, width)
    (q, k, v, _), _ = random_heads(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"expected a carrier .* = \(2, 7\), got \(1, 3\)"):
        blockwise(q, k, v, carrier, block=2)


@pytest.mark.parametrize("block", [0, -3])
def test_block_that_does_not_exist(block):
    inputs, _ = random_heads(dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"block must be 1 or more queries, got {block}"):
        blockwise(*inputs, block=block)
