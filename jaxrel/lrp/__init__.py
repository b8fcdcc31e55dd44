"""LRP as a transformation: rules, composites, the plan, and `lrp` itself."""

from jaxrel.lrp import composites, rules
from jaxrel.lrp.composites import Composite, everything, first, layer, op, path
from jaxrel.lrp.conservation import conservation
from jaxrel.lrp.plan import plan
from jaxrel.lrp.transformation import lrp, lrp_vjp, modified_gradient, value_and_lrp

__all__ = [
    "Composite",
    "composites",
    "conservation",
    "everything",
    "first",
    "layer",
    "lrp",
    "lrp_vjp",
    "modified_gradient",
    "op",
    "path",
    "plan",
    "rules",
    "value_and_lrp",
]
