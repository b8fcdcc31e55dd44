"""What must hold of every model in the zoo, each as one number: the greatest difference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import jaxrel
from jaxrel import attention, composites, rules
from tests.zoo.packages import by_hand
from tests.zoo.packages.exhibit import Exhibit

TARGET_TOKEN = 1
EPSILON = 1e-12


class Case:
    """A model that was built, and what several checks need of it."""

    def __init__(self, exhibit: Exhibit):
        self.exhibit = exhibit
        self.model = exhibit.build()
        self.fun, self.params, self.x = self.model.fun, self.model.params, self.model.x

    def explain(self, composite: Any = None) -> Callable:
        """(params, x) -> relevance of x."""
        return jaxrel.lrp(self.fun, composite or self.exhibit.composite, argnums=1)

    @functools.cached_property
    def relevance(self) -> Any:
        """The relevance of the batch under the preset that suits the model, compiled."""
        return jax.jit(self.explain())(self.params, self.x)

    def score(self, params: Any, x: Any) -> Any:
        """One number for each example."""
        return self.fun(params, x)[:, 0]


def error(actual: Any, expected: Any) -> float:
    """The greatest difference, in units of the greatest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.all(np.isfinite(actual)), "relevance is not finite"
    assert np.any(expected != 0), "what is expected is 0"
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def jit(case: Case) -> float:
    """Compiled, relevance is what it is operation by operation."""
    return error(case.relevance, case.explain()(case.params, case.x))


def one_by_one(case: Case) -> float:
    """The relevance of a batch is that of its examples."""
    one = jax.jit(case.explain())
    found = [one(case.params, case.x[i : i + 1]) for i in range(len(case.x))]
    return error(case.relevance, jnp.concatenate(found))


def vmap(case: Case) -> float:
    """`vmap` over examples is the batch."""
    explain = case.explain()
    alone = jax.vmap(lambda params, x: explain(params, x[None])[0], in_axes=(None, 0))
    return error(jax.jit(alone)(case.params, case.x), case.relevance)


def gradient(case: Case) -> float:
    """With the derivative as the rule of everything, relevance is input x gradient."""
    found = jax.jit(case.explain(rules.Gradient()))(case.params, case.x)
    by_x_gradient = functools.partial(by_hand.input_x_gradient, case.model)
    return error(found, jax.jit(by_x_gradient)(case.params, case.x))


def equal(case: Case) -> float:
    """Equal accumulation, of attention that was found, is the one by hand."""
    options = {"method": "equal", "target_token": TARGET_TOKEN, "argnums": 1}
    found = jax.jit(attention.relevance(case.score, **options))(case.params, case.x)
    known = case.exhibit.attention
    expected = by_hand.equal(known, case.score, case.params, case.x)[:, TARGET_TOKEN]
    # The identity that relevance starts from would hide what is added to it.
    own = np.eye(expected.shape[-1])[TARGET_TOKEN]
    return error(found - own, expected - own)


def cp_lrp(case: Case) -> float:
    """CP-LRP, of operations that were recognised, is that of functions known by name."""
    slopes = case.exhibit.slopes
    gates = composites.Composite([(jaxrel.op("product"), rules.SignalTakesAll(slopes.gate))])
    explain = case.explain(gates + composites.cp_lrp(EPSILON))
    found = jax.jit(explain)(case.params, case.x)
    return error(found, by_hand.cp_lrp(slopes, case.model))


def conservation(case: Case) -> float:
    """What starts at the output arrives at the input, or is accounted for."""
    composite = case.exhibit.composite
    found = jaxrel.conservation(case.fun, composite, argnums=1)(case.params, case.x)
    totals = found.summary()
    started, arrived = case.fun(case.params, case.x).sum(), case.relevance.sum()
    scale = max(abs(balance.received) for balance in found)
    gaps = (totals["elsewhere"], totals["output"] - started, totals["input"] - arrived)
    return float(max(map(abs, gaps)) / scale)


CHECKS: dict[str, Callable[[Case], float]] = {
    "jit": jit,
    "one by one": one_by_one,
    "vmap": vmap,
    "x grad": gradient,
    "CP-LRP": cp_lrp,
    "equal": equal,
    "conservation": conservation,
}


def applies(exhibit: Exhibit, check: str) -> bool:
    """Whether a model has what a check is about."""
    needed = {"equal": exhibit.attention, "CP-LRP": exhibit.slopes}
    return needed.get(check, True) is not None


def tolerance(exhibit: Exhibit, check: str) -> float:
    """What rounding allows, of a thousand operations in a row."""
    if check == "conservation":  # its sums are in float32
        return 1e3 * float(jnp.finfo(jnp.float32).eps)
    if check == "equal" and exhibit.attention is not None:
        return 1e3 * float(jnp.finfo(exhibit.attention.dtype).eps)
    if check == "CP-LRP":  # the stabiliser, beside sums that cancel to a millionth
        return max(1e-6, 1e3 * exhibit.eps)
    return 1e3 * exhibit.eps
