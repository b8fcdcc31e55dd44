"""LRP on many architectures: what must hold whatever the model is."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, everything, layer, op, rules
from tests.zoo import BIAS_FREE, ZOO

# Many models: of a stage of .ci/run, and not of `make test`.
pytestmark = pytest.mark.zoo

# Two networks take as long to compile as all others together. They are in the tests that ask
# whether relevance is right, and not in those that ask whether JAX's transformations agree.
HEAVY = {"vgg16", "resnet50"}
LIGHT = sorted(set(ZOO) - HEAVY)

# `epsilon_plus` and `epsilon_alpha2_beta1` are parts of those with Flat.
PRESETS = {
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(-5.0, 5.0),
    "excitation_backprop": composites.excitation_backprop(),
    "attn_lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "captioning": composites.captioning(),
    "guided_backprop": composites.guided_backprop(),
    "deconvnet": composites.deconvnet(),
    "beta_smooth": composites.beta_smooth(),
}
SUITED = {"rectifier": "epsilon_plus_flat", "attention": "attn_lrp", "recurrent": "captioning"}
CONVOLUTIONAL = ("epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box")
PER_LAYER = composites.Composite(
    [
        (layer(1) & op("dense"), rules.Gamma(0.5)),
        (layer(slice(2, None)) & op("dense"), rules.ZPlus()),
    ]
)


def jit(fun):
    """`jax.jit` that compiles two to three times faster: these programs run once, and briefly."""
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def case(name, dtype="float64"):
    with jax.enable_x64(dtype == "float64"):
        return (ZOO | BIAS_FREE)[name](jax.random.key(0), jnp.dtype(dtype))


def suited(a):
    return PRESETS[SUITED[a.family]]


def lrp(a, composite):
    return jaxrel.lrp(a.fun, composite, argnums=1)


@functools.cache
def exact(name):
    """The relevance under the suited composite, compiled, in float64."""
    a = case(name)
    with jax.enable_x64(True):
        return jit(lrp(a, suited(a)))(a.params, a.x)


def error(actual, expected):
    """The greatest difference, in units of the greatest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.any(expected != 0)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def rounding(a, operations):
    """The rounding of so many operations in a row, in the dtype that the case computes in."""
    return operations * float(jnp.finfo(a.dtype).eps)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_gradient_rule_is_the_gradient(x64, name):
    a = case(name)

    @jit
    def both(params, x):
        gradient = jax.grad(lambda x: jnp.sum(a.fun(params, x)))(x)
        modified = jaxrel.modified_gradient(a.fun, rules.Gradient(), argnums=1)(params, x)
        return lrp(a, rules.Gradient())(params, x), modified, gradient

    relevance, modified, gradient = both(a.params, a.x)
    # The same operations, but that patches are a product: its sums have an order of their own, and
    # XLA is free to fuse the rest.
    assert error(modified, gradient) <= rounding(a, 8)
    assert error(relevance, a.x * gradient) <= rounding(a, 8)


@pytest.mark.parametrize(
    "name", ["deep_mlp", "equinox", "gru_rnn", "kernel_first", "linen", "llama", "tied", "vit"]
)
def test_jit_is_eager(x64, name):
    a = case(name)
    assert error(exact(name), lrp(a, suited(a))(a.params, a.x)) <= rounding(a, 1e4)


@pytest.mark.parametrize("name", LIGHT)
def test_batch_is_one_by_one_is_vmap(x64, name):
    a = case(name)
    relevance = lrp(a, suited(a))
    one = jit(lambda params, x: relevance(params, x[None])[0])
    loop = jnp.stack([one(a.params, x) for x in a.x])
    vmapped = jit(lambda params, x: jax.vmap(lambda x: relevance(params, x[None])[0])(x))
    assert error(exact(name), loop) <= rounding(a, 1e4)
    assert error(vmapped(a.params, a.x), loop) <= rounding(a, 1e4)


@pytest.mark.parametrize("name", ["deep_mlp", "llama"])
@pytest.mark.parametrize(
    "composite",
    [
        PRESETS["epsilon_plus_flat"],
        PRESETS["attn_lrp"],
        PRESETS["cp_lrp"],
        PER_LAYER + PRESETS["attn_lrp"],
    ],
    ids=["epsilon_plus_flat", "attn_lrp", "cp_lrp", "per_layer"],
)
def test_scan_is_remat_is_unrolled(x64, name, composite):
    a = case(name)
    expected = jit(lrp(a, composite))(a.params, a.x)
    for fun, params in a.forms.values():
        relevance = jit(jaxrel.lrp(fun, composite, argnums=1))(params, a.x)
        assert error(relevance, expected) <= rounding(a, 1e4)


