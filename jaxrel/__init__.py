"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

from jaxrel import versions

versions.check(*versions.running())

from jaxrel import attention, gradients
from jaxrel.batch import Explainer
from jaxrel.explanations.explain import explain
from jaxrel.explanations.result import Explanation
from jaxrel.propagation import composites, rules
from jaxrel.propagation.composites import Composite, everything, first, layer, op, path
from jaxrel.propagation.conservation import conservation
from jaxrel.propagation.lrp import lrp, lrp_vjp, modified_gradient, value_and_lrp
from jaxrel.propagation.plan import plan
from jaxrel.tracing import tag
from jaxrel.tracing.capture import capture, capture_with_grad

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "Explainer",
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
