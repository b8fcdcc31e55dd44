"""Rules: how one operation shares its output's relevance among its inputs.

Between operations relevance travels as a cotangent `c = relevance / value`: whatever adds,
moves or selects values then needs no rule at all. A rule says what happens at the rest. For an
operation that is linear in its input it is one method,

    bwd(op, x, w, b, z, c) -> c_in        z = op(x, w) + b, relevance of z: z * c

where `op(x, w)` is the operation without its bias and `op.T(w, s)` its transpose in `x`. Rules
are frozen dataclasses; a new one is a subclass of `Rule` with a `bwd`.

Notation in the docstrings: x⁺ = max(x, 0), x⁻ = min(x, 0), s(z) the stabilised z, R the
relevance of z, and i, j run over inputs and outputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.propagation.bilinear import Bilinear

Stabiliser = float | Callable[[Array], Array]
Bias = Literal["fused", "separate", "ignored"]
# The fields of a rule that hold one.
STABILISERS = ("epsilon", "stabiliser")

LINEAR = frozenset({"dense", "conv"})
PRODUCTS = frozenset({"matmul", "product"})
SUMS = frozenset({"add", "mean", "max_pool"})
ELEMENTWISE = frozenset({"activation"})
KINDS = LINEAR | PRODUCTS | SUMS | ELEMENTWISE | {"softmax", "logsumexp", "norm", "batch_norm"}


def stabilise(z: Array, stabiliser: Stabiliser) -> Array:
    """Move z away from zero, by its sign: z + stabiliser * sign(z), with sign(0) = +1.

    The amount is never below 16 times the dtype's smallest normal number: the inverse of the
    result is finite in every dtype (1e-6 alone has an infinite inverse in float16).

    Args:
      z: any real array.
      stabiliser: the amount (>= 0), or a function of z that returns the stabilised z.

    Returns:
      The stabilised z, in z's shape and dtype.
    """
    if callable(stabiliser):
        return stabiliser(z)
    amount = max(stabiliser, _least(z))
    return z + jnp.where(z >= 0, amount, -amount).astype(z.dtype)


# Equal amounts give one function: composites that hold it are equal, and compile once.
@functools.cache
def clipped(amount: float) -> Callable[[Array], Array]:
    """A stabiliser that keeps |z| at or above an amount: sign(z) * max(|z|, amount)."""
    _check_stabiliser("clipped", "amount", amount)

    def stabilised(z: Array) -> Array:
        least = max(amount, _least(z))
        return jnp.where(z >= 0, jnp.maximum(z, least), jnp.minimum(z, -least)).astype(z.dtype)

    return stabilised


@functools.cache
def scaled(amount: float) -> Callable[[Array], Array]:
    """A stabiliser relative to each example: amount * root mean square of z, axes 1 and on."""
    _check_stabiliser("scaled", "amount", amount)

    def stabilised(z: Array) -> Array:
        axes = tuple(range(1, z.ndim))
        size = amount * jnp.sqrt(jnp.mean(z * z, axis=axes, keepdims=True))
        size = jnp.maximum(size, _least(z))
        return z + jnp.where(z >= 0, size, -size).astype(z.dtype)

    return stabilised


@functools.cache
def where_zero(amount: float) -> Callable[[Array], Array]:
    """A stabiliser that replaces exact zeros alone, by an amount."""

    def stabilised(z: Array) -> Array:
        least = _least(z) if abs(amount) < _least(z) else amount
        return jnp.where(z == 0, jnp.asarray(least, z.dtype), z)

    return stabilised


# Without fields, an equality of its own would make all instances of a class that inherits it equal.
@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """Base of all rules. `kinds` are the operations it can be used on.

    Class attributes:
      kinds: the kinds of operation (see `jaxrel.op`) that the rule is for.
      also: kinds that it can be used on where a composite's entry names them.
      direct: `bwd` returns the relevance of x itself, not relevance / x: for rules that give
        relevance to an input of zero.
      loses: what the rule does not pass on to the inputs: a subset of 'bias', 'stabiliser' and
        'rule' (the rule's own choice), empty if it conserves.
    """

    kinds: ClassVar[frozenset[str]] = LINEAR
    also: ClassVar[frozenset[str]] = frozenset()
    direct: ClassVar[bool] = False
    loses: ClassVar[frozenset[str]] = frozenset({"bias", "stabiliser"})

    def __post_init__(self):
        rule, bias = type(self).__name__, getattr(self, "bias", "fused")
        for field in dataclasses.fields(self):
            if field.name in STABILISERS:
                _check_stabiliser(rule, field.name, getattr(self, field.name))
        if bias not in get_args(Bias):
            raise ValueError(
                f"{rule}: bias must be 'fused' (it takes its share), 'separate' (it is an addition "
                f"of its own) or 'ignored' (the inputs share everything), got {bias!r}"
            )

    def __str__(self) -> str:
        """The rule with those parameters that are not the default."""
        fields = (field for field in dataclasses.fields(self))
        given = ((field.name, getattr(self, field.name), field.default) for field in fields)
        parts = [
            f"{name}={'...' if callable(value) or np.ndim(value) else value}"
            for name, value, default in given
            if np.ndim(value) or value != default
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def covers(self, kind: str, named: bool) -> bool:
        """Whether the rule goes with a kind of operation, which its entry names or not."""
        return kind in self.kinds or (named and kind in self.also)

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """Share the relevance z * c of z = op(x, w) + b among x; see the module's docstring."""
        raise NotImplementedError(
            f"{type(self).__name__} shares no relevance of a linear map: give it a method "
            "bwd(self, op, x, w, b, z, c) that returns relevance / x"
        )


@dataclasses.dataclass(frozen=True)
class Gradient(Rule):
    """The plain derivative: c passes as a gradient does. On a linear map this is LRP-0."""

    kinds = KINDS
    loses = frozenset({"bias"})

    def covers(self, kind: str, named: bool) -> bool:
        """Every operation has a derivative, those that no other rule knows too."""
        return True

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """R_i = sum_j x_i w_ij R_j / z_j (Bach et al. 2015, eq. 56 without stabiliser)."""
        return op.T(w, c)


@dataclasses.dataclass(frozen=True)
class Epsilon(Rule):
    """R_i = sum_j x_i w_ij R_j / s(z_j) (Bach et al. 2015, eq. 58).

    On a sum of several values, or a mean, each summand takes its share of R z / s(z).
    """

    epsilon: Stabiliser = 1e-6
    bias: Bias = "fused"
    also = SUMS

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        total = z if self.bias == "fused" else z - b
        own = total if self.bias == "separate" else z
        return op.T(w, c * _quotient(own, total, self.epsilon))


@dataclasses.dataclass(frozen=True)
class ZPlus(Rule):
    """R_i = sum_j (x_i w_ij)⁺ R_j / s(sum_i (x_i w_ij)⁺ + b_j⁺) (Montavon et al. 2017, eq. 8)."""

    stabiliser: Stabiliser = 1e-6
    bias: Bias = "fused"

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        sp, _ = _by_contribution(op, x, w, z - b)
        z, b = _with_bias(z, b, self.bias)
        s = _quotient(z * c, sp + _pos(b), self.stabiliser)
        return _by_sign(x, op.T(_pos(w), s), None if op.nonneg else op.T(_neg(w), s))


@dataclasses.dataclass(frozen=True)
class AlphaBeta(Rule):
    """alpha times the shares of (x w)⁺ minus beta times those of (x w)⁻ (Bach et al., eq. 60).

    The bias goes with its sign. Raises ValueError unless alpha - beta = 1 and beta >= 0.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabiliser: Stabiliser = 1e-6
    bias: Bias = "fused"

    def __post_init__(self):
        if not (np.isclose(self.alpha - self.beta, 1.0) and self.beta >= 0):
            raise ValueError(
                f"AlphaBeta: alpha - beta must be 1 and beta >= 0, got alpha={self.alpha}, "
                f"beta={self.beta}; alpha=2, beta=1 and alpha=1, beta=0 are usual"
            )
        super().__post_init__()

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        if self.beta == 0:
            return ZPlus(self.stabiliser, self.bias).bwd(op, x, w, b, z, c)
        wp, wn = _pos(w), _neg(w)
        sp, sn = _by_contribution(op, x, w, z - b)
        z, b = _with_bias(z, b, self.bias)
        sp = self.alpha * _quotient(z * c, sp + _pos(b), self.stabiliser)
        sn = -self.beta * _quotient(z * c, sn + _neg(b), self.stabiliser)
        positive = op.T(wp, sp) + op.T(wn, sn)
        return _by_sign(x, positive, None if op.nonneg else op.T(wn, sp) + op.T(wp, sn))


@dataclasses.dataclass(frozen=True)
class ZAbsolute(Rule):
    """R_i = sum_j |x_i w_ij| R_j / s(sum_i |x_i w_ij| + |b_j|): shares by size, whatever the sign.

    On batch normalisation, x k + b, the input gets |x k| / (|x k| + |b|) of the relevance and the
    shift the rest: no cancellation of the two enlarges it (Hui and Binder 2019).
    """

    stabiliser: Stabiliser = 1e-6
    bias: Bias = "fused"
    also = frozenset({"batch_norm"})

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        z, b = _with_bias(z, b, self.bias)
        size = jnp.abs(w)
        s = _quotient(z * c, op(jnp.abs(x), size) + jnp.abs(b), self.stabiliser)
        return jnp.sign(x) * op.T(size, s)


@dataclasses.dataclass(frozen=True)
class Gamma(Rule):
    """Contributions of the output's own sign count (1 + gamma) times (Montavon et al. 2019).

    This is the generalised form (Andéol et al. 2021), defined for inputs and outputs of both
    signs: for z_j > 0 the contributions (x_i w_ij)⁺ are enlarged, for z_j < 0 the (x_i w_ij)⁻;
    z_j = 0 passes nothing. gamma=0 is Epsilon; gamma to infinity is ZPlus where z > 0.
    """

    gamma: float = 0.25
    stabiliser: Stabiliser = 1e-6
    bias: Bias = "fused"

    def __post_init__(self):
        if not (np.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(
                f"Gamma: gamma must be finite and >= 0, got {self.gamma}; 0.25 is usual, and "
                "ZPlus is the limit of large gamma"
            )
        super().__post_init__()

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        # Nothing comes back to z < 0. Of a separate bias the ReLU reads the sum, not this z.
        positive_only = op.relu_after and self.bias != "separate"
        p, n = _by_contribution(op, x, w, z - b)
        z, b = _with_bias(z, b, self.bias)
        enlarged = p + _pos(b)
        if not positive_only:
            enlarged = jnp.where(z > 0, enlarged, n + _neg(b))
        s = _quotient(z * c, p + n + b + self.gamma * enlarged, self.stabiliser)
        if positive_only and op.nonneg:
            return _by_sign(x, op.T(w + self.gamma * _pos(w), s), None)
        # Of w⁺ s where z > 0 and w⁻ s where z < 0, and of the others: their sum and difference.
        signed = s if positive_only else s * jnp.sign(z)
        both, size = op.T(w, s), op.T(jnp.abs(w), signed)
        halves = (both + size, both - size)
        return _by_sign(x, *(both + self.gamma / 2 * half for half in halves))


@dataclasses.dataclass(frozen=True)
class ExcitationBackprop(Rule):
    """R_i = sum_j x_i⁺ w_ij⁺ R_j / s(sum_i x_i⁺ w_ij⁺): positive inputs by positive weights.

    Zhang et al. 2016, eq. 5 ("top-down neural attention"). The bias takes no part.
    """

    stabiliser: Stabiliser = 1e-6
    loses = frozenset({"stabiliser"})

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class."""
        wp = _pos(w)
        s = _quotient(z * c, op(_pos(x), wp), self.stabiliser)
        return jnp.where(x > 0, op.T(wp, s), 0)


@dataclasses.dataclass(frozen=True)
class WSquare(Rule):
    """R_i = sum_j w_ij² R_j / s(sum_i w_ij² + b_j²) (Montavon et al. 2017, eq. 9).

    Independent of the input; for a first layer.
    """

    stabiliser: Stabiliser = 1e-6
    bias: Bias = "fused"
    direct = True

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class. Returns relevance."""
        z, b = _with_bias(z, b, self.bias)
        total = op(op.ones(x), w * w) + b * b
        return op.T(w * w, _quotient(z * c, total, self.stabiliser))


@dataclasses.dataclass(frozen=True)
class Flat(Rule):
    """Every input that an output sees takes the same share (Lapuschkin et al. 2019).

    Independent of input, weights and bias; for a first layer.
    """

    stabiliser: Stabiliser = 1e-6
    direct = True
    loses = frozenset({"stabiliser"})

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class. Returns relevance."""
        ones = jnp.ones_like(w)
        total = jnp.broadcast_to(op(op.ones(x), ones), z.shape)
        return op.T(ones, _quotient(z * c, total, self.stabiliser))


@dataclasses.dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """For inputs between low and high, such as pixels (Montavon et al. 2017, eq. 10).

    R_i = sum_j (x_i w_ij - low_i w_ij⁺ - high_i w_ij⁻) R_j / s(its sum over i).

    `low` and `high` are in the units of the operation's input (after normalisation), scalars or
    arrays that broadcast to it: `[3]` for the colours of NHWC images.
    """

    low: Any = 0.0
    high: Any = 1.0
    stabiliser: Stabiliser = 1e-6
    direct = True
    loses = frozenset({"stabiliser"})

    def __post_init__(self):
        low, high = np.asarray(self.low), np.asarray(self.high)
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low <= high)):
            raise ValueError(
                f"ZBox: low must be <= high, both finite, got low={self.low}, high={self.high}"
            )
        super().__post_init__()

    def bwd(self, op: Bilinear, x: Array, w: Array, b: Array, z: Array, c: Array) -> Array:
        """See the class. Returns relevance."""
        ones = op.ones(x)
        x, low, high = (jnp.asarray(a, x.dtype) * ones for a in (x, self.low, self.high))
        wp, wn = _pos(w), _neg(w)
        total = op(x, w) - op(low, wp) - op(high, wn)
        s = _quotient(z * c, total, self.stabiliser)
        return x * op.T(w, s) - low * op.T(wp, s) - high * op.T(wn, s)


