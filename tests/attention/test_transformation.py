"""Attention relevance of unmodified models: sites found, streamed, and equal in every form."""

import functools

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import attention

LAYERS, BATCH, TOKENS, WIDTH, HEADS = 2, 2, 5, 8, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)


class Block(nnx.Module):
    """A pre-LN layer made of Flax's own parts; nothing in it knows of jaxrel."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + nnx.gelu(self.mlp(x))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x[:, 0].sum(-1)


MODEL = Unrolled(nnx.Rngs(0))


def stacked_blocks():
    parts = [nnx.split(block) for block in MODEL.blocks]
    graph = parts[0][0]
    return graph, jax.tree.map(lambda *xs: jnp.stack(xs), *[state for _, state in parts])


def scanned(x, *, remat=False):
    graph, states = stacked_blocks()
    step = lambda x, state: (nnx.merge(graph, state)(x), None)
    x, _ = lax.scan(jax.checkpoint(step) if remat else step, x, states)
    return x[:, 0].sum(-1)


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

    ws = RNG.normal(size=(LAYERS, WIDTH, 3 * WIDTH)) / WIDTH**0.5
    x = RNG.normal(size=(BATCH, TOKENS, WIDTH))
    for method in ("equal", "weighted"):
        options = {"method": method, "argnums": 0}
        streamed = attention.relevance(model, **options)(x, ws)
        stacked = attention.relevance(model, form="stacked", **options)(x, ws)
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

    got = attention.relevance(model)(X)
    assert got.dtype == jnp.float32
    with jax.default_matmul_precision("highest"):
        exact = attention.relevance(model, form="stacked")(X)
    # The forms round at different places, and bfloat16 has 8 bits: 2 parts in 100.
    np.testing.assert_allclose(got, exact, rtol=0.02, atol=0.02)


# -- sites -----------------------------------------------------------------------------------

Q = RNG.normal(size=(BATCH, TOKENS, 4, 4)).astype(np.float32)


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
    weights = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
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


def test_two_sites_in_one_scanned_body_take_turns(reference):
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
        got = attention.relevance(in_pairs, method="equal", form=form)(X)
        want = attention.relevance(one_by_one, method="equal", form=form)(X)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_a_reversed_scan_is_stacked_in_order_of_execution():
    graph, states = stacked_blocks()

    def backwards(x):
        step = lambda x, s: (nnx.merge(graph, s)(x), None)
        return lax.scan(step, x, jax.tree.map(lambda s: s[::-1], states), reverse=True)[0][
            :, 0
        ].sum(-1)

    got = attention.relevance(backwards, method="equal", form="stacked")(X)
    np.testing.assert_allclose(got, FORMS["scan"](method="equal"), rtol=1e-5, atol=1e-6)


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
        return (before + after).sum((1, 2))

    assert [stack.name for stack in attention.sites(tagged)(X)] == ["mine"]
    np.testing.assert_allclose(
        attention.relevance(tagged, attention="mine")(X),
        attention.relevance(tagged)(X),
        rtol=1e-6,
    )


def test_integer_inputs_and_embedded_tokens():
    table = RNG.normal(size=(11, WIDTH)).astype(np.float32)
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


@jax.custom_vjp
def fused(x):
    return jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x


fused.defvjp(lambda x: (fused(x), x), lambda x, g: (g,))


@pytest.mark.parametrize("method", attention.METHODS)
def test_attention_with_a_derivative_of_its_own_is_that_of_what_it_computes(method):
    explain = lambda attend: attention.relevance(
        lambda x: (x + attend(x)).sum((1, 2)), method=method
    )(X)
    np.testing.assert_allclose(explain(fused), explain(fused.fun), rtol=1e-6, atol=1e-7)


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
        lambda: attention.relevance(MODELS["causal"][0])(X),
        ValueError,
        r"'weighted' needs the residual stream.*tag the stream.*'attention/before'",
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
        "maps 5 queries to 3 keys; .* use attention.bimodal",
    ),
    "tag of another rank": (
        lambda: attention.relevance(lambda x: jaxrel.tag(x[0, 0], "a").sum(), attention="a")(X),
        ValueError,
        r"tagged 'a' at .* has shape \(8,\); an attention map is \[batch, heads, query, key\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


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


# -- models that structure must not mistake -----------------------------------------------------

LEFT = RNG.normal(size=(6, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5


def attend(x, i, memory=None, name=None):
    """Single-head attention of its own weights; `memory` makes it cross-attention."""
    keys = x if memory is None else memory
    attn = jax.nn.softmax((x @ LEFT[i]) @ keys.swapaxes(-1, -2))
    return (jaxrel.tag(attn, name) if name else attn) @ keys


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

    weights = jnp.asarray(LEFT)

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

    for method in ("equal", "weighted", "raw", "no_aggregation"):
        got = attention.relevance(nested, method=method, form="stacked")(X)
        want = attention.relevance(flat, method=method, form="stacked")(X)
        # float32 through nine layers; another order of layers is off by parts in ten.
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)


def test_a_choice_of_layers_in_a_cond_is_refused():
    def model(x):
        layer = lambda x, i: (lax.cond(i == 1, lambda x: x + attend(x, 0), lambda x: x, x), None)
        return lax.scan(layer, x, jnp.arange(3))[0][:, 0].sum(-1)

    want = attention.relevance(lambda x: (x + attend(x, 0))[:, 0].sum(-1), method="equal")(X)
    got = attention.relevance(model, method="equal")(X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32, other fusion
    with pytest.raises(NotImplementedError, match=r"'raw' counts the layers .* may not run"):
        attention.relevance(model, method="raw")(X)


def test_the_residual_may_be_computed_after_the_attention():
    def model(x):
        low = x.astype(jnp.bfloat16)
        x = attend(low.astype(jnp.float32), 0) + low.astype(jnp.float32)
        return x[:, 0].sum(-1)

    low = X.astype(jnp.bfloat16).astype(np.float32)
    want = attention.relevance(lambda x: (x + attend(x, 0))[:, 0].sum(-1))(low)
    np.testing.assert_allclose(attention.relevance(model)(X), want, rtol=1e-5, atol=1e-6)


def test_parallel_blocks_and_two_attentions_are_self_attention():
    parallel = lambda x: (x + (attend(x, 0) + jax.nn.gelu(x @ LEFT[1])))[:, 0].sum(-1)
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


LOUD = {
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
    "target_token": (
        lambda: attention.relevance(scanned, target_token="mean")(X),
        ValueError,
        "target_token must be a token's index, or one per example, got 'mean'",
    ),
}


def two_forms(x):
    attn = jax.nn.softmax(x @ x.swapaxes(-1, -2))
    return attn @ x + (attn * 0.5) @ (x * 2)


@pytest.mark.parametrize(("call", "error", "text"), LOUD.values(), ids=LOUD.keys())
def test_what_cannot_be_told_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def tagged_model(p, x):
    """Two layers of attention over one stream; the maps are tagged."""

    def layer(x, p):
        q, k, v = (x @ p[name] for name in "qkv")
        maps = jaxrel.tag(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2)[:, None], "maps")
        return x + jnp.tanh((maps @ v[:, None])[:, 0] @ p["o"]), None

    return jax.lax.scan(layer, x, p)[0][:, 0].sum(-1)


def tagged_params():
    keys = jax.random.split(jax.random.key(3), 4)
    return {n: jax.random.normal(k, (2, 6, 6)) / 2 for n, k in zip("qkvo", keys, strict=True)}


@pytest.mark.parametrize("rules", [None, jaxrel.composites.epsilon_plus()], ids=["attn", "plus"])
def test_methods_that_read_the_maps_relevance(rules):
    p, x = tagged_params(), jax.random.normal(jax.random.key(4), (3, 5, 6))
    composite = rules or jaxrel.composites.attn_lrp()
    _, places = jaxrel.lrp(tagged_model, composite, argnums=1, at="maps")(p, x)
    _, _, grads = jaxrel.capture_with_grad(tagged_model, "maps")(p, x)
    explain = attention.relevance(
        tagged_model, method=("equal_lrp", "partial_lrp", "equal"), rules=rules, argnums=1
    )
    found = jax.jit(explain)(p, x)
    wanted = {
        "equal_lrp": attention.equal(places["maps"], grads["maps"])[:, 0],
        "partial_lrp": places["maps"][-1].mean(1)[:, 0],
    }
    for method, want in wanted.items():
        # float32: another order of the same sums.
        np.testing.assert_allclose(found[method], want, rtol=2e-5, atol=1e-6)
    assert not np.allclose(found["equal_lrp"], found["equal"], rtol=1e-2)


def test_maps_relevance_of_integer_tokens():
    p = tagged_params()
    table = jax.random.normal(jax.random.key(5), (9, 6))
    tokens = jnp.array([[1, 2, 3, 4, 0], [5, 6, 7, 8, 8]])

    def fun(p, tokens):
        return tagged_model(p["layers"], p["table"][tokens])

    embedded = attention.relevance(tagged_model, method="equal_lrp", argnums=1)
    found = attention.relevance(fun, method="equal_lrp", argnums=1)(
        {"layers": p, "table": table}, tokens
    )
    np.testing.assert_allclose(found, embedded(p, table[tokens]), rtol=2e-5, atol=1e-6)


def test_rules_that_differ_by_layer_are_refused_for_maps():
    p, x = tagged_params(), jnp.ones((1, 3, 6))
    rules = [(jaxrel.layer(0), jaxrel.rules.ZPlus()), (jaxrel.everything(), jaxrel.rules.Epsilon())]
    explain = attention.relevance(tagged_model, method="equal_lrp", rules=rules, argnums=1)
    with pytest.raises(NotImplementedError, match="cut the scan over layers"):
        explain(p, x)
