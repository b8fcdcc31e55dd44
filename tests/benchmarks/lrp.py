"""LRP as it is measured: the composites, and what each is held against."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel import Composite, composites, lrp, op, path, rules
from tests.benchmarks.lrp_models import HIGH, LOW

GAMMA = 0.25
CONVOLUTIONAL = {
    "epsilon": Composite([(op("conv", "dense", "add", "mean"), rules.Epsilon())]),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(LOW, HIGH),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
}
TRANSFORMER = {
    "attn_lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "cp_lrp, gamma": Composite([(path("*/mlp"), rules.Gamma(GAMMA))]) + composites.cp_lrp(),
}


def grad(fun: Callable, classes: np.ndarray) -> Callable:
    """The baseline: the gradient of the chosen logits by the input."""

    def total(params, x):
        logits = fun(params, x)
        return jnp.sum(logits * jax.nn.one_hot(classes, logits.shape[-1]))

    return jax.grad(total, argnums=1)


def explain(fun: Callable, composite: Composite, classes: np.ndarray) -> Callable:
    """Relevance of the input for the chosen logits, as a user asks for it."""

    def seed(logits):
        return logits * jax.nn.one_hot(classes, logits.shape[-1])

    return partial(lrp(fun, composite, argnums=1), seed=seed)
