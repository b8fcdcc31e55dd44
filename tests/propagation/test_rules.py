"""The rules, one operation at a time, against re-derivations that share nothing with them.

The reference for each rule works on plain matrices: the operation's own, recovered as its
Jacobian, so one reference serves products, einsums and convolutions alike.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel.propagation import rules
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
    where_zero,
)
from tests.paths import FIXTURES

EPS = 1e-6
# Float64 sums of some tens of terms, over denominators that may cancel to 1e-3 of them.
EXACT = 1e-12


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


# Operation: function of (x, w), their shapes, and the shape of the bias.
OPS = {
    "dense": (lambda x, w: x @ w, (3, 5), (5, 4), (4,)),
    "weight first": (lambda x, w: w @ x, (5, 3), (4, 5), (4, 1)),
    "weight transposed": (lambda x, w: x @ w.T, (3, 5), (4, 5), (4,)),
    "einsum": (
        lambda x, w: jnp.einsum("bthd,hdf->bft", x, w),
        (2, 2, 2, 3),
        (2, 3, 4),
        (4, 1),
    ),
    "conv": (conv, (2, 4, 3, 2), (3, 3, 2, 3), (3,)),
    "conv, strided, dilated": (
        functools.partial(
            conv, window_strides=(2, 1), padding=((1, 2), (0, 1)), rhs_dilation=(1, 2)
        ),
        (2, 5, 4, 2),
        (3, 2, 2, 3),
        (3,),
    ),
    "conv, grouped": (
        functools.partial(conv, feature_group_count=2),
        (2, 3, 3, 4),
        (2, 2, 2, 4),
        (4,),
    ),
    "conv, transposed": (
        functools.partial(conv, padding=((1, 1), (1, 2)), lhs_dilation=(2, 2)),
        (2, 3, 2, 2),
        (3, 3, 2, 3),
        (3,),
    ),
}


# References. m is the matrix [outputs, inputs] of z = m x + b, k = m * x the contributions, b the
# bias that takes part, r the relevance of the outputs, s the stabiliser.


class Flattened(NamedTuple):
    m: np.ndarray
    x: np.ndarray
    b: np.ndarray
    z: np.ndarray
    r: np.ndarray
    s: float
    low: np.ndarray
    high: np.ndarray

    @property
    def k(self):
        return self.m * self.x

    @property
    def c(self):
        return self.r / np.where(self.z == 0, 1, self.z)


def pos(x):
    return np.where(x > 0, x, 0)


def neg(x):
    return np.where(x < 0, x, 0)


def shared(parts, bias, v):
    """Relevance v.r in proportion to parts [outputs, inputs], of their sum with the bias."""
    total = parts.sum(1) + bias
    return (parts * (v.r / np.where(total >= 0, total + v.s, total - v.s))[:, None]).sum(0)


def gamma_by_hand(v, gamma):
    up, down = v.z > 0, v.z < 0
    k = v.k + gamma * np.where(up[:, None], pos(v.k), neg(v.k))
    bias = v.b + gamma * np.where(up, pos(v.b), neg(v.b))
    return shared(k, bias, v._replace(r=np.where(up | down, v.r, 0)))


def alpha_beta_by_hand(v, alpha, beta):
    return alpha * shared(pos(v.k), pos(v.b), v) - beta * shared(neg(v.k), neg(v.b), v)


def box_by_hand(v):
    return shared(v.m * v.x - pos(v.m) * v.low - neg(v.m) * v.high, 0, v)


@dataclasses.dataclass(frozen=True)
class Case:
    rule: rules.Rule
    by_hand: object
    # The box of a ZBox, as it broadcasts to the input.
    box: tuple = (0.0, 0.0)


LOW, HIGH = np.array([-2.5, -1.0]), np.array([2.0, 3.5])
RULES = {
    "epsilon": Case(Epsilon(EPS), lambda v: shared(v.k, v.b, v)),
    "epsilon, large": Case(Epsilon(0.25), lambda v: shared(v.k, v.b, v._replace(s=0.25))),
    "gamma": Case(Gamma(0.25, EPS), lambda v: gamma_by_hand(v, 0.25)),
    "gamma, large": Case(Gamma(100.0, EPS), lambda v: gamma_by_hand(v, 100.0)),
    "alpha 2 beta 1": Case(AlphaBeta(2.0, 1.0, EPS), lambda v: alpha_beta_by_hand(v, 2, 1)),
    "alpha 1.5 beta 0.5": Case(AlphaBeta(1.5, 0.5, EPS), lambda v: alpha_beta_by_hand(v, 1.5, 0.5)),
    "alpha 1 beta 0": Case(AlphaBeta(1.0, 0.0, EPS), lambda v: alpha_beta_by_hand(v, 1, 0)),
    "z plus": Case(ZPlus(EPS), lambda v: shared(pos(v.k), pos(v.b), v)),
    "z absolute": Case(ZAbsolute(EPS), lambda v: shared(abs(v.k), abs(v.b), v)),
    "w square": Case(WSquare(EPS), lambda v: shared(v.m**2, v.b**2, v)),
    "flat": Case(Flat(EPS), lambda v: shared((v.m != 0) * 1.0, 0, v)),
    "box": Case(ZBox(-3.0, 3.5, EPS), box_by_hand, (-3.0, 3.5)),
    "box, per feature": Case(ZBox(0.0, 0.0, EPS), box_by_hand, (LOW, HIGH)),
    "excitation": Case(ExcitationBackprop(EPS), lambda v: shared(pos(v.m) * pos(v.x), 0, v)),
    "gradient": Case(Gradient(), lambda v: (v.k * v.c[:, None]).sum(0)),
}
BIASED = [name for name, case in RULES.items() if hasattr(case.rule, "bias")]
SIGN_SPLIT = "gamma|alpha 2 beta 1|alpha 1.5 beta 0.5|alpha 1 beta 0|z plus|excitation".split("|")
CONSERVING = [name for name, case in RULES.items() if "rule" not in case.rule.loses]


class Example(NamedTuple):
    op: str
    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    z: np.ndarray
    r: np.ndarray


@functools.cache
def example(op, seed=0, *, bias=True, nonneg=False):
    """An operation with its arrays; relevance is of both signs and not z itself."""
    function, x_shape, w_shape, b_shape = OPS[op]
    rng = np.random.default_rng(seed)
    x, w, b = (rng.normal(size=shape) for shape in (x_shape, w_shape, b_shape))
    x = np.maximum(x, 0) if nonneg else x
    b = b if bias else np.zeros(())
    z = np.asarray(function(jnp.asarray(x), jnp.asarray(w))) + b
    # An output of exactly 0 has no relevance: relevance is z * c.
    return Example(op, x, w, b, z, np.where(z == 0, 0, rng.normal(size=z.shape)))


@functools.cache
def matrix(op, seed=0, *, bias=True, nonneg=False, of="x"):
    """The operation as a matrix [outputs, inputs], or [outputs, weights]."""
    e = example(op, seed, bias=bias, nonneg=nonneg)
    jacobian = jax.jacobian(OPS[op][0], argnums=("x", "w").index(of))
    m = np.asarray(jacobian(jnp.asarray(e.x), jnp.asarray(e.w)))
    return m.reshape(e.z.size, -1)


def by_hand(name, e, m, *, bias="fused", of="x", stabiliser=EPS):
    case = RULES[name]
    kept, z, r = np.broadcast_to(e.b, e.z.shape), e.z, e.r
    if bias == "separate":
        # The addition comes first and the map, without a bias, gets its part of the relevance.
        z, r = z - kept, r * (z - kept) / np.where(z == 0, 1, z)
    if bias in ("separate", "ignored"):
        kept = np.zeros_like(kept)
    x = e.x if of == "x" else e.w
    low, high = (np.broadcast_to(spread(side, x), x.shape).ravel() for side in case.box)
    flat = Flattened(m, x.ravel(), kept.ravel(), z.ravel(), r.ravel(), stabiliser, low, high)
    return case.by_hand(flat).reshape(x.shape)


def spread(side, x):
    """A box's side as values of the last axis of x."""
    return side if np.ndim(side) == 0 else np.resize(side, x.shape[-1])


