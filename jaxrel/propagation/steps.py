"""From an operation and its rule to the step that computes it with the rule's backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from jaxrel.propagation.bilinear import Bilinear
from jaxrel.propagation.convolutions import patch_product, transposable
from jaxrel.propagation.operations import BatchNorm, Elementwise, Linear, Operation, Product
from jaxrel.propagation.rules import (
    ActivationRule,
    Epsilon,
    Gradient,
    Pass,
    ProductRule,
    Rule,
    Stop,
    stabilise,
)
from jaxrel.propagation.zero_inputs import Probe
from jaxrel.tracing import primitives
from jaxrel.tracing.evaluate import Step, kept
from jaxrel.tracing.graph import Node
from jaxrel.tracing.primitives import DIV, MUL, REDUCE_PROD, SCALES, SUB


def step_for(
    operation: Operation,
    rule: Rule,
    *,
    probe: Probe | None = None,
    weights: bool = False,
    biased: bool = True,
) -> tuple[Node, Step] | None:
    """The node that an operation's rule changes, and how; None if it is computed as it was.

    Args:
      operation: from `operations`.
      rule: one that is defined for its kind.
      probe: what takes the relevance of a rule that gives it directly.
      weights: relevance of the weights is wanted too.
      biased: whether a linear operation has its bias (without it, to see what the bias takes).
    """
    found = _step_for(operation, rule, probe, weights, biased)
    if found is None:
        return None
    given = tuple(one is not None for one in probe or ())
    return found[0], found[1]._replace(key=_key(operation, rule, given, weights, biased))


def _key(operation: Operation, rule: Rule, *how: Any) -> Any:
    """What steps have in common that are one function, or None."""
    same = operation.key()
    key = (type(operation), same, rule, *how)
    try:
        hash(key)
    except TypeError:  # a rule that holds arrays, and cannot be compared
        return None
    return None if same is None else key


def _step_for(
    operation: Operation,
    rule: Rule,
    probe: Probe | None,
    weights: bool,
    biased: bool,
) -> tuple[Node, Step] | None:
    node = operation.node
    if isinstance(rule, Gradient):
        sums = operation.kind == "add"
        return (node, Step(node.ins, lambda *ins: [kept(node.bind(*ins)[0])])) if sums else None
    if isinstance(rule, Stop):
        return node, Step(node.ins, lambda *ins: _stopped(node.bind(*ins)))
    if isinstance(operation, Linear):
        return _linear(operation, rule, probe, weights, biased)
    if isinstance(operation, Elementwise) and isinstance(rule, ActivationRule):
        step = _elementwise(operation, rule)
        return None if step is None else (node, step)
    if isinstance(operation, Product) and isinstance(rule, ProductRule):
        return node, _product(operation, rule)
    if isinstance(rule, Epsilon):
        return node, Step(
            node.ins, lambda *ins: [share_sum(kept(node.bind(*ins)[0]), rule.epsilon)]
        )
    raise NotImplementedError(f"{rule} is not defined for {operation.kind!r}")


def _stopped(outs: list) -> list:
    return [share(out, 0.0) for out in outs]


# Linear operations.


def _linear(
    operation: Linear,
    rule: Rule,
    probe: Probe | None,
    weights: bool,
    biased: bool,
) -> tuple[Node, Step]:
    node, terms, beside = operation.node, operation.bias, operation.beside
    if getattr(rule, "bias", "fused") == "separate" and not operation.folded:
        # The additions stay operations of their own.
        node = operation.moves[-1] if operation.moves else operation.core
        terms, beside = (), None
    extras = tuple(atom for atom in (beside, *(probe or ())) if atom is not None)
    ins = (operation.x, operation.w, *(term.operand for term in terms), *extras)
    apply = _apply(operation, rule, weights)
    dtype = operation.core.outs[0].aval.dtype

    def function(x, w, *rest):
        operands, extra = rest[: len(terms)], list(rest[len(terms) :])
        w, b = fold(operation, w, [term.does for term in terms], operands)
        summand = extra.pop(0) if beside is not None else None
        b = b if b is not None and biased else jnp.zeros((), dtype)
        z = apply(x, w, b, *extra, *[None] * (2 - len(extra)))
        return [z if summand is None else kept(summand + z)]

    return node, Step(ins, function)


def without_bias(operation: Linear) -> Callable[[Array, Array], Array]:
    """The operation as a function of its input and weight."""
    if isinstance(operation, BatchNorm):
        return jnp.multiply
    core = operation.core
    return _moved(operation, lambda *ins: core.bind(*ins)[0])


def for_rules(operation: Linear) -> tuple[Callable, Callable]:
    """The same function as rules compute it, and in a form that is cheap to transpose."""
    usual = without_bias(operation)
    if isinstance(operation, BatchNorm):
        return usual, usual
    if product := patch_product(operation.core):
        return (_moved(operation, product),) * 2
    backward = transposable(operation.core)
    return usual, _moved(operation, backward) if backward else usual


def _moved(operation: Linear, product: Callable[[Array, Array], Array]) -> Callable:
    """A product of the two operands of an operation's core, and the moves after it."""
    position = operation.core.ins.index(operation.x)

    def function(x, w):
        z = product(*((x, w) if position == 0 else (w, x)))
        for node in operation.moves:
            (z,) = node.bind(z)
        return z

    return function