def test_zeros_take_their_share_in_a_scan(x64):
    a = case("deep_mlp")
    x = a.x.at[:, 0].set(0)
    fun, params = a.forms["unrolled"]
    expected = jaxrel.lrp(fun, PRESETS["epsilon_plus_flat"], argnums=1)(params, x)
    assert np.all(expected[:, 0] != 0)
    found = lrp(a, PRESETS["epsilon_plus_flat"])(a.params, x)
    assert error(found, expected) <= rounding(a, 1e4)


def test_per_layer_rules_change_the_relevance(x64):
    a = case("llama")
    plain = jit(lrp(a, PRESETS["attn_lrp"]))(a.params, a.x)
    assert error(jit(lrp(a, PER_LAYER + PRESETS["attn_lrp"]))(a.params, a.x), plain) > 1e-2


@pytest.mark.parametrize("name", LIGHT)
def test_bfloat16(name):
    a = case(name, "bfloat16")
    relevance = jit(lrp(a, suited(a)))(a.params, a.x)
    assert relevance.dtype == jnp.float32
    actual, expected = np.asarray(relevance, np.float64), np.asarray(exact(name), np.float64)
    cosine = np.sum(actual * expected) / np.linalg.norm(actual) / np.linalg.norm(expected)
    # Measured: 0.9995 and 0.05 at worst (many layers of few channels), 0.9999 and 0.01 usually.
    assert cosine > 0.999
    assert error(actual, expected) < 0.08


# A small stabiliser has derivatives as large as its inverse, which no difference can follow.
SMOOTH = {
    "rectifier": composites.epsilon_plus_flat(1.0, 1.0),
    "attention": composites.attn_lrp(1.0),
    "recurrent": composites.captioning(1.0),
}


@pytest.mark.parametrize(
    "name",
    ["deep_mlp", "group_norm", "gru_rnn", "linen", "llama", "lstm", "vit"],
)
def test_gradient_of_relevance(x64, name):
    a = case(name)
    relevance = lrp(a, SMOOTH[a.family])
    floats = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)) if floats(leaf) else 0, a.params
    )

    def size(step):
        along = lambda leaf, d: leaf + step * d if floats(leaf) else leaf
        params = jax.tree.map(along, a.params, direction)
        return jnp.sum(relevance(params, a.x) ** 2)

    step = 1e-6
    plus, minus = jit(jax.vmap(size))(jnp.array([step, -step]))
    numeric = (plus - minus) / (2 * step)
    # The central difference errs by step² (third derivative) and by eps / step (rounding).
    np.testing.assert_allclose(jit(jax.grad(size))(0.0), numeric, rtol=1e-6)


# `clip_text` and `lstm_rnn` are other spellings of what `clip_image` and `lstm` are.
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"clip_text", "lstm_rnn"}))
def test_all_presets_are_finite(name):
    a = case(name, "float32")
    presets = {
        preset: composite
        for preset, composite in PRESETS.items()
        if name not in HEAVY | {"resnet18"} or preset in CONVOLUTIONAL
    }
    # One program, in which the presets share the forward pass: half the time of one for each.
    explain = lambda *args: {
        preset: lrp(a, preset_rules)(*args) for preset, preset_rules in presets.items()
    }
    for preset, relevance in jit(explain)(a.params, a.x).items():
        assert relevance.shape == a.x.shape, preset
        assert np.all(np.isfinite(relevance)), preset
        assert np.any(relevance != 0), preset


CONSERVING = {
    "rectifier": [rules.Epsilon(1e-12), rules.Gamma(0.25, 1e-12)],
    "attention": [composites.cp_lrp(1e-12)],
    "recurrent": [
        composites.Composite(
            [(op("product"), rules.SignalTakesAll()), (everything(), rules.Epsilon(1e-12))]
        )
    ],
}


def lost(a, composite, seed=None):
    """What relevance loses on its way, against the greatest relevance of a logit."""
    compute = jit(jaxrel.value_and_lrp(a.fun, composite, argnums=1))
    value, relevance = compute(a.params, a.x, seed=seed)
    started = value if seed is None else seed
    arrived = jnp.sum(relevance, axis=tuple(range(1, a.x.ndim)))
    return jnp.max(jnp.abs(jnp.sum(started, axis=1) - arrived)) / jnp.max(jnp.abs(started))