def ready(name, e, **changes):
    case = RULES[name]
    if isinstance(case.rule, ZBox):
        low, high = (spread(side, e.x) for side in case.box)
        stabiliser = changes.get("stabiliser", case.rule.stabiliser)
        return ZBox(low, high, stabiliser)
    return dataclasses.replace(case.rule, **changes)


def relevance(rule, e, **flags):
    """The rule's relevance of x."""
    x, w, b, z, r = (jnp.asarray(array) for array in e[1:])
    found = rule.bwd(Bilinear(OPS[e.op][0], x, **flags), x, w, b, z, r / jnp.where(z == 0, 1, z))
    assert found.shape == x.shape
    return np.asarray(found if rule.direct else x * found)


def close(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
    assert error < tolerance, f"{error:.1e} of the maximum"


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


# What the rules declare to lose.

# The stabiliser, 1e-13, takes its part of totals of at least 1e-3.
STABILISED = 1e-10


def both_signs(e, m):
    """The outputs with positive and with negative contributions, and with positive inputs' too."""
    k = m * e.x.ravel()
    excited = ((m > 0) & (e.x.ravel() > 0)).any(1)
    return ((k > 0).any(1) & (k < 0).any(1) & excited).reshape(e.z.shape)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CONSERVING)
def test_conserves_without_bias(x64, name, op):
    e, m = example(op, bias=False), matrix(op, bias=False)
    e = e._replace(r=np.where(both_signs(e, m), e.r, 0))
    assert e.r.any()
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    rule = ready(name, e, **({} if name == "gradient" else {key: 1e-13}))
    assert abs(relevance(rule, e).sum() - e.r.sum()) < STABILISED * abs(e.r).sum()


