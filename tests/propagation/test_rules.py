"""The rules, one operation at a time, against re-derivations that share nothing with them."""

import dataclasses
import functools
import math

import jax
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel.propagation.bilinear import Bilinear
from jaxrel.propagation.rules import (
    AlphaBeta,
    BetaSmooth,
    Deconvnet,
    Epsilon,
    ExcitationBackprop,
    Flat,
    Gamma,
    Gradient,
    Guided,
    Pass,
    SignalTakesAll,
    Stop,
    Uniform,
    WSquare,
    ZAbsolute,
    ZBox,
    ZPlus,
    clipped,
    scaled,
    stabilise,
)
from tests.paths import FIXTURES
from tests.propagation.by_hand import (
    BIASED,
    EPS,
    EXACT,
    OPS,
    RULES,
    SIGN_SPLIT,
    Example,
    by_hand,
    close,
    example,
    matrix,
    ready,
    relevance,
)

# Every rule against its reference.


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", RULES)
def test_reference(x64, name, op):
    biases = ("none", "fused", "ignored", "separate") if name in BIASED else ("none", "fused")
    for seed in (0, 1):
        for bias in biases:
            for nonneg in (False, True):
                chosen = {"seed": seed, "bias": bias != "none", "nonneg": nonneg}
                e, m = example(op, **chosen), matrix(op, **chosen)
                changes = {"bias": bias} if name in BIASED and bias != "none" else {}
                rule = ready(name, e, **changes)
                found = relevance(rule, e)
                # Gamma takes differences of sums over contributions, and enlarges them gamma times.
                tolerance = 100 * EXACT if name == "gamma, large" else EXACT
                close(found, by_hand(name, e, m, bias=bias), tolerance)
                if nonneg:
                    close(relevance(rule, e, nonneg=True), found, tolerance)


@pytest.mark.parametrize("bias", ["fused", "ignored", "separate"])
@pytest.mark.parametrize("nonneg", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_relu_after(x64, name, nonneg, bias):
    for op in ("dense", "conv"):
        e = example(op, nonneg=nonneg)
        e = e._replace(r=np.where(e.z > 0, e.r, 0))
        rule = ready(name, e, **({"bias": bias} if name in BIASED else {}))
        expected = relevance(rule, e, nonneg=nonneg)
        close(relevance(rule, e, nonneg=nonneg, relu_after=True), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", [*SIGN_SPLIT, "z absolute", "epsilon"])
def test_swapped_gives_each_weight_the_sum_of_its_messages(x64, name, op):
    e = example(op)
    x, w, b, z, r = (jnp.asarray(array) for array in e[1:])
    rule = ready(name, e)
    swapped = Bilinear(OPS[op][0], x).swapped(w)
    np.testing.assert_array_equal(swapped(w, x), OPS[op][0](x, w))
    found = w * rule.bwd(swapped, w, x, b, z, r / z)
    close(found, by_hand(name, e, matrix(op, of="w"), of="w"))
    # What all the inputs get together went through the weights.
    close(found.sum(), relevance(rule, e).sum())


def test_swapped_dense_messages_one_by_one(x64):
    # z = (1*2 + 3*1, 1*-1 + 3*1) = (5, 2) with w = [[2, -1], [1, 1]] and R = (10, 6). ZPlus
    # sends 10*2/5, 10*3/5 along the first column and 0, 6*3/3 along the second.
    x, w = jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -1.0], [1.0, 1.0]])
    z, r = x @ w, jnp.array([[10.0, 6.0]])
    swapped = Bilinear(OPS["dense"][0], x).swapped(w)
    found = w * ZPlus(0.0).bwd(swapped, w, x, jnp.zeros(()), z, r / z)
    np.testing.assert_allclose(found, [[4.0, 0.0], [6.0, 6.0]], rtol=1e-15)


def test_z_absolute_of_a_scale_and_a_shift(x64):
    # z = x k + b of two features. The shares of x k are 4/(4 + 1), 6/(6 + 2), all where there is no
    # shift and none of nothing; neither their signs nor that of z matter.
    x, k = jnp.array([[2.0, -3.0], [-2.0, 3.0], [0.0, 1.0], [0.0, 0.0]]), jnp.array([-2.0, 2.0])
    b = jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    z, r = x * k + b, jnp.array([[10.0, -8.0], [10.0, -8.0], [0.0, 7.0], [5.0, 0.0]])
    c = r / jnp.where(z == 0, 1, z)
    found = x * ZAbsolute(0.0).bwd(Bilinear(jnp.multiply, x), x, k, b, z, c)
    expected = [[8.0, -6.0], [8.0, -6.0], [0.0, 7.0], [0.0, 0.0]]
    np.testing.assert_allclose(found, expected, rtol=1e-15)


