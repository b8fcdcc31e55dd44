"""Attention found in models that nobody prepared: sites, stacks, and what is refused."""

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import attention
from tests.attention.small_models import (
    BATCH,
    HEADS,
    LAYERS,
    MODEL,
    TOKENS,
    WEIGHTS,
    WIDTH,
    X,
    attend,
    scanned,
    stacked_blocks,
)


def multi_head(x):
    return x.reshape(BATCH, TOKENS, 4, -1)


def linen_attention():
    model = linen.MultiHeadDotProductAttention(num_heads=4)
    params = model.init(jax.random.key(0), X)
    return lambda x: (x + model.apply(params, x)).sum((1, 2))


def logsumexp_form(x):
    scores = x @ x.swapaxes(1, 2)
    weights = jnp.exp(scores - jax.nn.logsumexp(scores, -1, keepdims=True))
    return (x + weights @ x).sum((1, 2))


def grouped(x):
    q = multi_head(x)
    return jax.nn.dot_product_attention(q, q[:, :, :2], q[:, :, :2]).sum((1, 2, 3))


def masked_dropout(x):
    scores = jnp.einsum("btd,bsd->bts", x, x)
    mask = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    weights = jnp.where(mask, weights, 0) * 0.5
    return (x + jnp.einsum("bts,bsd->btd", weights, x)).sum((1, 2))


def upcast(x):
    x = x.astype(jnp.bfloat16)
    scores = (x @ x.swapaxes(1, 2)).astype(jnp.float32)
    weights = jax.nn.softmax(scores).astype(jnp.bfloat16)
    return (x + weights @ x).astype(jnp.float32).sum((1, 2))


MODELS = {
    "nnx": (lambda x: MODEL.blocks[0](x).sum((1, 2)), (BATCH, HEADS), True),
    "linen": (linen_attention(), (BATCH, 4), True),
    "dot_product_attention": (
        lambda x: jax.nn.dot_product_attention(*[multi_head(x)] * 3).sum((1, 2, 3)),
        (BATCH, 4),
        False,
    ),
    "causal": (
        lambda x: jax.nn.dot_product_attention(*[multi_head(x)] * 3, is_causal=True).sum((1, 2, 3)),
        (BATCH, 4),
        False,
    ),
    "grouped queries": (grouped, (BATCH, 4), False),
    "one head, matmul": (
        lambda x: (x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x).sum((1, 2)),
        (BATCH, 1),
        True,
    ),
    "logsumexp": (logsumexp_form, (BATCH, 1), True),
    "mask and dropout": (masked_dropout, (BATCH, 1), True),
    "upcast softmax": (upcast, (BATCH, 1), True),
    "post-LN": (
        lambda x: jax.nn.standardize(x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x).sum((1, 2)),
        (BATCH, 1),
        True,
    ),
}


@pytest.mark.parametrize(("fun", "sizes", "residual"), MODELS.values(), ids=MODELS.keys())
def test_sites_are_found_by_structure(fun, sizes, residual):
    (stack,) = attention.sites(fun)(X)
    assert stack.sites[0].shape == (*sizes, TOKENS, TOKENS)
    assert (stack.layers, stack.is_self, stack.has_residual) == (1, True, residual)
    matrix = attention.relevance(fun, method="raw", target_token=None)(X)
    # Rows of a softmax sum to 1 (0.5 with the constant dropout factor of one case).
    total = 0.5 if fun is masked_dropout else 1
    np.testing.assert_allclose(matrix.sum(-1), total, rtol=0.01)


def test_what_is_no_attention_is_not_found():
    weights = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    assert attention.sites(lambda x: jax.nn.softmax(x).sum((1, 2)))(X) == ()
    routed = lambda x: (jax.nn.softmax(x @ weights) @ weights).sum((1, 2))
    assert attention.sites(routed)(X) == ()
    routed = lambda x, w: (jax.nn.softmax(x @ w) @ w).sum()
    assert attention.sites(routed, argnums=0)(X, weights) == ()
    assert len(attention.sites(routed)(X, weights)) == 1


def test_layers_that_follow_one_another_are_one_stack_and_branches_are_several():
    (stack,) = attention.sites(lambda m, x: m(x))(MODEL, X)
    assert (stack.layers, len(stack.sites)) == (LAYERS, LAYERS)
    (stack,) = attention.sites(scanned)(X)
    assert (stack.layers, len(stack.sites)) == (LAYERS, 1)
    two = lambda x, y: scanned(x) * MODEL(y)
    assert [s.name for s in attention.sites(two)(X, X)] == ["attention", "attention_1"]
    found = attention.relevance(two, attention=("attention_1", "attention"), method="equal")(X, X)
    assert list(found) == ["attention_1", "attention"]
    with pytest.raises(ValueError, match=r"several were found; name what is meant.*'attention_1'"):
        attention.relevance(two)(X, X)


