"""Attention told apart by what its axes are: streams, heads in loops, groups, windows, caches."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrel import attention

BATCH, TOKENS, WIDTH, HEADS = 2, 6, 12, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
W = (RNG.normal(size=(12, WIDTH, WIDTH)) * 0.3).astype(np.float32)
QUERIES = RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32)
# float32 rounding of two ways to compute one function.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def maps(q, k):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2)


def attend(x, memory=None, i=0, change=lambda attn: attn):
    memory = x if memory is None else memory
    return change(maps(x @ W[i], memory @ W[i + 1])) @ (memory @ W[i + 2]) @ W[i + 3]


def split(x):
    return x.reshape(*x.shape[:2], HEADS, -1)


def equal(fun, x, **options):
    return attention.relevance(fun, method="equal", target_token=None, **options)(x)


def reference(maps_of, fun_of, count):
    """Chefer, Gur and Wolf 2021, eq. 5 and 6, in float64, from maps given as arguments."""
    relevance = np.eye(TOKENS)[None]
    grads = jax.grad(lambda maps: fun_of(maps).sum())(maps_of)
    for attn, grad in zip(maps_of[:count], grads[:count], strict=True):
        product = np.maximum(np.asarray(attn, np.float64) * np.asarray(grad, np.float64), 0)
        relevance = relevance + product.mean(1) @ relevance
    return relevance


def test_cross_attention_of_equal_lengths_is_another_stream():
    """Object queries or decoder tokens, as many as the encoder has: DETR, Whisper, Perceiver."""

    def model(x, queries):
        x = x + attend(x)
        x = x + attend(x, i=4)
        q = jnp.broadcast_to(queries, (BATCH, *queries.shape))
        q = q + attend(q, x, i=8)
        return q[:, 0].sum(-1)

    alike = lambda x: model(x, QUERIES)
    own, cross = attention.sites(alike)(X)
    assert (own.layers, own.is_self, cross.is_self) == (2, True, False)

    # The reference: maps as arguments, in float64.
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)

        def computed(x, given=None):
            found = []
            for i in (0, 4):
                attn = maps(x @ W[i], x @ W[i + 1])[:, None]
                attn = attn if given is None else given[len(found)]
                found.append(attn)
                x = x + attn[:, 0] @ (x @ W[i + 2]) @ W[i + 3]
            q = jnp.broadcast_to(QUERIES, (BATCH, *QUERIES.shape))
            return (q + attend(q, x, i=8))[:, 0].sum(-1), found

        def later_maps_fixed(given):
            # A layer's map is its own variable; what follows depends on it through the stream.
            zero = [g - lax.stop_gradient(g) for g in given]
            stream, found = x, []
            for j, i in enumerate((0, 4)):
                attn = maps(stream @ W[i], stream @ W[i + 1])[:, None] + zero[j]
                found.append(attn)
                stream = stream + attn[:, 0] @ (stream @ W[i + 2]) @ W[i + 3]
            q = jnp.broadcast_to(QUERIES, (BATCH, *QUERIES.shape))
            return (q + attend(q, stream, i=8))[:, 0].sum(-1)

        want = reference(computed(x)[1], later_maps_fixed, 2)
    np.testing.assert_allclose(equal(alike, X), want, **CLOSE)
    with pytest.raises(ValueError, match=r"the keys are another stream, .*bimodal"):
        equal(alike, X, attention=cross.name)


def test_positions_that_two_streams_share_do_not_make_them_one():
    def model(x):
        h = x + QUERIES
        h = h + attend(h)
        q = jnp.broadcast_to(W[0, :TOKENS], x.shape) + QUERIES
        return (q + attend(q, h, i=4))[:, 0].sum(-1)

    assert [s.is_self for s in attention.sites(model)(X)] == [True, False]


def heads_at_once(x):
    q, k, v = (split(x @ w) for w in W[:3])
    attn = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(x.shape) @ W[3]


def heads_one_by_one(x):
    q, k, v = (jnp.moveaxis(split(x @ w), 2, 0) for w in W[:3])
    out = lax.map(lambda qkv: jax.nn.softmax(qkv[0] @ qkv[1].swapaxes(1, 2)) @ qkv[2], (q, k, v))
    return jnp.moveaxis(out, 0, 2).reshape(x.shape) @ W[3]


@pytest.mark.parametrize("method", ["equal", "weighted", "raw", "rollout"])
def test_heads_in_a_loop_are_heads(method):
    """Heads in lax.map, alone or in a scan over layers, have the relevance of heads at once."""

    def twice(attend):
        body = lambda x, scale: (x + attend(x * scale), None)
        return lambda x: lax.scan(body, x, jnp.array([1.0, 0.5]))[0][:, 0].sum(-1)

    (stack,) = attention.sites(twice(heads_one_by_one))(X)
    assert (stack.layers, stack.sites[0].shape) == (2, (BATCH, HEADS, TOKENS, TOKENS))
    got, want = (
        attention.relevance(twice(attend), method=method)(X)
        for attend in (heads_one_by_one, heads_at_once)
    )
    np.testing.assert_allclose(got, want, **CLOSE)


def test_heads_in_a_loop_are_not_streamed():
    model = lambda x: (x + heads_one_by_one(x))[:, 0].sum(-1)
    with pytest.raises(NotImplementedError, match=r"one after another .*; use form='auto'"):
        attention.relevance(model, form="streaming")(X)


def test_examples_in_a_loop_are_refused():
    model = lambda x: lax.map(lambda x: (x + attend(x))[0].sum(-1), x)
    with pytest.raises(ValueError, match="run one by one in a scan"):
        equal(model, X)


@pytest.mark.parametrize("order", ["btskg", "bkgts", "bgtks", "bstgk"])
@pytest.mark.parametrize("extra", [0, 2])
def test_query_groups_stand_anywhere(order, extra):
    """Two groups of queries for each key head, keys of the prompt or of a longer cache."""

    def model(x):
        q = (x @ W[0]).reshape(BATCH, TOKENS, 2, 2, 3)
        pad = lambda z: jnp.pad(z, ((0, 0), (0, extra), (0, 0), (0, 0)))
        k, v = (pad((x @ w[:, :6]).reshape(BATCH, TOKENS, 2, 3)) for w in W[1:3])
        scores = jnp.einsum(f"btkgd,bskd->{order}", q, k)
        shape = [TOKENS + extra if axis == "s" else 1 for axis in order]
        scores = jnp.where((jnp.arange(TOKENS + extra) < TOKENS).reshape(shape), scores, -1e30)
        out = jnp.einsum(f"{order},bskd->btkgd", jax.nn.softmax(scores, order.index("s")), v)
        return (x + out.reshape(x.shape) @ W[3])[:, -1].sum(-1)

    def plain(x):
        repeat = lambda w: jnp.repeat((x @ w[:, :6]).reshape(BATCH, TOKENS, 2, 3), 2, 2)
        q, k, v = (x @ W[0]).reshape(BATCH, TOKENS, 4, 3), repeat(W[1]), repeat(W[2])
        attn = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        out = jnp.einsum("bhqk,bkhd->bqhd", attn, v)
        return (x + out.reshape(x.shape) @ W[3])[:, -1].sum(-1)

    (stack,) = attention.sites(model)(X)
    assert stack.is_self
    assert stack.sites[0].shape == (BATCH, 4, TOKENS, TOKENS + extra)
    np.testing.assert_allclose(equal(model, X), equal(plain, X), **CLOSE)
    got, want = (attention.relevance(f, target_token=-1)(X) for f in (model, plain))
    np.testing.assert_allclose(got, want, **CLOSE)


def cached(x, place, start):
    """A causal layer whose keys and values lie in a longer, empty cache."""
    k, v = (place(x @ w) for w in W[1:3])
    slots = np.arange(k.shape[1]) - start
    visible = (slots[None] <= np.arange(TOKENS)[:, None]) & (slots[None] >= 0)
    scores = jnp.where(visible, x @ W[0] @ k.swapaxes(1, 2), -1e30)
    return x + jax.nn.softmax(scores) @ v @ W[3]


# How keys get into a cache, and where they start there.
PLACES = {
    "prompt": (lambda z: z, 0),
    "update": (
        lambda z: lax.dynamic_update_slice(jnp.zeros((BATCH, 9, WIDTH)), z, (0, 0, 0)),
        0,
    ),
    "padding": (lambda z: jnp.pad(z, ((0, 0), (2, 1), (0, 0))), 2),
    "concatenation": (lambda z: jnp.concatenate([jnp.zeros((BATCH, 2, WIDTH)), z], 1), 2),
}


@pytest.mark.parametrize("form", ["streaming", "stacked"])
@pytest.mark.parametrize("method", ["equal", "weighted"])
@pytest.mark.parametrize("place", ["update", "padding", "concatenation"])
def test_keys_beside_the_prompt_are_no_tokens(place, method, form):
    explain = lambda name: attention.relevance(
        lambda x: cached(cached(x, *PLACES[name]), *PLACES[name])[:, -1].sum(-1),
        method=method,
        target_token=-1,
        form=form,
    )(X)
    np.testing.assert_allclose(explain(place), explain("prompt"), **CLOSE)


def sink(x):
    """An extra score in each row that takes part in the softmax and is then cut off."""
    scores = x @ W[0] @ (x @ W[1]).swapaxes(1, 2)
    with_sink = jnp.concatenate([scores, jnp.full((*scores.shape[:2], 1), 0.5)], -1)
    return jax.nn.softmax(with_sink)[..., :-1] @ (x @ W[2]) @ W[3]


def test_sinks_are_no_keys():
    model = lambda x: (x + sink(x))[:, 0].sum(-1)
    (stack,) = attention.sites(model)(X)
    assert stack.is_self
    assert stack.sites[0].shape == (BATCH, 1, TOKENS, TOKENS)
    assert attention.relevance(model)(X).shape == (BATCH, TOKENS)


MESH = Mesh(jax.devices()[:1], ("d",))
KEEPS = {
    "sharding": lambda a: lax.with_sharding_constraint(a, NamedSharding(MESH, PartitionSpec())),
    "barrier": lax.optimization_barrier,
    "barrier of two": lambda a: lax.optimization_barrier((jnp.zeros(3), a))[1],
    "reshape": lambda a: a.reshape(-1, TOKENS).reshape(a.shape),
    "cast": lambda a: a.astype(jnp.bfloat16).astype(jnp.float32),
}


def test_a_barrier_around_both_summands_hides_no_residual_sum():
    barred = lambda x: sum(lax.optimization_barrier((x, attend(x))))[:, 0].sum(-1)
    got = attention.relevance(barred)(X)
    want = attention.relevance(lambda x: (x + attend(x))[:, 0].sum(-1))(X)
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("where", ["map", "output", "stream"])
@pytest.mark.parametrize("keep", KEEPS)
def test_what_changes_no_value_hides_no_attention(keep, where):
    keep = KEEPS[keep]
    change = {where: keep}
    same = lambda a: a

    def model(x, on):
        stream = on.get("stream", same)(x)
        out = on.get("output", same)(attend(stream, change=on.get("map", same)))
        return (stream + out)[:, 0].sum(-1)

    got = attention.relevance(lambda x: model(x, change))(X)
    want = attention.relevance(lambda x: model(x, {}))(X)
    # bfloat16 has eight bits; all else is float32 rounding.
    rounding = {"rtol": 0.05, "atol": 0.02} if keep is KEEPS["cast"] else CLOSE
    np.testing.assert_allclose(got, want, **rounding)


@pytest.mark.parametrize("tokens", [5, 6])
def test_heads_that_are_cut_across_tokens_are_refused(tokens):
    """A reshape to [batch, heads, tokens, width] without a transpose: rows are not tokens."""
    x = jax.random.normal(jax.random.key(0), (2, tokens, 8))
    weights = jax.random.normal(jax.random.key(1), (3, 8, 8)) / 3

    def model(x):
        query, key, value = ((x @ w).reshape(2, 2, tokens, 4) for w in weights)
        attn = jax.nn.softmax(query @ key.mT)
        return (x + (attn @ value).reshape(x.shape))[:, 0].sum(-1)

    with pytest.raises(NotImplementedError, match="attends within parts of the tokens"):
        attention.relevance(model, method="equal")(x)


@pytest.mark.parametrize("join", ["concatenate", "sum"])
def test_heads_one_by_one_are_no_layers(join):
    """Their outputs side by side, or each through its rows of the last weight; advice is right."""
    cuts = [slice(4 * i, 4 * i + 4) for i in range(HEADS)]

    def head(x, cut):
        q, k, v = (x @ w[:, cut] for w in W[:3])
        return maps(q, k) @ v

    def apart(x):
        heads = [head(x, cut) for cut in cuts]
        if join == "sum":
            return (x + sum(h @ W[3][cut] for h, cut in zip(heads, cuts, strict=True)))[:, 0].sum(
                -1
            )
        return (x + jnp.concatenate(heads, -1) @ W[3])[:, 0].sum(-1)

    def together(x):
        whole = W[:3].reshape(3, WIDTH, HEADS, 4)
        q, k, v = (jnp.einsum("btd,dhe->bhte", x, w) for w in whole)
        heads = maps(q, k) @ v
        return (x + heads.swapaxes(1, 2).reshape(x.shape) @ W[3])[:, 0].sum(-1)

    np.testing.assert_allclose(apart(X), together(X), **CLOSE)
    with pytest.raises(ValueError, match=r"one sum may be heads of one layer.*jax\.vmap"):
        equal(apart, X)
    assert equal(together, X).shape == (BATCH, TOKENS, TOKENS)


def test_parts_of_unknown_tokens_beside_self_attention_are_no_silent_choice():
    """An encoder whose heads are cut across tokens, and a decoder of learned queries."""

    def across(x):
        return x.reshape(BATCH, HEADS, -1, WIDTH // HEADS)

    def fun(x):
        q, k, v = (across(x @ w) for w in W[:3])
        x = x + (maps(q, k) @ v).reshape(x.shape)
        y = jnp.broadcast_to(QUERIES, x.shape)
        y = y + attend(y, x, i=4)
        return (y + attend(y, i=8))[:, 0].sum(-1)

    with pytest.raises(ValueError, match=r"'attention' is self-attention beside .* is not known"):
        equal(fun, X)
    assert equal(fun, X, attention="attention_2").shape == (BATCH, TOKENS, TOKENS)


def test_scores_that_are_shifted_by_a_reshape_are_of_their_tokens():
    """Relative positions as in Transformer-XL (Dai et al. 2019): padded, cut anew and sliced."""
    heads, width = 2, 4
    x = jax.random.normal(jax.random.key(0), (2, 5, heads * width))
    weights = jax.random.normal(jax.random.key(1), (3, 8, heads, width)) / 3
    positions = jax.random.normal(jax.random.key(2), (5, heads, width))

    def model(x):
        query, key, value = (jnp.einsum("btd,dhw->bhtw", x, w) for w in weights)
        far = jnp.einsum("bhtw,khw->bhtk", query, positions)
        far = jnp.pad(far, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(2, heads, 6, 5)
        attn = jax.nn.softmax(query @ key.mT + far[:, :, 1:])
        return (x + jnp.moveaxis(attn @ value, 1, 2).reshape(x.shape))[:, 0].sum(-1)

    (stack,) = attention.sites(model)(x)
    assert (stack.is_self, stack.sites[0].shape) == (True, (2, heads, 5, 5))
    assert attention.relevance(model)(x).shape == (2, 5)