@pytest.mark.parametrize("name", sorted(BIAS_FREE))
def test_relevance_sums_to_the_logits(x64, name):
    a = case(name)
    assert a.conserves
    for composite in CONSERVING[a.family]:
        # The stabilisers are 1e-12 of values of order 1 (the smallest of 1e-2), once per layer.
        assert lost(a, composite) < 1e-10, composite


@pytest.mark.parametrize(
    "name", ["deep_mlp_bias_free", "kernel_first_bias_free", "vgg16_bias_free"]
)
def test_zplus_sums_to_the_positive_logits(x64, name):
    a = case(name)
    # A negative logit, or residual branch, of few inputs need not have any positive contribution.
    seed = jnp.maximum(a.fun(a.params, a.x), 0)
    assert lost(a, rules.ZPlus(1e-12), seed) < 1e-10


@pytest.mark.parametrize(
    "name", ["clip_image", "deep_mlp", "equinox", "group_norm", "gru_rnn", "llama", "vit"]
)
def test_vmap_over_targets_is_one_by_one(x64, name):
    a = case(name)
    out = a.fun(a.params, a.x)
    seeds = jax.nn.one_hot(jnp.arange(out.shape[1]), out.shape[1], dtype=out.dtype)[:, None] * out
    relevance = lambda seed: lrp(a, suited(a))(a.params, a.x, seed=seed)
    one = jit(relevance)
    loop = jnp.stack([one(seed) for seed in seeds])
    together = jit(jax.vmap(relevance))(seeds)
    assert error(together, loop) <= rounding(a, 1e4)
    # Relevance is linear in the seed.
    assert error(jnp.sum(together, axis=0), one(out)) <= rounding(a, 1e4)


def random_network(seed, blocks, width, two_signs):
    """A bias-free network of convolutions, dense layers and residual sums, and an input.

    With `two_signs`, every value gets contributions of both signs, which AlphaBeta needs: the
    input and the activations are positive, and each kernel has both signs where it is not
    padded.
    """
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        values = rng.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5
        if two_signs:
            centre = (1, 1) if len(shape) == 4 else ()
            values[(*centre, 0)] = np.abs(values[(*centre, 0)]) + 0.1
            values[(*centre, 1)] = -np.abs(values[(*centre, 1)]) - 0.1
        return jnp.asarray(values)

    activation = jnp.abs if two_signs else jax.nn.relu
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    kernels = [kernel(3, 3, width, width) if "conv" in b else kernel(width, width) for b in blocks]
    # Without negative logits all relevance reaches a ReLU's positive side, as ZPlus needs.
    head = jnp.abs(kernel(width, 3)) if not two_signs else kernel(width, 3)

    def fun(params, x):
        for block, w in zip(blocks, params["blocks"], strict=True):
            y = activation(convolve(x, w) if "conv" in block else x @ w)
            x = x + y if "residual" in block else y
        return jnp.mean(x, axis=(1, 2)) @ params["head"]

    x = rng.normal(size=(2, 4, 4, width))
    x = jnp.asarray(np.abs(x) + 0.1 if two_signs else x)
    return fun, {"blocks": kernels, "head": head}, x


@pytest.mark.parametrize(
    "rule",
    [
        rules.Epsilon(1e-12),
        rules.ZPlus(1e-12),
        rules.Gamma(0.25, 1e-12),
        rules.AlphaBeta(2.0, 1.0, 1e-12),
    ],
    ids=lambda rule: type(rule).__name__,
)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    blocks=st.lists(
        st.sampled_from(["conv", "dense", "residual conv", "residual dense"]),
        min_size=1,
        max_size=4,
    ),
    width=st.integers(2, 5),
)
def test_random_networks_conserve(rule, seed, blocks, width):
    with jax.enable_x64(True):
        two_signs = isinstance(rule, rules.AlphaBeta)
        fun, params, x = random_network(seed, blocks, width, two_signs)
        value, relevance = jit(jaxrel.value_and_lrp(fun, rule, argnums=1))(params, x)
        lost = jnp.sum(value, axis=1) - jnp.sum(relevance, axis=(1, 2, 3))
        # Shares of both signs cancel: what is lost is measured against what was shared.
        assert jnp.max(jnp.abs(lost)) <= 1e-9 * (1e-6 + jnp.sum(jnp.abs(relevance)))