def test_two_sites_in_one_scanned_body_take_turns():
    graph, states = stacked_blocks()
    four = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), states)
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), four)

    def in_pairs(x):
        def step(x, pair):
            for i in range(2):
                x = nnx.merge(graph, jax.tree.map(lambda s, i=i: s[i], pair))(x)
            return x, None

        return lax.scan(step, x, pairs)[0][:, 0].sum(-1)

    def one_by_one(x):
        return lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, four)[0][:, 0].sum(-1)

    for form in ("stacked", "streaming"):
        got, want = (
            jax.jit(attention.relevance(fun, method="equal", form=form))(X)
            for fun in (in_pairs, one_by_one)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_a_reversed_scan_is_stacked_in_order_of_execution():
    graph, states = stacked_blocks()

    def backwards(x):
        step = lambda x, s: (nnx.merge(graph, s)(x), None)
        return lax.scan(step, x, jax.tree.map(lambda s: s[::-1], states), reverse=True)[0][
            :, 0
        ].sum(-1)

    got = attention.relevance(backwards, method="equal", form="stacked")(X)
    np.testing.assert_allclose(
        got, attention.relevance(scanned, method="equal")(X), rtol=1e-5, atol=1e-6
    )


def test_cross_attention_is_told_from_self_attention():
    def decoder(x, memory):
        x = x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x
        return (x + jax.nn.softmax(x @ memory.swapaxes(1, 2)) @ memory).sum((1, 2))

    own, cross = attention.sites(decoder)(X, X)
    assert (own.is_self, cross.is_self) == (True, False)
    assert attention.relevance(decoder)(X, X).shape == (BATCH, TOKENS)
    assert "cross-attention, layers 1, batch 2, heads 1, queries 5, keys 5, at " in str(cross)


def test_tags_name_the_stack_and_stand_for_it():
    def tagged(x):
        attn = jaxrel.tag(jax.nn.softmax(x @ x.swapaxes(1, 2))[:, None], "mine")
        before = jaxrel.tag(x, "mine/before")
        after = jaxrel.tag((attn @ x[:, None])[:, 0], "mine/after")
        return (before + after)[:, 0].sum(-1)

    assert [stack.name for stack in attention.sites(tagged)(X)] == ["mine"]
    np.testing.assert_allclose(
        attention.relevance(tagged, attention="mine")(X),
        attention.relevance(tagged)(X),
        rtol=1e-6,
    )


@jax.custom_vjp
def fused(x):
    return jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x


fused.defvjp(lambda x: (fused(x), x), lambda x, g: (g,))


@pytest.mark.parametrize("method", attention.METHODS)
def test_attention_with_a_derivative_of_its_own_is_that_of_what_it_computes(method):
    explain = lambda attend: attention.relevance(
        lambda x: (x + attend(x))[:, 0].sum(-1), method=method
    )(X)
    np.testing.assert_allclose(explain(fused), explain(fused.fun), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", attention.METHODS)
def test_a_map_that_a_checkpoint_returns_is_found(method):
    def model(x, wrap):
        for _ in range(2):
            x = x + wrap(lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2) / 9))(x) @ x
        return x[:, 0].sum(-1)

    explain = lambda wrap: attention.relevance(lambda x: model(x, wrap), method=method)(X)
    plain = explain(lambda f: f)
    np.testing.assert_allclose(explain(jax.checkpoint), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.devices(8)
def test_attention_in_shard_map_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    fun = jax.shard_map(scanned, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with pytest.raises(NotImplementedError, match=r"shard_map at .* call jaxrel inside"):
        attention.relevance(fun)(np.tile(X, (4, 1, 1)))


def test_a_kernel_on_the_data_is_refused():
    from jax.experimental import pallas

    def copy(source, target):
        target[...] = source[...]

    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    kernel = pallas.pallas_call(copy, out_shape=shape, interpret=True)
    with pytest.raises(NotImplementedError, match=r"pallas_call at .* may compute attention"):
        attention.relevance(lambda x: scanned(kernel(x)))(X)


def test_operations_with_known_programs_are_no_obstacle():
    def model(x):
        x = jax.nn.relu(x).at[:, 0].add(1.0)
        order = jnp.argsort(x.sum((0, 2)))
        return scanned(jax.nn.silu(x[:, order]))

    assert attention.relevance(model)(X).shape == (BATCH, TOKENS)


def test_encoder_and_decoder_of_one_length_are_two_stacks():
    def model(encoder, decoder):
        for i in (0, 1):
            encoder = encoder + attend(encoder, i)
        for i in (2, 3):
            decoder = decoder + attend(decoder, i)
            decoder = decoder + attend(decoder, i + 2, memory=encoder)
        return decoder[:, 0].sum(-1)

    found = attention.sites(model)(X, X * 2)
    assert sorted((s.layers, s.is_self) for s in found) == [(2, False), (2, True), (2, True)]


@pytest.mark.parametrize("reverse", [(False, False), (True, False), (False, True)])
def test_loops_in_loops_stack_in_order_of_execution(reverse):
    """A local layer twice, then a global one, three times: unrolled, in the same order."""
    outer, inner = reverse

    def body(x, i):
        local = lambda x, j: (x + attend(x, j), None)
        x, _ = lax.scan(local, x, jnp.arange(2), reverse=inner)
        return x + attend(x, i), None

    weights = jnp.asarray(WEIGHTS)

    def attend(x, i):
        # A small step, so that nine layers do not blow the stream up.
        return jax.nn.softmax((x @ weights[i]) @ x.swapaxes(-1, -2)) @ x * 0.1

    def nested(x):
        return lax.scan(body, x, jnp.arange(2, 5), reverse=outer)[0][:, 0].sum(-1)

    def flat(x):
        for i in range(2, 5)[:: -1 if outer else 1]:
            for j in range(2)[:: -1 if inner else 1]:
                x = x + attend(x, j)
            x = x + attend(x, i)
        return x[:, 0].sum(-1)

    methods = ("equal", "weighted", "raw", "no_aggregation")
    got, want = (
        jax.jit(attention.relevance(fun, method=methods, form="stacked"))(X)
        for fun in (nested, flat)
    )
    for method in methods:
        # float32 through nine layers; another order of layers is off by parts in ten.
        np.testing.assert_allclose(got[method], want[method], rtol=2e-4, atol=1e-5)


def test_the_residual_may_be_computed_after_the_attention():
    def model(x):
        low = x.astype(jnp.bfloat16)
        x = attend(low.astype(jnp.float32), 0) + low.astype(jnp.float32)
        return x[:, 0].sum(-1)

    low = X.astype(jnp.bfloat16).astype(np.float32)
    want = attention.relevance(lambda x: (x + attend(x, 0))[:, 0].sum(-1))(low)
    np.testing.assert_allclose(attention.relevance(model)(X), want, rtol=1e-5, atol=1e-6)


def test_parallel_blocks_and_two_attentions_are_self_attention():
    parallel = lambda x: (x + (attend(x, 0) + jax.nn.gelu(x @ WEIGHTS[1])))[:, 0].sum(-1)
    (stack,) = attention.sites(parallel)(X)
    assert (stack.is_self, stack.has_residual) == (True, True)
    streamed, stacked = (
        attention.relevance(parallel, form=form)(X) for form in ("streaming", "stacked")
    )
    np.testing.assert_allclose(streamed, stacked, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_a_tag_of_the_map_alone_takes_nothing_away():
    def model(x, name=None):
        for i in (0, 1):
            x = x + attend(x, i, name=name)
        return x[:, 0].sum(-1)

    want = attention.relevance(model)(X)
    tagged = lambda x: model(x, name="maps")
    np.testing.assert_allclose(attention.relevance(tagged)(X), want, rtol=1e-6)
    named = attention.relevance(lambda x: jax.vmap(lambda x: tagged(x[None])[0])(x))
    np.testing.assert_allclose(named(X), want, rtol=1e-5, atol=1e-6)


def test_query_groups_are_heads_wherever_their_axis_stands():
    def grouped(x):
        q = x.reshape(BATCH, TOKENS, 2, 2, -1)
        k = q[:, :, :, 0]
        attn = jax.nn.softmax(jnp.einsum("btkgd,bskd->btkgs", q, k))
        out = jnp.einsum("btkgs,bskd->btkgd", attn, k)
        return (x + out.reshape(x.shape))[:, 0].sum(-1)

    (stack,) = attention.sites(grouped)(X)
    assert stack.sites[0].shape == (BATCH, 4, TOKENS, TOKENS)


def test_a_tree_of_parameters_is_no_data():
    """As in Linen and Equinox: products with weights are no products with data."""

    def model(params, x):
        x = x + jax.nn.softmax(x @ params["gate"]) @ params["out"]
        scores = x @ params["keys"] @ x.swapaxes(1, 2)
        return (x + jax.nn.softmax(scores) @ x)[:, 0].sum(-1)

    names = ("gate", "out", "keys")
    params = dict(zip(names, WEIGHTS, strict=False))
    (stack,) = attention.sites(model)(params, X)
    assert (stack.layers, stack.is_self) == (1, True)
    got, want = (
        attention.relevance(fun, argnums=argnums)(params, X)
        for fun, argnums in ((model, None), (model, 1))
    )
    np.testing.assert_array_equal(got, want)