def fold(
    operation: Linear, w: Any, names: Sequence[str], operands: Sequence[Any]
) -> tuple[Any, Any]:
    """The weight and bias of (x w + ...) after additions and scalings by constants."""
    scale: Any = None
    b: Any = None
    for name, k in zip(names, operands, strict=True):
        if name in SCALES:
            k = k if name in MUL else 1 / k
            scale = k if scale is None else scale * k
            b = None if b is None else b * k
        else:
            k = -k if name in SUB else k
            b = k if b is None else b + k
    if isinstance(operation, BatchNorm):
        return scale, b
    if scale is None:
        return w, b
    return (w * _to_weight(operation, scale, w)).astype(w.dtype), b


def _to_weight(operation: Linear, scale: Any, w: Any) -> Any:
    """Per-feature scales, shaped as the output, reshaped to scale the weight's own axes."""
    if jnp.ndim(scale) == 0:
        return scale
    shape = [1] * w.ndim
    for axis, of_weight in operation.features:
        shape[of_weight] = scale.shape[axis]
    return scale.reshape(shape)


def _apply(operation: Linear, rule: Rule, weights: bool) -> Callable[..., Array]:
    """z = op(x, w) + b, whose derivative by x is the rule, and by w its relevance.

    A weight's relevance is the sum of the messages through it: the rule with the roles of input
    and weight exchanged.
    """
    function, (of_rule, backwards) = without_bias(operation), for_rules(operation)
    flags = {"nonneg": operation.nonneg, "relu_after": operation.relu_after}

    def backward(x, w, b, z, c, present):
        op = Bilinear(of_rule, x, transposable=backwards, **flags, present=present)
        r = jnp.asarray(rule.bwd(op, x, w, b, z, c))
        # Of weights that are explained, the relevance through them is that of the swapped map.
        swapped = Bilinear(of_rule, x).swapped(w) if weights else None
        through = rule.bwd(swapped, w, x, b, z, c).astype(w.dtype) if swapped else None
        return r, op.ones(r) if rule.direct else None, through

    @jax.custom_vjp
    def apply(x, w, b, probe, present):
        return function(x, w) + b

    def fwd(x, w, b, probe, present):
        z = function(x, w) + b
        return z, (x, w, b, z, probe, present)

    def bwd(residuals, c):
        *arrays, probe, present = residuals
        # Constants of a scan come as NumPy arrays.
        x, w, b, z = map(jnp.asarray, arrays)
        r, ones, through = backward(x, w, b, z, c, present)
        if r.shape != x.shape:
            raise ValueError(
                f"lrp: {rule}.bwd returned shape {r.shape} for an input of shape {x.shape} at "
                f"{operation.where()}; return relevance / x, in the shape of x, such as op.T(w, s)"
            )
        r = r.astype(x.dtype)
        if rule.direct and probe is not None:
            return None, None, None, r * ones, None
        if rule.direct:
            # Not at an input: relevance / value, as good as the value is far from zero.
            return r / stabilise(x, 1e-9), None, None, None, None
        return r, through, None, None, None

    apply.defvjp(fwd, bwd)
    return apply


# Everything else.


def _elementwise(operation: Elementwise, rule: ActivationRule) -> Step | None:
    if operation.is_relu and isinstance(rule, Pass):
        return None
    f = operation.function()
    passed: Callable = rule.elementwise
    if type(rule) is Pass:
        passed = functools.partial(rule.elementwise, scalar=operation.scalar())

    @jax.custom_vjp
    def apply(x, consts):
        return f(x, consts)

    def bwd(residuals, c):
        x, consts = residuals
        # What the forward pass computed of x is not shared: XLA would keep the parts of f, three
        # arrays of a GELU's erfc, and write each by a loop of its own.
        x = lax.optimization_barrier(x)
        return passed(lambda x: f(x, consts), x, c).astype(x.dtype), None

    apply.defvjp(lambda x, consts: (f(x, consts), (x, consts)), bwd)
    return Step((operation.start, *operation.consts), lambda x, *consts: [apply(x, consts)])


def _product(operation: Product, rule: ProductRule) -> Step:
    node = operation.node
    if node.name in REDUCE_PROD:
        factors = max(1, primitives.reduced(node.equation, node.ins[0].shape))
        return Step(node.ins, lambda x: [share(node.bind(x)[0], 1 / factors)])
    first, second = rule.shares((operation.gates[0], operation.gates[1]))
    if node.name in DIV:
        return Step(node.ins, lambda a, b: [share(a, first) * share(_inverse(b), second)])
    return Step(node.ins, lambda a, b: node.bind(share(a, first), share(b, second)))


def share(x: Array, part: float) -> Array:
    """x, with a part of its cotangent.

    With no part it is not `stop_gradient`, which would also hide x from whoever differentiates
    the relevance.
    """
    if part == 1:
        return x

    @jax.custom_vjp
    def apply(x):
        return x

    apply.defvjp(lambda x: (x, None), lambda _, c: (None if part == 0 else c * part,))
    return apply(x)


@jax.custom_vjp
def _inverse(x):
    """1 / x, through which relevance passes unchanged."""
    return 1 / x


_inverse.defvjp(lambda x: (1 / x, x), lambda x, c: (c / x / x,))


def share_sum(z: Array, epsilon: Any) -> Array:
    """z, with the cotangent c z / s(z): the Epsilon rule for a sum that is computed already."""

    @jax.custom_vjp
    def apply(z):
        return z

    apply.defvjp(lambda z: (z, z), lambda z, c: (c * (z / stabilise(z, epsilon)),))
    return apply(z)
