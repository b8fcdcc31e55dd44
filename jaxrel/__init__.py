"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

from jaxrel import attention
from jaxrel.explainer import explain
from jaxrel.explanation import Explanation
from jaxrel.tracing import capture, capture_with_grad, tag

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "attention",
    "capture",
    "capture_with_grad",
    "explain",
    "tag",
]