class ActivationRule(Rule):
    """Base of the rules for elementwise nonlinearities: one method, `elementwise`."""

    kinds = ELEMENTWISE

    def elementwise(self, f: Callable, x: Array, c: Array) -> Array:
        """c_in of y = f(x), where c belongs to y."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Pass(ActivationRule):
    """Relevance passes an elementwise operation unchanged: c_in = c f(x) / x.

    The identity rule (Achtibat et al. 2024, eq. 9). At x = 0 the quotient is its limit: f'(0)
    where f(0) = 0 (ReLU, GELU, tanh), and nothing passes where f(0) is not 0 (sigmoid).
    """

    loses = frozenset({"rule"})

    def elementwise(self, f: Callable, x: Array, c: Array, scalar: Callable | None = None) -> Array:
        """See the class. `scalar` is f of one number, if it is the same at every position.

        Then the limit at 0 is found once, and the derivative is not computed at every position.
        """
        at = x if scalar is None else jnp.zeros((), x.dtype)
        value, slope = jax.jvp(scalar or f, (at,), (jnp.ones_like(at),))
        limit = jnp.where((value == 0) & jnp.isfinite(slope), slope, 0)
        y = value if scalar is None else f(x)
        zero = x == 0
        return c * jnp.where(zero, limit, y / jnp.where(zero, 1, x)).astype(c.dtype)


@dataclasses.dataclass(frozen=True)
class Guided(ActivationRule):
    """Guided backpropagation: the derivative, of positive cotangents alone.

    Springenberg et al. 2015, eq. in section 3.4: (c > 0) (x > 0) c for a ReLU. What comes out at
    the input is a modified gradient.
    """

    loses = frozenset({"rule"})

    def elementwise(self, f: Callable, x: Array, c: Array) -> Array:
        """See the class."""
        return _derivative(f, x) * _pos(c)


@dataclasses.dataclass(frozen=True)
class Deconvnet(ActivationRule):
    """Deconvolutional network: the ReLU goes to the cotangent: max(c, 0) (Zeiler, Fergus 2014)."""

    loses = frozenset({"rule"})

    def elementwise(self, f: Callable, x: Array, c: Array) -> Array:
        """See the class."""
        return _pos(c)


@dataclasses.dataclass(frozen=True)
class BetaSmooth(ActivationRule):
    """The derivative of softplus(beta x) / beta in the place of f's (Dombrowski et al. 2019)."""

    beta: float = 10.0
    loses = frozenset({"rule"})

    def __post_init__(self):
        if not (np.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"BetaSmooth: beta must be finite and > 0, got {self.beta}")

    def elementwise(self, f: Callable, x: Array, c: Array) -> Array:
        """See the class."""
        return c * jax.nn.sigmoid(self.beta * x)