@pytest.mark.parametrize("name", CONSERVING)
def test_loses_to_the_bias_what_it_declares(x64, name):
    e, m = example("dense"), matrix("dense")
    e = e._replace(r=np.where(both_signs(e, m), e.r, 0))
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    rule = ready(name, e, **({} if name == "gradient" else {key: 1e-13}))
    missing = e.r.sum() - relevance(rule, e).sum()
    if "bias" not in rule.loses:
        assert abs(missing) < STABILISED * abs(e.r).sum()
        return
    # The bias as one more input, of 1, gets by the same rule what the others do not.
    inputs, outputs = e.x.shape[-1], e.z.shape[-1]
    x = np.concatenate([e.x, np.ones((len(e.x), 1))], -1)
    w = np.concatenate([e.w, e.b[None]])
    whole = Example("dense", x, w, np.zeros(()), e.z, e.r)
    assert w.shape == (inputs + 1, outputs)
    close(missing, relevance(rule, whole)[:, -1].sum(), STABILISED)
    if name in BIASED:
        ignoring = dataclasses.replace(rule, bias="ignored")
        assert abs(e.r.sum() - relevance(ignoring, e).sum()) < STABILISED * abs(e.r).sum()


@pytest.mark.parametrize("name", CONSERVING)
def test_loses_to_the_stabiliser_what_it_declares(x64, name):
    e = example("dense", bias=False)
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    if name == "gradient":
        assert "stabiliser" not in Gradient.loses
        return
    assert "stabiliser" in RULES[name].rule.loses
    lost = e.r.sum() - relevance(ready(name, e, **{key: 0.5}), e).sum()
    assert abs(lost) > 1e-3 * abs(e.r).sum()


@pytest.mark.parametrize("rule", [Uniform(), SignalTakesAll(), SignalTakesAll("activation")])
@pytest.mark.parametrize("gates", [("", ""), ("sigmoid", ""), ("", "sigmoid"), ("activation", "")])
def test_products_conserve(rule, gates):
    assert rule.loses == frozenset()
    assert sum(rule.shares(gates)) == 1


def test_the_signal_takes_all():
    assert Uniform().shares(("sigmoid", "")) == (0.5, 0.5)
    assert SignalTakesAll().shares(("sigmoid", "")) == (0, 1)
    assert SignalTakesAll().shares(("activation", "sigmoid")) == (1, 0)
    assert SignalTakesAll().shares(("activation", "")) == (0.5, 0.5)
    assert SignalTakesAll("activation").shares(("", "activation")) == (1, 0)
    assert SignalTakesAll("activation").shares(("activation", "sigmoid")) == (0.5, 0.5)


# Stabilisers.

