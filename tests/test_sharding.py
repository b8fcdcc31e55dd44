"""A batch that is sharded over a mesh, explicit or automatic, has the relevance of one that is not.

In an explicit mesh (`jax.make_mesh`'s default) the sharding is part of an array's type: what a loop
carries, what a branch returns and what goes backward must have it too.
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

import jaxrel
from jaxrel import attention, composites, gradients, rules
from jaxrel.attention.carrier import accumulate, seed, weigh, zeros

DEVICES, TOKENS, WIDTH, HEADS, LAYERS = 8, 4, 6, 2, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = normal(DEVICES, TOKENS, WIDTH)
IMAGE = np.abs(normal(DEVICES, 6, 6, 2))
WEIGHTS = {
    "qkv": normal(LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": normal(LAYERS, HEADS, WIDTH // HEADS, WIDTH),
    "mlp": 0.5 * normal(LAYERS, WIDTH, WIDTH),
}
ENDS = np.arange(DEVICES) % TOKENS


def self_attention(x, w, name="attn"):
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dnhe->nbhte", x, w["qkv"]), 0, 0)
    scores = jnp.einsum("bhqe,bhke->bhqk", q, k)
    attn = jaxrel.tag(jax.nn.softmax(scores), name)
    return jnp.einsum("bhqk,bhke,hed->bqd", attn, v, w["out"])


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def layer(x, w):
    x = x + self_attention(norm(x), w)
    return x + jax.nn.gelu(x @ w["mlp"])


def scanned(x, *, wrap=lambda f: f, reverse=False):
    step = wrap(lambda x, w: (layer(x, w), None))
    x, _ = lax.scan(step, x, jax.tree.map(jnp.asarray, WEIGHTS), reverse=reverse)
    return x[:, 0].sum(-1)


def unrolled(x):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda w: w[i], WEIGHTS))
    return x[:, 0].sum(-1)


def branching(x):
    def step(x, w):
        even, w = w
        return lax.cond(even, lambda x: layer(x, w), lambda x: x + jnp.tanh(x @ w["mlp"]), x), None

    even = jnp.arange(LAYERS) % 2 == 0
    x, _ = lax.scan(step, x, (even, jax.tree.map(jnp.asarray, WEIGHTS)))
    return x[:, 0].sum(-1)


MODELS = {
    "scan": scanned,
    "reversed scan": functools.partial(scanned, reverse=True),
    "remat": functools.partial(scanned, wrap=jax.checkpoint),
    "cond": branching,
    "unrolled": unrolled,
    "vmap inside": lambda x: jax.vmap(lambda x: scanned(x[None])[0])(x),
}

ANY = ("equal", "weighted", "rollout")

ATTENTION = {
    f"{name}, {form}": attention.relevance(model, method=method, **options)
    for name, model in MODELS.items()
    for form, method, options in (
        ("equal", "equal", {}),
        ("weighted", "weighted", {"readout": ENDS}),
        ("stacked", attention.METHODS if name != "cond" else ANY, {"readout": ENDS, "form": "stacked"}),
    )
} | {
    "whole matrices": attention.relevance(scanned, method=attention.METHODS, readout=None, layers=[0, 2], heads=[1]),
    "vmap outside": lambda x: jax.vmap(lambda x: attention.relevance(scanned)(x[None])[0])(x),
    "vmap outside stacked": lambda x: jax.vmap(lambda x: attention.relevance(scanned, form="stacked")(x[None])[0])(x),
}

MAPS = np.moveaxis(RNG.dirichlet(np.ones(TOKENS), (DEVICES, 3, 2, TOKENS)), 0, 1).astype(np.float32)
GRADS = normal(*MAPS.shape)
VALUES = normal(3, DEVICES, TOKENS, WIDTH), normal(3, DEVICES, TOKENS, WIDTH), normal(3, DEVICES, TOKENS, WIDTH)
def kind(count, q, k):
    attn = np.moveaxis(RNG.dirichlet(np.ones(k), (DEVICES, count, 2, q)), 0, 1).astype(np.float32)
    return attention.Layers(attn, normal(*attn.shape), *(normal(count, DEVICES, q, 5) for _ in range(3)))

PAIRS = {"s": kind(2,3,3), "q": kind(1,4,4), "cross": attention.CoAttention(kind(2,3,4), kind(2,3,3), kind(1,4,3), kind(1,4,4)),
  "encoder": kind(2,4,4)}


def first_axes(fun):
    """Batch is axis 1 of the maps: put it there."""
    def run(batch_first):
        return fun(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), batch_first))
    return run

def batch_first(tree):
    return jax.tree.map(lambda x: np.moveaxis(x, 1, 0), tree)

FROM_MAPS = {
    "maps": (first_axes(lambda m: {
        "equal": attention.equal(*m[:2]),
        "weighted": attention.weighted(*m[:2], before=m[2], after=m[3], value_grad=m[4]),
        "raw": attention.raw(m[0]), "rollout": attention.rollout(m[0]), "cam": attention.grad_cam(*m[:2]),
        "none": attention.no_aggregation(*m[:2], heads=[0]),
        "row": attention.row(attention.equal(*m[:2]), ENDS),
        "row0": attention.row(attention.equal(*m[:2], layers=[1]), 0),
    }), batch_first((MAPS, GRADS, *VALUES))),
    "two": (first_axes(lambda p: {
        str((importance, norm)): (
        attention.bimodal(p["s"], p["q"], p["cross"], importance=importance, normalise=norm, readout=0),
        attention.bimodal(p["s"], None, p["cross"], importance=importance, normalise=norm, readout=np.arange(8)%3),
        attention.encoder_decoder(p["encoder"], p["s"], p["cross"].s_cross, importance=importance, normalise=norm),
        attention.two_streams([[{"ss": p["s"]}], [{"sq": p["cross"].s_cross}]], importance=importance, normalise=norm, residual=False),
        attention.cross_rollout(p["s"].attn, p["cross"].s_cross.attn, p["encoder"].attn),
        )
        for importance in (None, "grad_value") for norm in (True, False)}), batch_first(PAIRS)),
}
def threaded(block=None, readout=0, **options):
    """Relevance by a carrier that the model threads through its layers itself."""
    def explain(x):
        def model(x, carrier):
            for i in range(LAYERS):
                w = jax.tree.map(lambda w: w[i], WEIGHTS)
                q, k, v = jnp.moveaxis(jnp.einsum("btd,dnhe->nbhte", x, w["qkv"]), 0, 0)
                if block:
                    out, carrier = attention.blockwise(q, k, v, carrier, block=block, **options)
                else:
                    carrier, attn = accumulate(carrier, jax.nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k)))
                    out = jnp.einsum("bhqk,bhke->bhqe", attn, v)
                after = jnp.einsum("bhqe,hed->bqd", out, w["out"])
                carrier, after = weigh(carrier, x, after)
                x = x + after
            return x[:, 0].sum(-1), carrier
        start = zeros(len(x), TOKENS, like=x)
        (out, _), pullback = jax.vjp(model, x, start)
        return pullback((jnp.ones_like(out), seed(readout, batch=len(x), tokens=TOKENS, like=x)))
    return explain

CARRIER = {
    "carrier": threaded(), "blockwise": threaded(3), "blockwise causal": threaded(2, causal=True, readout=ENDS),
    "blockwise mask": threaded(3, mask=np.ones((8, TOKENS), bool)),
}

def mlp(x):
    x = x.reshape(len(x), -1)
    w = normal_fixed(x.shape[1], 7), normal_fixed(7, 5), normal_fixed(5, 3)
    for i, w in enumerate(w):
        x = x @ w + 0.1
        if i < 2: x = jax.nn.relu(x)
    return x
def normal_fixed(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)

def conv(x):
    for i, c in enumerate((3, 4)):
        w = normal_fixed(3,3,x.shape[-1],c)
        x = lax.conv_general_dilated((x - 0.2) / 0.7 if i == 0 else x, w, (1,1), "SAME", dimension_numbers=("NHWC","HWIO","NHWC"))
        x = x * np.float32([1.1]*c) + np.float32([0.1]*c)
        x = jax.nn.relu(jaxrel.tag(x, f"conv{i}"))
    x = lax.reduce_window(x, -np.inf, lax.max, (1,2,2,1), (1,2,2,1), "VALID")
    x = lax.reduce_window(x, 0., lax.add, (1,3,3,1), (1,1,1,1), "VALID") / 9
    return x.reshape(len(x), -1) @ normal_fixed(4, 3)

def recurrent(x):
    w, u = normal_fixed(WIDTH, 4*5), normal_fixed(5, 4*5)
    def step(state, x):
        h, c = state
        i, f, o, g = jnp.split(x @ w + h @ u, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h
    start = jnp.zeros_like(x[:, 0, :5])
    (h, _), _ = lax.scan(step, (start, start), x.swapaxes(0, 1))
    return h

CONV_RULES = {
  "epsilon": rules.Epsilon(), "gamma": rules.Gamma(), "alpha-beta": rules.AlphaBeta(), "z+": rules.ZPlus(), "zabs": rules.ZAbsolute(),
  "exc": rules.ExcitationBackprop(), 
}
def with_first(rule):
    return composites.Composite([(jaxrel.first(), rule)]) + composites.epsilon_plus()

LRP = {}
for n, r in CONV_RULES.items():
    LRP[f"conv {n}"] = (jaxrel.lrp(conv, composites.Composite([(jaxrel.op("conv", "dense"), r)]) + composites.epsilon_plus()), IMAGE)
for n, r in {"flat": rules.Flat(), "wsq": rules.WSquare(), "box": rules.ZBox(-1., [1., 2.])}.items():
    LRP[f"conv first {n}"] = (jaxrel.lrp(conv, with_first(r)), IMAGE)
    LRP[f"mlp first {n}"] = (jaxrel.lrp(mlp, with_first(r) if n != 'box' else with_first(rules.ZBox(-1., 1.))), IMAGE)
for n in ("epsilon_plus","epsilon_plus_flat","epsilon_alpha2_beta1","epsilon_alpha2_beta1_flat","excitation_backprop","guided_backprop","deconvnet","beta_smooth"):
    LRP[f"conv {n}"] = (jaxrel.lrp(conv, getattr(composites, n)()), IMAGE)
LRP["conv box"] = (jaxrel.lrp(conv, composites.epsilon_gamma_box(-1., 1.)), IMAGE)
for n in ("attn_lrp", "cp_lrp", "captioning"):
    for m, f in MODELS.items():
        LRP[f"{m} {n}"] = (jaxrel.lrp(f, getattr(composites, n)()), X)
for n in ("attn_lrp", "captioning"):
    LRP[f"lstm {n}"] = (jaxrel.lrp(recurrent, getattr(composites, n)()), X)
LRP["layerrule"] = (jaxrel.lrp(scanned, composites.Composite([(jaxrel.layer(0), rules.Epsilon(0.1)), (jaxrel.first(), rules.Flat())]) + composites.attn_lrp()), X)
LRP["value"] = (jaxrel.value_and_lrp(lambda x: (conv(x), x * 2), composites.epsilon_plus_flat(), has_aux=True, at=("conv0","conv1")), IMAGE)
LRP["seed"] = (lambda x: jaxrel.lrp(conv, composites.epsilon_plus_flat())(x, seed=lambda out: out * jax.nn.one_hot(out.argmax(-1), 3)), IMAGE)
LRP["seed array"] = (lambda x: jaxrel.lrp(conv, composites.epsilon_plus_flat())(x, seed=np.eye(3, dtype=np.float32)[np.arange(8)%3]), IMAGE)
LRP["vmap"] = (lambda x: jax.vmap(jaxrel.lrp(lambda x: conv(x[None])[0], composites.epsilon_plus_flat()))(x), IMAGE)
def vjp(x):
    value, explain = jaxrel.lrp_vjp(conv, composites.epsilon_plus_flat())(x)
    return value, explain(value), jax.vmap(explain)(jnp.eye(3)[:, None] * value)
LRP["vjp"] = (vjp, IMAGE)
def params(x):
    w = {"a": normal_fixed(WIDTH, 5), "b": normal_fixed(5, 3)}
    f = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"]
    return jaxrel.lrp(f, composites.epsilon_plus(), argnums=1, at=jaxrel.path("*"))(w, x)
LRP["params"] = (params, X)
LRP["conservation"] = (lambda x: jax.tree.map(np.asarray, [(b.received, b.passed, b.bias, b.stabiliser, b.rule) for b in jaxrel.conservation(conv, composites.epsilon_plus())(x).balances]) , IMAGE)
from jaxrel.lrp.conservation import value_and_measured_lrp
LRP["measured"] = (value_and_measured_lrp(conv, composites.epsilon_plus_flat()), IMAGE)
LRP["measured2"] = (lambda x: (lambda a,b,c: (a,b,c['relevance']))(*value_and_measured_lrp(scanned, composites.attn_lrp())(x)), X)
LRP["measured"] = (lambda x: (lambda a,b,c: (a,b,c['relevance']))(*value_and_measured_lrp(conv, composites.epsilon_plus_flat())(x)), IMAGE)

GRAD = {
 "gradient": (gradients.gradient(conv), IMAGE), "ixg": (gradients.input_x_gradient(scanned), X),
 "sg": (lambda x: gradients.smooth_grad(conv, samples=3)(jax.random.key(0), x), IMAGE),
 "sg2": (lambda x: gradients.smooth_grad(lambda x: conv(x).sum(), samples=3, squared=True)(jax.random.key(0), x), IMAGE),
 "ig": (lambda x: gradients.integrated_gradients(conv, steps=3)(x, seed=lambda out: jax.nn.one_hot(out.argmax(-1), 3)), IMAGE),
 "ig2": (gradients.integrated_gradients(scanned, steps=3, baseline=normal_fixed(TOKENS, WIDTH)), X),
 "ig3": (gradients.integrated_gradients(scanned, steps=3, baseline=X*.5), X),
 "gb": (gradients.guided_backprop(conv), IMAGE), "dn": (gradients.deconvnet(conv), IMAGE),
 "gc": (gradients.grad_cam(conv, "conv1"), IMAGE), "gc2": (gradients.grad_cam(conv, "conv1", size=(12, 12)), IMAGE),
 "ggc": (lambda x: gradients.guided_grad_cam(conv, "conv1")(x, seed=np.eye(3, dtype=np.float32)[np.arange(8)%3]), IMAGE),
 "ints": (lambda x: gradients.gradient(lambda d: conv(d["x"]) + d["n"][:, None])({"x": x, "n": (x[:, 0, 0, 0] > 0).astype(int)}), IMAGE),
}
CAPT = {}
for n, f in MODELS.items():
    if n == "vmap inside": continue
    CAPT[f"capture {n}"] = (jaxrel.capture(f), X)
    CAPT[f"capgrad {n}"] = (jaxrel.capture_with_grad(f, "attn"), X)

CASES = {n: (f, X) for n, f in (ATTENTION | CARRIER).items()} | FROM_MAPS | LRP | GRAD | CAPT

MESHES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


@functools.cache
def expected(case):
    explain, x = CASES[case]
    return (explain if "conservation" in case else jax.jit(explain))(x)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_sharded(case, kind, context, jit):
    explain, x = CASES[case]
    if jit and "conservation" in case: return
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(MESHES[kind],))
    x = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), x)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        found = (jax.jit(explain) if jit else explain)(x)
    want = expected(case)
    def check(path, a, b):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * scale, err_msg=str(path))
    jax.tree_util.tree_map_with_path(check, found, want)