# Golden values.


@pytest.fixture(scope="module")
def golden():
    with np.load(FIXTURES / "lrp_rules.npz") as file:
        return {name: file[name] for name in file.files}


def layer(name):
    def linear(x, w):
        return x @ w.T

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    return linear if name.startswith("linear") else conv


LAYERS = ["linear_bias", "linear_nobias", "linear_seq_bias", "conv_bias", "conv_nobias"]


GOLDEN = {
    "epsilon": Epsilon(EPS),
    "epsilon_0_25": Epsilon(0.25),
    "epsilon_clip_0_1": Epsilon(clipped(0.1)),
    "epsilon_normscale_0_1": Epsilon(scaled(0.1)),
    "epsilon_zero_bias": Epsilon(EPS, "ignored"),
    "zplus": ZPlus(EPS),
    "zplus_zero_bias": ZPlus(EPS, "ignored"),
    "gamma_0_25": Gamma(0.25, EPS),
    "gamma_1": Gamma(1.0, EPS),
    "gamma_0_25_zero_bias": Gamma(0.25, EPS, "ignored"),
    "alpha2_beta1": AlphaBeta(2.0, 1.0, EPS),
    "alpha1_beta0": AlphaBeta(1.0, 0.0, EPS),
    "wsquare": WSquare(EPS),
    "wsquare_zero_bias": WSquare(EPS, "ignored"),
    "flat": Flat(EPS),
    "zbox_scalar": ZBox(-3.0, 3.5, EPS),
    "norm": Epsilon(EPS),
}


def golden_relevance(rule, function, x, w, b, r):
    z = function(x, w) + b
    found = rule.bwd(Bilinear(function, x), x, w, b, z, r / z)
    return found if rule.direct else x * found


@pytest.mark.parametrize("name", LAYERS)
def test_golden(x64, golden, name):
    def get(key):
        return jnp.asarray(golden[f"{name}/{key}"], jnp.float64)

    x, w, r = get("x"), get("weight"), get("R_out")
    b = get("bias") if f"{name}/bias" in golden else jnp.zeros(())
    b = b[:, None, None] if name == "conv_bias" else b
    cases = GOLDEN | {"zbox": ZBox(get("low"), get("high"), EPS)}
    prefix = f"{name}/rel64/"
    assert {key.removeprefix(prefix) for key in golden if key.startswith(prefix)} == set(cases)
    for key, rule in cases.items():
        close(golden_relevance(rule, layer(name), x, w, b, r), golden[prefix + key])


@pytest.mark.parametrize(
    ("name", "rule", "function"),
    [
        ("avgpool2_norm", Epsilon(EPS), lambda x, w: w * pooled(x, 2, 2)),
        ("adaptiveavg1_norm", Epsilon(EPS), lambda x, w: w * pooled(x, 4, 6)),
        ("avgpool2_flat", Flat(EPS), lambda x, w: w * pooled(x, 2, 2)),
        ("sum_norm", Epsilon(EPS), lambda x, w: w * x.sum(-1)),
    ],
)
def test_golden_sums(x64, golden, name, rule, function):
    x = jnp.asarray(golden[f"nop/{name}/x" if name == "sum_norm" else "nop/x"], jnp.float64)
    r = jnp.asarray(golden[f"nop/{name}/R_out"], jnp.float64)
    found = golden_relevance(rule, function, x, jnp.ones(()), jnp.zeros(()), r)
    close(found, golden[f"nop/{name}/rel64"])


def pooled(x, height, width):
    shape = (1, 1, height, width)
    return lax.reduce_window(x, 0.0, lax.add, shape, shape, "VALID") / (height * width)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("relu_deconvnet", Deconvnet()),
        ("relu_guided", Guided()),
        ("relu_betasmooth10", BetaSmooth(10.0)),
        ("relu_betasmooth2", BetaSmooth(2.0)),
    ],
)
def test_golden_modified_gradients(x64, golden, name, rule):
    x = jnp.asarray(golden["nop/x"], jnp.float64)
    c = jnp.asarray(golden[f"nop/{name}/R_out"], jnp.float64)
    close(rule.elementwise(jax.nn.relu, x, c), golden[f"nop/{name}/rel64"])