DTYPES = ["float64", "float32", "bfloat16", "float16"]
STABILISERS = {
    "0": 0.0,
    "1e-12": 1e-12,
    "1e-6": 1e-6,
    "0.25": 0.25,
    "clipped 0": clipped(0.0),
    "clipped": clipped(1e-6),
    "scaled": scaled(1e-6),
    "where zero": where_zero(1e-12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STABILISERS)
def test_stabilise_is_sign_aware_and_finite(x64, name, dtype):
    tiny = float(jnp.finfo(dtype).tiny)
    values = [0.0, -0.0, 1.0, -1.0, 32 * tiny, -32 * tiny, 1e-3, -1e-3]
    z = jnp.array(values, dtype)
    found = stabilise(z, STABILISERS[name])
    assert found.dtype == z.dtype
    assert found.shape == z.shape
    np.testing.assert_array_equal(found > 0, [value >= 0 for value in values])
    assert jnp.isfinite(1 / found).all()
    assert (abs(found) >= abs(z)).all()


def test_stabilise_by_a_function_of_the_user(x64):
    z = jnp.array([0.0, -2.0])
    np.testing.assert_array_equal(stabilise(z, lambda z: z + 3), [3.0, 1.0])


def test_scaled_takes_each_example_by_itself(x64):
    z = jnp.array([[3.0, -4.0], [0.0, 0.0], [30.0, -40.0]])
    found = stabilise(z, scaled(0.1))
    size = 0.1 * math.sqrt(12.5)
    np.testing.assert_allclose(found[0], [3 + size, -4 - size], rtol=1e-15)
    np.testing.assert_allclose(found[2], 10 * found[0], rtol=1e-15)
    assert jnp.isfinite(1 / found[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["fused", "ignored", "separate"])
@pytest.mark.parametrize("name", RULES)
def test_nothing_to_share_is_finite_without_a_stabiliser(x64, name, bias, dtype):
    # An example of zeros; outputs that no positive, no negative, and no weight at all reaches.
    x = jnp.array([[0, 0, 0], [1, 2, 0], [-1, -2, -3]], dtype)
    w = jnp.array([[-1, 1, 0, 1], [-2, 2, 0, -1], [-3, 1, 0, 1]], dtype)
    # Large against the smallest number there is: its quotient by that is an infinity.
    b = jnp.array([1e3, -1e3, 1e3, 0], dtype)
    z = x @ w + b
    rule = ready(name, Example("dense", x, w, b, z, z))
    key = "epsilon" if name.startswith("epsilon") else "stabiliser"
    changes = {} if name == "gradient" else {key: 0.0}
    changes |= {"bias": bias} if name in BIASED else {}
    rule = dataclasses.replace(rule, **changes)
    for nonneg in (False, True):
        op = Bilinear(OPS["dense"][0], x, nonneg=nonneg)
        found = rule.bwd(op, abs(x) if nonneg else x, w, b, z, jnp.ones_like(z))
        assert found.dtype == x.dtype
        assert jnp.isfinite(found).all()
        if not rule.direct and name != "gradient":
            assert (x[0] * found[0] == 0).all()


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


# Pass at zero, and the activations' declaration.


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("f", "limit"),
    [
        (jax.nn.gelu, 0.5),
        (jax.nn.silu, 0.5),
        (jnp.tanh, 1.0),
        (jax.nn.relu, 0.0),
        (jax.nn.sigmoid, 0.0),
        (jnp.cos, 0.0),
    ],
)
def test_pass_at_zero(x64, f, limit, dtype):
    x, c = jnp.array([0.0, -0.0], dtype), jnp.array([3.0, -2.0], dtype)
    found = Pass().elementwise(f, x, c)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, c * limit)


@pytest.mark.parametrize("f", [jax.nn.gelu, jax.nn.silu, jnp.tanh, jax.nn.sigmoid, jax.nn.elu])
def test_pass_conserves_elsewhere(x64, f):
    x = jnp.array([-2.0, -1e-5, 1e-9, 0.3, 5.0])
    c = jnp.array([1.0, -2.0, 3.0, 4.0, -5.0])
    np.testing.assert_allclose(x * Pass().elementwise(f, x, c), f(x) * c, rtol=1e-15)


@pytest.mark.parametrize("rule", [Pass(), Guided(), Deconvnet(), BetaSmooth(), Stop()])
def test_what_does_not_conserve_says_so(rule):
    assert "rule" in rule.loses


@pytest.mark.parametrize("make", [clipped, scaled, where_zero])
def test_equal_stabilisers_make_equal_rules(make):
    """A rule is a static argument of compiled programs: another function would compile again."""
    assert Epsilon(make(0.5)) == Epsilon(make(0.5))
    assert Epsilon(make(0.5)) != Epsilon(make(0.25))
