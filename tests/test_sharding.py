"""A batch sharded over a mesh, explicit or automatic, has the relevance of one that is not.

In an explicit mesh (`jax.make_mesh`'s default) the sharding is part of an array's type: what a
loop carries, what a branch returns and what goes backward must have it too.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

import jaxrel
from jaxrel import attention, composites, gradients, rules
from jaxrel.attention import streaming
from jaxrel.explanations.explain import token_relevance
from jaxrel.explanations.words import word_relevance
from jaxrel.propagation.conservation import value_and_measured_lrp
from jaxrel.tracing.sharding import shard_rows
from tests.paths import SAMPLES
from tests.zoo.captioners import captioner
from tests.zoo.clipmappers import random_mapper
from tests.zoo.clips import small_clip

BATCH, TOKENS, WIDTH, HEADS, LAYERS, CLASSES = 8, 4, 6, 2, 2, 3
RNG = np.random.default_rng(0)

pytestmark = [pytest.mark.usefixtures("quick_compile"), pytest.mark.devices(8)]


def normal(*shape):
    return 0.3 * RNG.normal(size=shape)


X = normal(BATCH, TOKENS, WIDTH)
IMAGE = np.abs(normal(BATCH, 6, 6, 2))
ENDS = np.arange(BATCH) % TOKENS
LABELS = np.eye(CLASSES)[np.arange(BATCH) % CLASSES]
WEIGHTS = {
    "qkv": normal(LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": normal(LAYERS, HEADS, WIDTH // HEADS, WIDTH),
    "mlp": normal(LAYERS, WIDTH, WIDTH),
}
KERNELS = normal(3, 3, 2, 3), normal(3, 3, 3, 4)
DENSE = normal(TOKENS * WIDTH, 7), normal(7, CLASSES)
HEAD = normal(4, CLASSES)
GATES = normal(3, 2 * WIDTH, WIDTH)


# ---- models


def weights_of(i):
    return {name: w[i] for name, w in WEIGHTS.items()}


def queries_keys_values(x, w):
    return jnp.moveaxis(jnp.einsum("btd,dnhe->nbhte", x, w["qkv"]), 0, 0)


def layer(x, w):
    h = x - x.mean(-1, keepdims=True)
    h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)
    q, k, v = queries_keys_values(h, w)
    attn = jaxrel.tag(jax.nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k)), "attn")
    x = x + jnp.einsum("bhqk,bhke,hed->bqd", attn, v, w["out"])
    return x + jax.nn.gelu(x @ w["mlp"])


def scanned(x, *, wrap=lambda step: step, reverse=False):
    x, _ = lax.scan(wrap(lambda x, w: (layer(x, w), None)), x, WEIGHTS, reverse=reverse)
    return x[:, 0].sum(-1)


def nested(x):
    pairs = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), WEIGHTS)
    step = lambda x, w: (layer(x, w), None)
    x, _ = lax.scan(lambda x, pair: lax.scan(step, x, pair), x, pairs)
    return x[:, 0].sum(-1)


def branching(x):
    def step(x, w):
        even, w = w
        return lax.cond(even, lambda x: layer(x, w), lambda x: x + jnp.tanh(x @ w["mlp"]), x), None

    x, _ = lax.scan(step, x, (np.arange(LAYERS) % 2 == 0, WEIGHTS))
    return x[:, 0].sum(-1)


def unrolled(x):
    for i in range(LAYERS):
        x = layer(x, weights_of(i))
    return x[:, 0].sum(-1)


MODELS = {
    "scan": scanned,
    "reversed scan": functools.partial(scanned, reverse=True),
    "nested scans": nested,
    "remat": functools.partial(scanned, wrap=jax.checkpoint),
    "cond": branching,
    "unrolled": unrolled,
    "vmap inside": lambda x: jax.vmap(lambda x: scanned(x[None])[0])(x),
}


def conv_net(x):
    x = (x - 0.2) / 0.7
    for i, w in enumerate(KERNELS):
        x = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(jaxrel.tag(x * np.linspace(0.9, 1.1, w.shape[-1]) + 0.1, f"conv{i}"))
    x = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2)) @ HEAD


def mlp(x):
    return jax.nn.relu(x.reshape(len(x), -1) @ DENSE[0] + 0.1) @ DENSE[1]


def lstm(x):
    def step(state, x):
        hidden, cell = state
        both = jnp.concatenate([x, hidden], -1)
        i, f, g = (both @ w for w in GATES)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jnp.tanh(cell), cell), None

    start = jnp.zeros_like(x[:, 0])
    return lax.scan(step, (start, start), x.swapaxes(0, 1))[0][0]


def by_layer(weights, x):
    return lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, weights["w"])[0]


# ---- what is explained, and how: functions of the batch


def of_model(model):
    def explain(x):
        methods = ("equal", "weighted", "rollout")
        return {
            "weighted": attention.relevance(model, target_token=ENDS)(x),
            "stacked": attention.relevance(model, method=methods, form="stacked")(x),
            "lrp": jaxrel.value_and_lrp(model, composites.attn_lrp())(x),
            "gradients": jaxrel.capture_with_grad(model, "attn")(x),
        }

    return explain


def other_forms(x):
    every = attention.relevance(scanned, method=attention.METHODS, target_token=ENDS)
    whole = attention.relevance(scanned, method="equal", target_token=None, layers=[1], heads=[1])
    each = jax.vmap(lambda x: attention.relevance(scanned)(x[None])[0])
    return {
        "every method": every(x),
        "whole matrix": whole(x),
        "streamed": attention.relevance(scanned, method="equal")(x),
        "by blocks": attention.relevance(scanned, form="blockwise", block=2)(x),
        "lrp by blocks": jaxrel.lrp(scanned, composites.attn_lrp(), block=2)(x),
        "vmap outside": each(x),
        "cp_lrp": jaxrel.lrp(scanned, composites.cp_lrp())(x),
        "capture": jaxrel.capture(scanned)(x),
    }


def threaded(block=None, *, target_token=0, **options):
    """Relevance by a carrier that the model threads through its layers itself."""

    def explain(x):
        def model(x, carried):
            for i in range(LAYERS):
                w = weights_of(i)
                q, k, v = queries_keys_values(x, w)
                if block:
                    out, carried = attention.blockwise(q, k, v, carried, block=block, **options)
                else:
                    attn = jax.nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k))
                    carried, attn = streaming.accumulate(carried, attn)
                    out = jnp.einsum("bhqk,bhke->bhqe", attn, v)
                after = jnp.einsum("bhqe,hed->bqd", out, w["out"])
                carried, after = streaming.weigh(carried, x, after)
                x = x + after
            return x[:, 0].sum(-1), carried

        start = streaming.zeros(len(x), TOKENS, x.dtype, like=x)
        end = streaming.seed(target_token, batch=len(x), tokens=TOKENS, dtype=x.dtype, like=x)
        (out, _), pullback = jax.vjp(model, x, start)
        return pullback((jnp.ones_like(out), end))

    return explain


def kind(count, queries, keys):
    """Maps, gradients and token values, with the batch first."""
    attn = RNG.dirichlet(np.ones(keys), (BATCH, count, HEADS, queries))
    values = (normal(BATCH, count, queries, WIDTH) for _ in range(3))
    return attention.Layers(attn, normal(*attn.shape), *values)


ONE = kind(LAYERS, TOKENS, TOKENS)
TWO = {
    "s": kind(2, 3, 3),
    "q": kind(2, 4, 4),
    "cross": attention.CoAttention(kind(2, 3, 4), kind(2, 3, 3), kind(1, 4, 3), kind(1, 4, 4)),
}


def layers_first(explain):
    return lambda maps: explain(jax.tree.map(lambda x: x.swapaxes(0, 1), maps))


@layers_first
def one_stream(maps):
    attn, grad, before, after, value_grad = maps
    values = {"before": before, "after": after, "value_grad": value_grad}
    return {
        "equal": attention.row(attention.equal(attn, grad), ENDS),
        "weights": attention.row(attention.equal(attn, grad), jnp.full((BATCH, TOKENS), 0.1)),
        "weighted": attention.weighted(attn, grad, **values, layers=[1]),
        "raw": attention.raw(attn),
        "rollout": attention.rollout(attn),
        "grad_cam": attention.grad_cam(attn, grad),
        "no_aggregation": attention.no_aggregation(attn, grad, heads=[0]),
    }


@layers_first
def bimodal_maps(maps):
    s, q, cross = maps["s"], maps["q"], maps["cross"]
    schedule = [[{"ss": s}], [{"sq": cross.s_cross}]]
    return {
        f"{importance}": (
            attention.bimodal(s, q, cross, importance=importance, target_token=0),
            attention.bimodal(s, None, cross, importance=importance, target_token=ENDS % 3),
            attention.encoder_decoder(q, s, cross.s_cross, importance=importance),
            attention.bimodal_accumulation(schedule, importance=importance, residual=False),
        )
        for importance in (None, "grad_value")
    } | {"rollout": attention.cross_rollout(s.attn, cross.s_cross.attn, q.attn)}


OF_LINEAR = (
    rules.Epsilon(),
    rules.Gamma(),
    rules.AlphaBeta(),
    rules.ZPlus(),
    rules.ZAbsolute(),
    rules.ExcitationBackprop(),
)
OF_FIRST = (rules.Flat(), rules.WSquare(), rules.ZBox(-1.0, 1.0))
PRESETS = (
    composites.epsilon_plus_flat(),
    composites.epsilon_alpha2_beta1_flat(),
    composites.epsilon_gamma_box(-1.0, 1.0),
    composites.excitation_backprop(),
    composites.beta_smooth(),
)


def lrp_rules(model):
    def explain(x):
        linear = jaxrel.op("conv", "dense")
        some = [jaxrel.Composite([(linear, rule)]) for rule in OF_LINEAR]
        some += [jaxrel.Composite([(jaxrel.first(), rule)]) for rule in OF_FIRST]
        some = [one + composites.epsilon_plus() for one in some]
        return [jaxrel.lrp(model, one)(x) for one in (*some, *PRESETS)]

    return explain


def lrp_forms(x):
    composite = composites.epsilon_plus_flat()
    aux = jaxrel.value_and_lrp(
        lambda x: (conv_net(x), 2 * x), composite, has_aux=True, at=("conv0", "conv1")
    )
    value, explain = jaxrel.lrp_vjp(conv_net, composite)(x)
    seeds = jnp.eye(CLASSES)[:, None] * value
    one_by_one = jax.vmap(jaxrel.lrp(lambda x: conv_net(x[None])[0], composite))
    return {
        "aux": aux(x),
        "seed": jaxrel.lrp(conv_net, composite)(x, seed=LABELS),
        "vjp": (value, explain(value), lax.map(explain, seeds)),
        "vmap outside": one_by_one(x),
        "integers": jaxrel.lrp(lambda d: conv_net(d["x"]) + d["n"][:, None], composite)(
            {"x": x, "n": (x[:, 0, 0, 0] > 0.1).astype(int)}
        ),
    }


def lrp_forms_of_dense(x):
    composite = composites.epsilon_plus_flat()
    value, explain = jaxrel.lrp_vjp(mlp, composite)(x)
    by_weight = jaxrel.lrp(by_layer, composites.epsilon_plus(), argnums=1, at=jaxrel.path("w"))
    apart = [(jaxrel.layer(1), rules.Gamma()), (jaxrel.first(), rules.Flat())]
    apart = jaxrel.Composite(apart) + composites.epsilon_plus()
    weights = {"w": jnp.asarray(WEIGHTS["mlp"])}
    return {
        "vmap": jax.vmap(explain)(jnp.eye(CLASSES)[:, None] * value),
        "at a parameter": by_weight(weights, x),
        "layers apart": jaxrel.lrp(by_layer, apart, argnums=1)(weights, x),
        "captioning": jaxrel.lrp(lstm, composites.captioning())(x),
        "attn_lrp": jaxrel.lrp(lstm, composites.attn_lrp())(x),
    }


def gradient_methods(x):
    key = jax.random.key(0)
    winner = lambda out: jax.nn.one_hot(out.argmax(-1), CLASSES)
    total = lambda x: conv_net(x).sum()
    half = gradients.integrated_gradients(conv_net, steps=3, baseline=IMAGE / 2)
    return {
        "gradient": gradients.gradient(conv_net)(x),
        "input_x_gradient": gradients.input_x_gradient(conv_net)(x, seed=LABELS),
        "smooth_grad": gradients.smooth_grad(conv_net, samples=3)(key, x),
        "squared": gradients.smooth_grad(total, samples=3, squared=True)(key, x),
        "integrated": gradients.integrated_gradients(conv_net, steps=3)(x, seed=winner),
        "baseline": half(x),
        "guided_backprop": gradients.guided_backprop(conv_net)(x),
        "deconvnet": gradients.deconvnet(conv_net)(x, seed=winner),
        "grad_cam": gradients.grad_cam(conv_net, "conv1", size=(12, 12))(x),
        "guided_grad_cam": gradients.guided_grad_cam(conv_net, "conv1")(x, seed=LABELS),
    }


CASES = {
    **{name: (of_model(model), X) for name, model in MODELS.items()},
    "other forms": (other_forms, X),
    "carrier": (threaded(), X),
    "blockwise": (threaded(3, mask=np.ones((BATCH, TOKENS), bool)), X),
    "causal blockwise": (threaded(2, causal=True, target_token=ENDS), X),
    "maps of one stream": (one_stream, ONE),
    "bimodal maps": (bimodal_maps, TWO),
    "rules of an MLP": (lrp_rules(mlp), X),
    "rules of a CNN": (lrp_rules(conv_net), IMAGE),
    "forms of LRP": (lrp_forms, IMAGE),
    "forms of LRP, dense": (lrp_forms_of_dense, X),
    "gradient methods": (gradient_methods, IMAGE),
}
MESHES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def make_mesh(kind):
    return jax.make_mesh((BATCH,), ("data",), axis_types=(MESHES[kind],))


def shard(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, P("data")))


def assert_same(found, expected, tolerance):
    """Equal up to a tolerance relative to each array's greatest value."""

    def check(path, a, b):
        where = jax.tree_util.keystr(path)
        scale = np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)

    jax.tree_util.tree_map_with_path(check, found, expected)


