"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxrel import versions

versions.check(*versions.running())

if TYPE_CHECKING:
    from jaxrel import attention, gradients
    from jaxrel.batch import Explainer
    from jaxrel.contrasts import contrast, contrastive
    from jaxrel.explanations.explain import explain
    from jaxrel.explanations.result import Explanation
    from jaxrel.pairwise import pairwise_relevance
    from jaxrel.propagation import composites, rules
    from jaxrel.propagation.composites import Composite, everything, first, layer, op, path
    from jaxrel.propagation.conservation import conservation
    from jaxrel.propagation.lrp import lrp, lrp_vjp, modified_gradient, value_and_lrp
    from jaxrel.propagation.plan import plan
    from jaxrel.token_maps import token_activation
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
    "contrast",
    "contrastive",
    "everything",
    "explain",
    "first",
    "gradients",
    "layer",
    "lrp",
    "lrp_vjp",
    "modified_gradient",
    "op",
    "pairwise_relevance",
    "path",
    "plan",
    "rules",
    "tag",
    "token_activation",
    "value_and_lrp",
]

# Where each name is; a module stands for itself. It is imported when it is asked for: `jaxrel
# --help` needs no JAX.
_HOMES = {
    "jaxrel.batch": "Explainer",
    "jaxrel.contrasts": "contrast contrastive",
    "jaxrel.explanations.explain": "explain",
    "jaxrel.explanations.result": "Explanation",
    "jaxrel.pairwise": "pairwise_relevance",
    "jaxrel.propagation.composites": "Composite everything first layer op path",
    "jaxrel.propagation.conservation": "conservation",
    "jaxrel.propagation.lrp": "lrp lrp_vjp modified_gradient value_and_lrp",
    "jaxrel.propagation.plan": "plan",
    "jaxrel.token_maps": "token_activation",
    "jaxrel.tracing": "tag",
    "jaxrel.tracing.capture": "capture capture_with_grad",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = {
    "composites": "jaxrel.propagation.composites",
    "rules": "jaxrel.propagation.rules",
    **{
        name: f"jaxrel.{name}"
        for name in "attention batch explanations gradients images metrics models propagation "
        "report tracing train".split()
    },
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        found = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
