"""The rules by hand, on plain matrices, and examples to use them on.

The reference for each rule works on the operation's own matrix, recovered as its Jacobian, so one
reference serves products, einsums and convolutions alike.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxrel.propagation import rules
from jaxrel.propagation.bilinear import Bilinear
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    ExcitationBackprop,
    Flat,
    Gamma,
    Gradient,
    WSquare,
    ZAbsolute,
    ZBox,
    ZPlus,
)

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


DTYPES = ["float64", "float32", "bfloat16", "float16"]