# Other ways to write the scan, with the same values: they need no programs of their own.
SAME = dict.fromkeys(("remat", "unrolled"), "scan")


@functools.cache
def expected(case):
    explain, x = CASES[case]
    return jax.jit(explain)(x)


# In an automatic mesh no type knows of the sharding: the model's form makes no difference.
BOTH = [(case, "explicit") for case in CASES]
BOTH += [(case, "auto") for case in CASES if case not in MODELS or case == "scan"]


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_a_sharded_batch_gives_the_same(case, kind, x64):
    explain, x = CASES[case]
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        found = jax.jit(explain)(shard(x, mesh))
    # float64, whose sums the partitioner may reorder.
    assert_same(found, expected(SAME.get(case, case)), 1e-11)


# Outside of jit, JAX itself differentiates no loop over an explicit mesh that is not set.
@pytest.mark.parametrize(
    ("set_mesh", "jit"),
    [(True, True), (True, False), (False, True)],
    ids=["mesh set", "op by op", "no mesh set"],
)
def test_results_stay_sharded(set_mesh, jit, x64):
    mesh = make_mesh("explicit")

    def explain(x):
        found = {"weighted": attention.relevance(scanned)(x)}
        # Op by op each loop is a program of its own: one explanation stands for all.
        if jit:
            found |= {
                "rollout": attention.relevance(scanned, method="rollout")(x),
                "lrp": jaxrel.lrp(by_layer, composites.epsilon_plus(), argnums=1)(
                    {"w": jnp.asarray(WEIGHTS["mlp"])}, x
                ),
                "gradient": gradients.gradient(scanned)(x),
                "maps": jaxrel.capture_with_grad(branching, "attn")(x)[2]["attn"].swapaxes(0, 1),
            }
        return found

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        found = (jax.jit(explain) if jit else explain)(shard(X, mesh))
    for name, relevance in found.items():
        want = NamedSharding(mesh, P("data"))
        assert relevance.sharding.is_equivalent_to(want, relevance.ndim), name
    assert_same(found, jax.jit(explain)(X), 1e-11)


