"""Attention that was found, computed by blocks of queries: the numbers of the whole map."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import attention

LAYERS, BATCH, TOKENS, WIDTH, HEADS = 2, 2, 7, 8, 4
# float64: the forms differ only in the order of sums.
SAME = {"rtol": 1e-11, "atol": 1e-12}
PADDING = np.arange(64) < 5


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(LAYERS, 4, WIDTH, WIDTH)) * 1.5 * WIDTH**-0.5


def tokens_of(seed=0, tokens=TOKENS):
    return np.random.default_rng(seed + 1).normal(size=(BATCH, tokens, WIDTH))


def heads_of(x, w):
    return (x @ w).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)


def joined(heads):
    return heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], WIDTH)


# ---- how a map comes about: scores [batch, heads, query, key] to the map


def softmax(scores):
    return jax.nn.softmax(scores / 2, -1)


def causal(scores):
    return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf))


def causal_by_positions(scores):
    place = jnp.arange(scores.shape[-1])
    return jax.nn.softmax(jnp.where(place[:, None] >= place, scores, -1e30))


def causal_and_padding(scores):
    count = scores.shape[-1]
    allowed = jnp.tril(jnp.ones((count, count), bool)) & PADDING[:count]
    return jax.nn.softmax(scores, -1, where=allowed[None, None])


def additive(scores):
    count = scores.shape[-1]
    return jax.nn.softmax(scores + jnp.where(PADDING[:count], 0, -1e9)[None, None, None])


def array_bias(scores):
    count = scores.shape[-1]
    bias = np.random.default_rng(5).normal(size=(HEADS, count, count))
    return jax.nn.softmax(scores + bias)


def alibi(scores):
    place = jnp.arange(scores.shape[-1])
    slope = 2.0 ** -jnp.arange(1, HEADS + 1)
    return jax.nn.softmax(scores - slope[:, None, None] * jnp.abs(place[:, None] - place))


def buckets(scores):
    place = jnp.arange(scores.shape[-1])
    table = jnp.asarray(np.random.default_rng(6).normal(size=(4, HEADS)))
    bucket = jnp.clip(place[None] - place[:, None], -1, 2) + 1
    return jax.nn.softmax(scores + table[bucket].transpose(2, 0, 1))


def softcap(scores):
    return jax.nn.softmax(2 * jnp.tanh(scores / 2))


def sink(scores):
    zeros = jnp.zeros((*scores.shape[:-1], 1), scores.dtype)
    return jax.nn.softmax(jnp.concatenate([scores, zeros], -1))[..., :-1]


def by_hand(scores):
    e = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def talking_heads(scores):
    mix = jnp.asarray(np.random.default_rng(7).normal(size=(HEADS, HEADS)))
    return jax.nn.softmax(jnp.einsum("bhqk,hg->bgqk", scores, mix))


def masked_again(scores):
    keep = jnp.arange(scores.shape[-1]) != 1
    return jnp.where(keep, jax.nn.softmax(scores), 0)


def folded(scores):
    rows = jax.nn.softmax(scores.reshape(-1, *scores.shape[2:]))
    return rows.reshape(scores.shape)


def tagged(scores):
    return jaxrel.tag(jax.nn.softmax(scores), "attention")


MAPS = {
    f.__name__: f
    for f in (
        *(softmax, causal, causal_by_positions, causal_and_padding, additive, array_bias, alibi),
        *(buckets, softcap, sink, by_hand, talking_heads, masked_again, folded, tagged),
    )
}


def layer(x, w, make_map=softmax):
    q, k, v = (heads_of(jnp.sin(x), part) for part in w[:3])
    after = joined(make_map(q @ k.mT) @ v) @ w[3]
    return jnp.tanh(x + after)


def grouped(x, w):
    """Queries in groups that share keys and values, as `jax.nn` writes it."""
    q, k, v = (jnp.sin(x) @ part for part in w[:3])
    q = q.reshape(*x.shape[:2], HEADS, -1)
    k, v = (part[..., : WIDTH // 2].reshape(*x.shape[:2], HEADS // 2, -1) for part in (k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return x + out.reshape(x.shape) @ w[3]


def beside(x, w):
    """Two keys and values that are no tokens, before those of the tokens."""
    q, k, v = (heads_of(jnp.sin(x), part) for part in w[:3])
    more = np.random.default_rng(8).normal(size=(2, BATCH, HEADS, 2, WIDTH // HEADS))
    k, v = (jnp.concatenate([a, b], 2) for a, b in zip(more, (k, v), strict=True))
    return jnp.tanh(x + joined(softmax(q @ k.mT) @ v) @ w[3])


# ---- how layers come one after the other


def unrolled(x, layer=layer, seed=0):
    for w in weights(seed):
        x = layer(x, jnp.asarray(w))
    return x[:, 0].sum(-1)


def scanned(x, layer=layer, seed=0):
    return lax.scan(lambda x, w: (layer(x, w), None), x, weights(seed))[0][:, 0].sum(-1)


def rematted(x, layer=layer, seed=0):
    step = jax.checkpoint(lambda x, w: (layer(x, w), None))
    return lax.scan(step, x, weights(seed))[0][:, 0].sum(-1)


def mask_outside(x, seed=0):
    """A causal mask that is made once and read by all layers, through a scan and a remat."""
    count = x.shape[1]
    mask = jnp.tril(jnp.ones((1, 1, count, count), bool)) & PADDING[:count]
    make_map = lambda scores: jax.nn.softmax(jnp.where(mask, scores, -1e30))
    return rematted(x, functools.partial(layer, make_map=make_map), seed)


def mask_outside_unrolled(x, seed=0):
    count = x.shape[1]
    bias = jnp.where(jnp.tril(jnp.ones((count, count), bool)), 0.0, -1e9)
    make_map = lambda scores: jax.nn.softmax(scores + bias)
    return unrolled(x, functools.partial(layer, make_map=make_map), seed)


def in_cond(x, seed=0):
    step = lambda x, w: (lax.cond(w.sum() < 1e3, layer, lambda x, w: x, x, w), None)
    return lax.scan(step, x, weights(seed))[0][:, 0].sum(-1)


PROGRAMS = {
    "unrolled": unrolled,
    "scan": scanned,
    "remat": rematted,
    "mask outside": mask_outside,
    "mask outside, unrolled": mask_outside_unrolled,
    "cond": in_cond,
    "grouped": functools.partial(scanned, layer=grouped),
    "keys beside": functools.partial(scanned, layer=beside),
}


def relevance(fun, form, method="weighted", block=3, x=None, **options):
    explain = attention.relevance(fun, method=method, form=form, block=block, **options)
    return jax.jit(explain)(jnp.asarray(tokens_of() if x is None else x))


@functools.cache
def by_form(fun, stacked=False, **options):
    """By method and form, from one program: what the forms share is compiled once."""
    methods = ("equal", "weighted")

    def explain(x):
        found = {
            (method, form): attention.relevance(fun, method=method, form=form, block=3, **options)(
                x
            )
            for method in methods
            for form in ("blockwise", "streaming")
        }
        if stacked:
            both = attention.relevance(fun, method=methods, form="stacked", **options)(x)
            found |= {(method, "stacked"): both[method] for method in methods}
        return found

    return jax.jit(explain)(tokens_of())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make_map", MAPS.values(), ids=MAPS.keys())
def test_every_map_that_is_recognised(make_map):
    fun = functools.partial(scanned, layer=functools.partial(layer, make_map=make_map))
    found = by_form(fun)
    for method in ("equal", "weighted"):
        assert found[method, "streaming"].any()
        np.testing.assert_allclose(found[method, "blockwise"], found[method, "streaming"], **SAME)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fun", PROGRAMS.values(), ids=PROGRAMS.keys())
@pytest.mark.parametrize("method", ["equal", "weighted"])
def test_every_program_gives_what_streaming_and_stacked_give(fun, method):
    found = by_form(fun, stacked=True, target_token=(2, -1))
    for form in ("streaming", "stacked"):
        np.testing.assert_allclose(found[method, "blockwise"], found[method, form], **SAME)


@pytest.mark.usefixtures("x64")
@settings(max_examples=6, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    block=st.integers(1, 10),
    fun=st.sampled_from([unrolled, mask_outside]),
)
def test_shapes_and_blocks(seed, tokens, block, fun):
    fun, x = functools.partial(fun, seed=seed), tokens_of(seed, tokens)
    want = relevance(fun, "streaming", target_token=(0, tokens - 1), x=x)
    found = relevance(fun, "blockwise", target_token=(0, tokens - 1), block=block, x=x)
    np.testing.assert_allclose(found, want, **SAME)


@pytest.mark.usefixtures("x64")
def test_value_vmap_and_op_by_op():
    x = tokens_of()
    explain = attention.value_and_relevance(mask_outside, form="blockwise", block=4)
    value, found = explain(x)
    np.testing.assert_allclose(value, mask_outside(x), **SAME)
    one_by_one = jax.vmap(lambda x: explain(x[None])[1][0])(x)
    np.testing.assert_allclose(one_by_one, relevance(mask_outside, "streaming"), **SAME)
    np.testing.assert_allclose(found, one_by_one, **SAME)


def test_modules_of_flax():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

        def __call__(self, x):
            mask = nnx.make_causal_mask(x[..., 0])
            return x + self.attention(self.norm(x), mask=mask)

    first, second = Layer(nnx.Rngs(0)), Layer(nnx.Rngs(1))
    fun = lambda x: second(first(x))[:, -1].sum(-1)
    x = tokens_of().astype(np.float32)
    want = relevance(fun, "streaming", target_token=-1, x=x)
    found = relevance(fun, "blockwise", target_token=-1, x=x)
    # float32: the same sums in another order.
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6)


def test_low_precision_gives_float32():
    x = tokens_of().astype(jnp.bfloat16)
    low = lambda x, w: layer(x, w.astype(jnp.bfloat16))
    fun = functools.partial(scanned, layer=low)
    want, found = (relevance(fun, form, "equal", x=x) for form in ("streaming", "blockwise"))
    assert found.dtype == jnp.float32
    # bfloat16 rounds the model's values to 3 digits, in both forms but not in the same places.
    np.testing.assert_allclose(found, want, rtol=0.05, atol=0.01)


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


def whole_maps(explain, x):
    """Shapes with two axes of all tokens, of which there are more than of anything else."""
    count = x.shape[1]
    program = jax.make_jaxpr(explain)(x)
    around = range(count, count + 2)
    return [s for s in shapes_in(program.jaxpr) if sum(size in around for size in s) > 1]


MADE_OF_POSITIONS = ["softmax", "causal", "causal_by_positions", "alibi", "buckets", "sink"]


@pytest.mark.parametrize(
    "fun",
    [
        *(
            functools.partial(rematted, layer=functools.partial(layer, make_map=MAPS[n]))
            for n in MADE_OF_POSITIONS
        ),
        mask_outside,
        mask_outside_unrolled,
        functools.partial(scanned, layer=grouped),
    ],
    ids=[*MADE_OF_POSITIONS, "mask outside", "mask outside, unrolled", "grouped"],
)
def test_no_array_of_tokens_by_tokens_is_made(fun):
    x = tokens_of(tokens=37).astype(np.float32)  # no other size is as large
    assert whole_maps(attention.relevance(fun, form="streaming"), x)
    for method in ("equal", "weighted"):
        explain = attention.relevance(fun, method=method, form="blockwise", block=8)
        assert not whole_maps(explain, x)


# ---- what cannot be done


def of_map(make_map):
    def fun(x):
        q, k, v = (heads_of(x, w) for w in weights()[0, :3])
        return (x + joined(make_map(q @ k.mT, v)))[:, 0].sum(-1)

    return fun


def used_twice(scores, v):
    attn = jax.nn.softmax(scores)
    return attn @ v + attn @ jnp.sin(v)


def over_queries(scores, v):
    attn = jax.nn.softmax(scores)
    return (attn / (1 + scores.sum(-2, keepdims=True))) @ v


def random_mask(scores, v):
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, scores.shape)
    return jnp.where(keep, jax.nn.softmax(scores), 0) @ v


ERRORS = {
    "a map in two places": (
        lambda x: relevance(of_map(used_twice), "blockwise", "equal", x=x),
        NotImplementedError,
        r"form='blockwise': the attention at .*test_by_blocks.*the map is used in more than one "
        r"place.* Use form='auto'",
    ),
    "queries together": (
        lambda x: relevance(of_map(over_queries), "blockwise", "equal", x=x),
        NotImplementedError,
        r"cannot be computed by blocks of queries: .* at .*test_by_blocks.py:\d+ \(over_queries\) "
        r".*Use form='auto'",
    ),
    "random numbers": (
        lambda x: relevance(of_map(random_mask), "blockwise", "equal", x=x),
        NotImplementedError,
        r"\w+ at .*\(random_mask\) is not known to keep its queries apart",
    ),
    "whole matrix": (
        lambda x: relevance(scanned, "blockwise", target_token=None, x=x),
        ValueError,
        "form='blockwise' computes one target token row of one of the methods",
    ),
    "block": (
        lambda x: relevance(scanned, "blockwise", block=0, x=x),
        ValueError,
        "block must be 1 or more queries, got 0",
    ),
    "sinks": (
        lambda x: relevance(scanned, "blockwise", sinks=[0], x=x),
        ValueError,
        "form='blockwise' leaves no columns out of the maps, and sinks= asks for that; use form=",
    ),
}


@pytest.mark.filterwarnings("ignore:.*draws a random mask")
@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_where_and_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call(tokens_of().astype(np.float32))
