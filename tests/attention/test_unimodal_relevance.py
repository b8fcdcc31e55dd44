"""Relevance of functions as they stand: streamed, stacked, and equal however they are written."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
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
    WIDTH,
    X,
    attend,
    scanned,
    stacked_blocks,
)


def vmapped(x):
    return jax.vmap(lambda x: scanned(x[None])[0])(x)


FORMS = {
    "argument": lambda **options: attention.relevance(lambda m, x: m(x), **options)(MODEL, X),
    "closed over": lambda **options: attention.relevance(lambda x: MODEL(x), **options)(X),
    "scan": lambda **options: attention.relevance(scanned, **options)(X),
    "remat": lambda **options: attention.relevance(
        functools.partial(scanned, remat=True), **options
    )(X),
    "vmap inside": lambda **options: attention.relevance(vmapped, **options)(X),
    "jit": lambda **options: jax.jit(attention.relevance(scanned, **options))(X),
    "jit inside": lambda **options: attention.relevance(jax.jit(scanned), **options)(X),
    "one by one": lambda **options: np.concatenate(
        [attention.relevance(scanned, **options)(x[None]) for x in X]
    ),
    "vmap outside": lambda **options: jax.vmap(
        lambda x: attention.relevance(scanned, **options)(x[None])[0]
    )(X),
    "without a batch": lambda **options: np.concatenate(
        [attention.relevance(lambda x: scanned(x[None])[0], **options)(x) for x in X]
    ),
}


@pytest.fixture(scope="module")
def reference():
    """The matrix form on maps and gradients that the model was made to hand out."""

    def tagged(offsets):
        x, saved = jnp.asarray(X), []
        for block, (map_offset, sum_offset) in zip(MODEL.blocks, offsets, strict=True):
            h = block.norm(x)
            mha = block.attention
            q, k, v = mha.query(h), mha.key(h), mha.value(h)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH / HEADS) ** -0.5
            attn = jax.nn.softmax(scores) + map_offset
            out = mha.out(jnp.einsum("bhqk,bkhd->bqhd", attn, v))
            saved.append((attn, x, out))
            x = x + out + sum_offset
            x = x + nnx.gelu(block.mlp(x))
        return x[:, 0].sum(), saved

    zeros = [(jnp.zeros((BATCH, HEADS, TOKENS, TOKENS)), jnp.zeros(X.shape)) for _ in range(LAYERS)]
    grads, saved = jax.grad(tagged, has_aux=True)(zeros)
    attn, before, after = (jnp.stack(xs) for xs in zip(*saved, strict=True))
    grad, value_grad = (jnp.stack(xs) for xs in zip(*grads, strict=True))
    return {
        "attn": attn,
        "grad": grad,
        "before": before,
        "after": after,
        "value_grad": value_grad,
    }


# Those that need no LRP.
FROM_MAPS = tuple(m for m in attention.METHODS if m not in ("equal_lrp", "partial_lrp"))


def matrix(method, maps, **options):
    if method == "weighted":
        return attention.weighted(**maps, **options)
    if method == "token_tm":
        values = {name: maps[name] for name in ("before", "after")}
        return attention.token_tm(maps["attn"], maps["grad"], **values, **options)
    if method in ("raw", "rollout"):
        return getattr(attention, method)(maps["attn"], **options)
    return getattr(attention, method)(maps["attn"], maps["grad"], **options)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("method", ["equal", "weighted"])
def test_streaming_equals_the_matrix_form_however_the_model_is_written(form, method, reference):
    want = matrix(method, reference)[:, 0]
    # float32: different order of the same sums.
    np.testing.assert_allclose(form(method=method), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["scan", "remat", "argument", "vmap inside"])
def test_all_methods_from_one_pass(form, reference):
    found = FORMS[form](method=FROM_MAPS, target_token=None)
    assert set(found) == set(FROM_MAPS)
    for method, got in found.items():
        np.testing.assert_allclose(got, matrix(method, reference), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("importance", ["grad_value", "norm", "abs_grad_value"])
def test_measures_and_layers(importance, reference):
    streamed = FORMS["remat"](importance=importance)
    stacked = FORMS["remat"](importance=importance, form="stacked")
    np.testing.assert_allclose(streamed, stacked, rtol=2e-5, atol=2e-6)
    for layers in (slice(-1, None), [0]):
        got = FORMS["scan"](importance=importance, layers=layers, target_token=[1, 3])
        want = matrix("weighted", reference, importance=importance, layers=layers)
        np.testing.assert_allclose(got, want[[0, 1], [1, 3]], rtol=2e-5, atol=2e-6)


def test_one_backward_pass_serves_all_methods():
    explain = attention.relevance(scanned, method=FROM_MAPS)
    scans = [e for e in jax.make_jaxpr(explain)(X).eqns if e.primitive.name == "scan"]
    through_model = [e for e in scans if any(v.aval.shape == X.shape for v in e.invars)]
    assert len(through_model) == 2  # forward, backward


def test_streaming_keeps_no_map_beyond_its_layer():
    explain = jax.jit(attention.relevance(functools.partial(scanned, remat=True)))
    text = str(jax.make_jaxpr(explain)(X))
    # A map [1, batch, heads, query, key] as Flax computes it; stacked over layers, it is kept.
    kept = f"f32[{LAYERS},1,{BATCH},{HEADS},{TOKENS},{TOKENS}]"
    assert kept not in text
    stacked = attention.relevance(functools.partial(scanned, remat=True), form="stacked")
    assert kept in str(jax.make_jaxpr(stacked)(X))


def test_streaming_equals_stacked_in_float64(x64):
    def model(x, ws):
        def layer(x, w):
            q, k, v = jnp.split(x @ w, 3, -1)
            heads = lambda z: z.reshape(BATCH, TOKENS, HEADS, -1).transpose(0, 2, 1, 3)
            attn = jax.nn.softmax(heads(q) @ heads(k).swapaxes(-1, -2))
            out = (attn @ heads(v)).transpose(0, 2, 1, 3).reshape(x.shape)
            return x + out, None

        return lax.scan(jax.checkpoint(layer), x, ws)[0][:, 0].sum(-1)

    rng = np.random.default_rng(1)
    ws = rng.normal(size=(LAYERS, WIDTH, 3 * WIDTH)) / WIDTH**0.5
    x = rng.normal(size=(BATCH, TOKENS, WIDTH))
    for method in ("equal", "weighted"):
        streamed, stacked = (
            jax.jit(attention.relevance(model, method=method, form=form, argnums=0))(x, ws)
            for form in ("streaming", "stacked")
        )
        assert streamed.dtype == np.float64
        # The same numbers summed in another order: float64 rounding.
        np.testing.assert_allclose(streamed, stacked, rtol=1e-12, atol=1e-12)


def test_bfloat16_models_give_float32_relevance():
    def model(x):
        x = x.astype(jnp.bfloat16)
        for _ in range(LAYERS):
            attn = jax.nn.softmax((x @ x.swapaxes(1, 2)) * WIDTH**-0.5)
            x = x + attn @ x
        return x[:, 0].astype(jnp.float32).sum(-1)

    got = jax.jit(attention.relevance(model))(X)
    assert got.dtype == jnp.float32
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(attention.relevance(model, form="stacked"))(X)
    # The forms round at different places, and bfloat16 has 8 bits: 2 parts in 100.
    np.testing.assert_allclose(got, exact, rtol=0.02, atol=0.02)


def test_integer_inputs_and_embedded_tokens():
    table = np.random.default_rng(1).normal(size=(11, WIDTH)).astype(np.float32)
    ids = np.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 11
    explain = attention.relevance(lambda ids: scanned(jnp.asarray(table)[ids]))
    np.testing.assert_allclose(
        explain(ids), attention.relevance(scanned)(table[ids]), rtol=1e-6, atol=1e-7
    )


def test_value_and_relevance_returns_the_score():
    value, relevance = attention.value_and_relevance(scanned)(X)
    np.testing.assert_allclose(value, scanned(X), rtol=1e-6)
    np.testing.assert_array_equal(relevance, attention.relevance(scanned)(X))


@pytest.mark.devices(8)
def test_sharded_batches_stay_sharded():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = np.tile(X, (4, 1, 1))
    graph, states = stacked_blocks()

    def model(x):
        return lax.scan(lambda x, s: (block(x, s), None), x, states)[0][:, 0].sum(-1)

    def block(x, state):
        # Plain attention: explicit shardings know nothing of Flax's modules.
        b = nnx.merge(graph, state)
        h = b.norm(x)
        return x + jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h

    explain = jax.jit(attention.relevance(model))
    got = explain(jax.device_put(x, sharding))
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(got, explain(x), rtol=2e-5, atol=1e-6)


def without_residual(x):
    return jax.nn.dot_product_attention(*[x[:, :, None]] * 3, is_causal=True).sum((1, 2, 3))


def two_forms(x):
    attn = jax.nn.softmax(x @ x.swapaxes(-1, -2))
    return attn @ x + (attn * 0.5) @ (x * 2)


ERRORS = {
    "method": (
        lambda: attention.relevance(scanned, method="wieghted"),
        ValueError,
        "unknown attention method 'wieghted'; there are equal, weighted, raw, rollout",
    ),
    "no method": (lambda: attention.relevance(scanned, method=()), ValueError, "no attention meth"),
    "measure": (
        lambda: attention.relevance(scanned, importance="size"),
        ValueError,
        "size.*grad_value, norm, abs_grad_value",
    ),
    "target_token": (
        lambda: attention.relevance(scanned, target_token=TOKENS)(X),
        ValueError,
        "target_token: 5 does not exist; there are 5 tokens, 0 to 4",
    ),
    "layer": (
        lambda: attention.relevance(scanned, layers=[LAYERS])(X),
        ValueError,
        "2 .*0 to 1",
    ),
    "stack": (
        lambda: attention.relevance(scanned, attention="vision")(X),
        ValueError,
        "no attention is named 'vision'; there is 'attention': self-attention, layers 2",
    ),
    "no attention": (
        lambda: attention.relevance(lambda x: x.sum((1, 2)))(X),
        ValueError,
        "no self-attention was found",
    ),
    "no residual": (
        lambda: attention.relevance(without_residual)(X),
        ValueError,
        r"'weighted' needs the residual stream.*tag the map.*'attention/before'",
    ),
    "not a scalar": (
        lambda: attention.relevance(lambda x: (scanned(x), x))(X),
        TypeError,
        "must return one real array",
    ),
    "form": (
        lambda: attention.relevance(scanned, form="streaming", layers=[0]),
        ValueError,
        "form='streaming' computes one target token row",
    ),
    "not square": (
        lambda: attention.relevance(
            lambda x, y: (x + jax.nn.softmax(x @ y.swapaxes(1, 2)) @ y).sum((1, 2)),
            attention="attention",
        )(X, X[:, :3]),
        ValueError,
        "maps 5 queries to 3 keys; .* use attention.value_and_bimodal_relevance",
    ),
    "tag of another rank": (
        lambda: attention.relevance(lambda x: jaxrel.tag(x[0, 0], "a").sum(), attention="a")(X),
        ValueError,
        r"tagged 'a' at .* has shape \(8,\); an attention map is \[batch, heads, query, key\]",
    ),
    "logits": (
        lambda: attention.relevance(lambda x: (x + attend(x, 0))[:, 0])(X),
        TypeError,
        r"returned shape \(2, 8\); return the scalar.*fun\(x\)\[:, target\]",
    ),
    "examples folded into heads": (
        lambda: attention.relevance(
            lambda x: scanned(x.reshape(1, BATCH * TOKENS, WIDTH)) * jnp.ones(BATCH)
        )(X),
        ValueError,
        "returns 2 scalars, one per example, but the attention map .* has no first axis of 2",
    ),
    "examples one by one": (
        lambda: attention.relevance(lambda x: lax.map(lambda x: scanned(x[None])[0], x))(X),
        ValueError,
        "one by one in a scan.*jax.vmap",
    ),
    "two forms of one map": (
        lambda: attention.relevance(lambda x: (x + two_forms(x)).sum((1, 2)))(X),
        NotImplementedError,
        "used in several forms",
    ),
    "two attentions in one sum": (
        lambda: attention.relevance(
            lambda x: (x + (attend(x, 0) + attend(x, 1)))[:, 0].sum(-1),
            attention=("attention", "attention_1"),
        )(X),
        ValueError,
        r"meet in one sum; add them to the stream one after the other, or use method 'equal'",
    ),
    "argnums": (
        lambda: attention.relevance(scanned, argnums=3)(X),
        ValueError,
        "argnums 3 does not fit a call with 1 arguments",
    ),
    "target token by a word": (
        lambda: attention.relevance(scanned, target_token="mean")(X),
        ValueError,
        "target_token must be a token's index, or one per example, got 'mean'",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_choice_of_layers_in_a_cond_is_refused():
    def model(x):
        layer = lambda x, i: (lax.cond(i == 1, lambda x: x + attend(x, 0), lambda x: x, x), None)
        return lax.scan(layer, x, jnp.arange(3))[0][:, 0].sum(-1)

    once = lambda x: (x + attend(x, 0))[:, 0].sum(-1)
    got, want = (jax.jit(attention.relevance(fun, method="equal"))(X) for fun in (model, once))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32, other fusion
    with pytest.raises(NotImplementedError, match=r"'raw' counts the layers .* may not run"):
        attention.relevance(model, method="raw")(X)