def test_what_rules_lose_is_measured_over_all_devices(x64):
    def explain(x):
        value, relevance, report = value_and_measured_lrp(conv_net, composites.epsilon_plus())(x)
        return value, relevance, report["relevance"]

    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        found = jax.jit(explain)(shard(IMAGE, mesh))
    want = jax.jit(explain)(IMAGE)
    assert_same(found[:2], want[:2], 1e-11)
    # Sums over the batch, always in float32: relative to the greatest of them.
    values = [np.stack([report[name] for name in sorted(report)]) for _, _, report in (found, want)]
    np.testing.assert_allclose(*values, rtol=0, atol=2e-6 * np.abs(values[1]).max())


def test_balances_of_a_sharded_batch(x64):
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        found = jaxrel.conservation(mlp, composites.epsilon_plus())(shard(X, mesh))
    want = jaxrel.conservation(mlp, composites.epsilon_plus())(X)
    for a, b in zip(found.balances, want.balances, strict=True):
        np.testing.assert_allclose(a.received, b.received, rtol=2e-6)


def test_rows_are_shared_where_a_mesh_is_set():
    rows = {"even": X, "odd": X[1:], "number": np.float32(1)}
    assert shard_rows(rows) is rows
    mesh = make_mesh("auto")
    with jax.set_mesh(mesh):
        found = shard_rows(rows)
    assert found["even"].sharding == NamedSharding(mesh, P("data"))
    assert found["odd"] is rows["odd"]
    assert found["number"] is rows["number"]


