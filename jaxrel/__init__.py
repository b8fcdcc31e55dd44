"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

from jaxrel import versions

versions.check(*versions.running())

from jaxrel import attention, gradients
from jaxrel.explainer import explain
from jaxrel.explanation import Explanation
from jaxrel.lrp import (
    Composite,
    composites,
    conservation,
    everything,
    first,
    layer,
    lrp,
    lrp_vjp,
    modified_gradient,
    op,
    path,
    plan,
    rules,
    value_and_lrp,
)
from jaxrel.tracing import capture, capture_with_grad, tag

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "Explanation",
    "attention",
    "capture",
    "capture_with_grad",
    "composites",
    "conservation",
    "everything",
    "explain",
    "first",
    "gradients",
    "layer",
    "lrp",
    "lrp_vjp",
    "modified_gradient",
    "op",
    "path",
    "plan",
    "rules",
    "tag",
    "value_and_lrp",
]
