"""Attention over blocks of queries, against attention with the whole map."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.attention import Carrier, blockwise, streaming

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 7, 4
# float64: the forms differ only in the order of sums.
SAME = {"rtol": 1e-12, "atol": 1e-12}


def dense(q, k, v, carrier, *, mask=None, causal=False, scale=None):
    """The same attention with the whole map."""
    allowed = jnp.ones((1, 1, q.shape[2], k.shape[2]), bool)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    if causal:
        allowed = jnp.tril(allowed)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    carrier, attn = streaming.accumulate(
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


@pytest.mark.parametrize("block", [0, -3])
def test_block_that_does_not_exist(block):
    inputs, _ = random_heads(dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"block must be 1 or more queries, got {block}"):
        blockwise(*inputs, block=block)