# What makes a small model, how it is explained, and the text.
EXPLAINED = {
    "clip": (small_clip, "weighted", "a red circle"),
    "vqa": (lambda: random_mapper("vqa", layers=2), "weighted", "what is a red circle"),
    "gridtd": (lambda: captioner("gridtd"), "lrp", "a red circle"),
}


@functools.cache
def asked_of(name):
    """A model, how `explain` is asked, and what it says without a mesh."""
    make, method, text = EXPLAINED[name]
    model = make()
    images = [Image.open(path) for path in sorted(SAMPLES.glob("*.png"))]
    asked = {"image": (2 * images)[:BATCH], "text": [text] * BATCH, "method": [method]}
    return model, asked, jaxrel.explain(model, **asked)[0]


# The automatic mesh of one model stands for all: no type knows of it.
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "explicit") for name in EXPLAINED), ("clip", "auto")]
)
def test_explain_shares_its_rows(name, kind, monkeypatch):
    model, asked, want = asked_of(name)
    rows = []

    def spy(tree):
        rows.append(shard_rows(tree))
        return rows[-1]

    monkeypatch.setattr("jaxrel.explanations.tokens.shard_rows", spy)
    monkeypatch.setattr("jaxrel.explanations.captions.shard_rows", spy)
    by_row = NamedSharding(make_mesh(kind), P("data"))
    with jax.set_mesh(by_row.mesh):
        (found,) = jaxrel.explain(model, **asked)
        # The same arrays again, which are sharded, in the function for arrays.
        ((inputs, of_row, *_),) = rows
        if name == "gridtd":
            options = {"method": asked["method"], "at_once": 32 // BATCH}
            relevance = word_relevance(model, inputs, of_row, **options)
        else:
            relevance = token_relevance(model, inputs, method=asked["method"])
    for x in jax.tree.leaves((inputs, of_row, relevance)):
        assert x.sharding.is_equivalent_to(by_row, x.ndim)
    # float32: sums over at most a few hundred features, in another order on each device.
    for field in ("score", "image", "text"):
        assert_same(getattr(found, field), getattr(want, field), 1e-5)


def test_clip_says_how_it_is_sharded():
    model, asked, _ = asked_of("clip")
    inputs = model.pairs(model.prepare(image=asked["image"], text=asked["text"]))
    explain = attention.relevance(
        lambda model, inputs: model.score(inputs), target_token=None, attention=("vision", "text")
    )
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        found = jax.eval_shape(explain, model, shard(inputs, mesh))
    assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(found))