@pytest.mark.parametrize(
    ("name", "f"),
    [("relu", jax.nn.relu), ("gelu", functools.partial(jax.nn.gelu, approximate=False))],
)
def test_golden_pass(x64, golden, name, f):
    x = jnp.asarray(golden["nop/x"], jnp.float64)
    r = jnp.asarray(golden[f"nop/{name}_pass/R_out"], jnp.float64)
    y = f(x)
    found = x * Pass().elementwise(f, x, r / jnp.where(y == 0, 1, y))
    # Where a ReLU is off the value is 0, and so is its relevance: the reference passes R there.
    close(found, np.where(y == 0, 0, golden[f"nop/{name}_pass/rel64"]))


@pytest.mark.parametrize(
    ("name", "stabiliser"),
    [
        ("default_1e-6", 1e-6),
        ("eps_0_25", 0.25),
        ("clip_0_1", clipped(0.1)),
        ("normscale_0_1", scaled(0.1)),
    ],
)
def test_golden_stabiliser(x64, golden, name, stabiliser):
    found = stabilise(jnp.asarray(golden["stabilize/z"]), stabiliser)
    np.testing.assert_allclose(found, golden[f"stabilize/{name}"], rtol=1e-15)


def test_golden_outputs_near_zero(x64, golden):
    x, w, r = (jnp.asarray(golden[f"edge/epsilon/{key}"]) for key in ("x", "weight", "R_out"))
    z = x @ w.T
    c = r / jnp.where(z == 0, 1, z)
    found = x * Epsilon(EPS).bwd(Bilinear(layer("linear"), x), x, w, jnp.zeros(()), z, c)
    # An output of exactly 0 has no relevance here; the reference makes 1e6 and -1e6 of R = 1.
    expected = np.where(z == 0, 0, golden["edge/epsilon/rel64"])
    # The outputs, 1e-6, are themselves differences that are exact to 1e-10.
    close(found, expected, 1e-10)


# Parameters.