class ProductRule(Rule):
    """Base of the rules for products of two values that both carry relevance."""

    kinds = PRODUCTS

    def shares(self, gates: tuple[str, str]) -> tuple[float, float]:
        """The part of the product's relevance that each factor takes.

        `gates` says of each factor: 'sigmoid' (it comes from a sigmoid), 'activation' (from
        another nonlinearity) or '' (neither).
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Uniform(ProductRule):
    """Each factor takes half (AttnLRP, Achtibat et al. 2024, eq. 12 and 14)."""

    loses = frozenset()

    def shares(self, gates: tuple[str, str]) -> tuple[float, float]:
        """See the class."""
        return 0.5, 0.5


@dataclasses.dataclass(frozen=True)
class SignalTakesAll(ProductRule):
    """The signal takes all of the relevance and the gate none (Arras et al. 2017).

    A factor is a gate if it comes from a sigmoid (LSTM, GRU, sentinel); with
    `gate='activation'`, from any nonlinearity (SwiGLU as in CP-LRP). Two gates, or none, take
    half each.
    """

    gate: Literal["sigmoid", "activation"] = "sigmoid"
    loses = frozenset()

    def __post_init__(self):
        if self.gate not in ("sigmoid", "activation"):
            raise ValueError(
                f"SignalTakesAll: gate must be 'sigmoid' or 'activation', got {self.gate!r}"
            )

    def shares(self, gates: tuple[str, str]) -> tuple[float, float]:
        """See the class."""
        first, second = (g == "sigmoid" or (g != "" and self.gate == "activation") for g in gates)
        if first == second:
            return 0.5, 0.5
        return (0.0, 1.0) if first else (1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Stop(Rule):
    """Nothing passes: the result counts as a constant.

    On a softmax this is CP-LRP's choice (attention maps are constants, Ali et al. 2022); on a
    normalisation the statistic (the standard deviation) is the constant.
    """

    kinds = KINDS
    loses = frozenset({"rule"})

    def covers(self, kind: str, named: bool) -> bool:
        """Any operation's result can count as a constant."""
        return True