@pytest.fixture
def unchecked():
    """Without the tests' type checks, which would answer before the rule does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlphaBeta(2.0, 0.5), "alpha - beta must be 1 and beta >= 0, got alpha=2.0, bet"),
        (lambda: AlphaBeta(0.5, -0.5), "AlphaBeta: alpha - beta must be 1 and beta >= 0"),
        (lambda: AlphaBeta(math.nan, math.nan), "got alpha=nan"),
        (lambda: AlphaBeta(2.0, 1.0, -1.0), "AlphaBeta: stabiliser must be finite and >= 0"),
        (lambda: Epsilon(-1e-6), "Epsilon: epsilon must be finite and >= 0, or a function of z"),
        (lambda: Epsilon(math.nan), "got nan; 1e-6 is usual"),
        (lambda: Epsilon(math.inf), "got inf"),
        (lambda: ZPlus(-1.0), "ZPlus: stabiliser must be"),
        (lambda: ZAbsolute(-1.0), "ZAbsolute: stabiliser must be"),
        (lambda: ZAbsolute(bias="zero"), "ZAbsolute: bias must be"),
        (lambda: WSquare(-1.0), "WSquare: stabiliser must be"),
        (lambda: Flat(-1.0), "Flat: stabiliser must be"),
        (lambda: ExcitationBackprop(math.nan), "ExcitationBackprop: stabiliser must be"),
        (lambda: Gamma(-0.1), "Gamma: gamma must be finite and >= 0, got -0.1; 0.25 is usual"),
        (lambda: Gamma(math.inf), "ZPlus is the limit of large gamma"),
        (lambda: Gamma(math.nan), "got nan"),
        (lambda: Gamma(0.25, -1.0), "Gamma: stabiliser must be"),
        (lambda: ZBox(1.0, 0.0), "ZBox: low must be <= high, both finite, got low=1.0, high=0.0"),
        (lambda: ZBox([0.0, 2.0], [1.0, 1.0]), "low must be <= high"),
        (lambda: ZBox(-math.inf, 0.0), "both finite"),
        (lambda: ZBox(0.0, 1.0, -1.0), "ZBox: stabiliser must be"),
        (lambda: Epsilon(bias="zero"), "Epsilon: bias must be 'fused' .*'separate'.*'ignored'"),
        (lambda: Gamma(bias="zero"), "got 'zero'"),
        (lambda: WSquare(bias=""), "WSquare: bias must be"),
        (lambda: SignalTakesAll("relu"), "gate must be 'sigmoid' or 'activation', got 'relu'"),
        (lambda: BetaSmooth(0.0), "BetaSmooth: beta must be finite and > 0, got 0.0"),
        (lambda: BetaSmooth(math.nan), "got nan"),
        (lambda: clipped(-0.1), "clipped: amount must be finite and >= 0"),
        (lambda: scaled(math.nan), "scaled: amount must be finite and >= 0"),
    ],
)
def test_invalid_parameters(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_without_a_backward_pass_says_so():
    x = jnp.ones((1, 2))
    with pytest.raises(NotImplementedError, match="Stop shares no relevance of a linear map"):
        Stop().bwd(Bilinear(OPS["dense"][0], x), x, jnp.ones((2, 2)), x, x, x)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_frozen_and_hashable(name):
    rule = RULES[name].rule
    field = [*(f.name for f in dataclasses.fields(rule)), "new"][0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, field, 0.0)
    same = dataclasses.replace(rule)
    by_identity = isinstance(rule, ZBox)
    assert (rule == same) != by_identity
    assert (len({rule, same}) == 1) != by_identity


def test_boxes_are_not_taken_for_each_other():
    # A box holds arrays; as part of a compiled function's key it stands for itself alone.
    assert ZBox(0.0, 1.0) != ZBox(-3.0, 3.0)
    assert len({ZBox(np.zeros(3), np.ones(3)), ZBox(np.zeros(3), np.ones(3))}) == 2


def test_kinds():
    assert Epsilon().covers("dense", named=False)
    assert Epsilon().covers("add", named=True)
    assert not Epsilon().covers("add", named=False)
    assert not ZPlus().covers("add", named=True)
    assert ZAbsolute().covers("batch_norm", named=True)
    assert not ZAbsolute().covers("batch_norm", named=False)
    assert Gradient().covers("anything", named=False)
    assert Uniform().covers("matmul", named=False)
    assert not Pass().covers("conv", named=True)


# Under transformations, in other dtypes.


@pytest.mark.parametrize("op", ["dense", "conv"])
@pytest.mark.parametrize("name", RULES)
def test_jit_and_vmap(x64, name, op):
    e = example(op)
    rule = ready(name, e)

    def bwd(x, z, c):
        return rule.bwd(Bilinear(OPS[op][0], x), x, jnp.asarray(e.w), jnp.asarray(e.b), z, c)

    x, z, c = (jnp.asarray(array) for array in (e.x, e.z, e.r / e.z))
    alone = bwd(x, z, c)
    close(jax.jit(bwd)(x, z, c), alone)
    several = [jnp.stack([array, array[::-1]]) for array in (x, z, c)]
    close(jax.vmap(bwd)(*several), jnp.stack([alone, bwd(*(s[1] for s in several))]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", RULES)
def test_lower_precision(x64, name, dtype):
    # Inputs and weights >= 0.1: sums without cancellation, so errors are a few roundings.
    rng = np.random.default_rng(0)
    e = example("dense", bias=False)
    e = e._replace(x=rng.uniform(0.1, 1, e.x.shape), w=rng.uniform(0.1, 1, e.w.shape))
    e = e._replace(z=e.x @ e.w, r=abs(e.r))
    rule = ready(name, e)
    expected = relevance(rule, e)
    found = relevance(rule, Example("dense", *(jnp.asarray(array, dtype) for array in e[1:])))
    assert found.dtype == dtype
    close(found.astype(float), expected, 10 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_sum_beside_a_large_one_in_half_precision(x64, dtype):
    # Contributions of 5000, where the numbers of float16 are 4 apart, and of -3.
    x, w = np.array([[1.0, 2.0, -0.5, 0.01]]), np.array([[3000.0], [750.0], [-1000.0], [-300.0]])
    e = Example("dense", x, w, np.zeros(()), x @ w, np.array([[100.0]]))
    expected = by_hand("alpha 2 beta 1", e, w.T)
    half = Example("dense", *(jnp.asarray(array, dtype) for array in e[1:]))
    found = relevance(ready("alpha 2 beta 1", e), half)
    close(found.astype(float), expected, 10 * float(jnp.finfo(dtype).eps))