def _pos(x: Array) -> Array:
    return jnp.maximum(x, 0)


def _neg(x: Array) -> Array:
    return jnp.minimum(x, 0)


def _least(z: Array) -> float:
    return 16 * float(jnp.finfo(z.dtype).tiny)


def _quotient(relevance: Array, total: Array, stabiliser: Stabiliser) -> Array:
    """relevance / s(total), and 0 where the total is 0: there is nothing to share among.

    A stabiliser of 0 would make that an infinity, and a NaN where it meets a weight of 0.
    """
    return jnp.where(total == 0, 0, relevance / stabilise(total, stabiliser))


def _by_contribution(op: Bilinear, x: Array, w: Array, z: Array) -> tuple[Array, Array]:
    """The sums of (x w)⁺ and of (x w)⁻ for each output, where z = op(x, w) is known.

    Their sum is z and their difference op(|x|, |w|): one product gives both. In half precision
    that would leave little of a small sum beside a large one, and they are computed apart.
    """
    wp, wn = _pos(w), _neg(w)
    if jnp.finfo(z.dtype).nmant < 23:
        xp, xn = _pos(x), _neg(x)
        return op(xp, wp) + op(xn, wn), op(xp, wn) + op(xn, wp)
    if op.nonneg:
        positive = op(x, wp)
        return positive, jnp.minimum(z - positive, 0)
    size = op(jnp.abs(x), jnp.abs(w))
    return jnp.maximum((z + size) / 2, 0), jnp.minimum((z - size) / 2, 0)


def _with_bias(z: Array, b: Array, bias: Bias) -> tuple[Array, Array]:
    """The value whose relevance is shared, and the bias that takes a part of it."""
    if bias == "fused":
        return z, b
    return (z - b if bias == "separate" else z), jnp.zeros_like(b)


def _by_sign(x: Array, positive: Array, negative: Array | None) -> Array:
    """c of R = x⁺ positive + x⁻ negative: no division, and no relevance at x = 0.

    None where x is nowhere negative.
    """
    below = 0 if negative is None else jnp.where(x < 0, negative, 0)
    return jnp.where(x > 0, positive, below)


def _derivative(f: Callable, x: Array) -> Array:
    return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


def _check_stabiliser(rule: str, name: str, value: Stabiliser) -> None:
    if not callable(value) and not (np.isfinite(value) and value >= 0):
        raise ValueError(
            f"{rule}: {name} must be finite and >= 0, or a function of z, got {value}; "
            "1e-6 is usual"
        )
