"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

from jaxrel.tracing import capture, capture_with_grad, tag

__version__ = "0.1.0"

__all__ = ["capture", "capture_with_grad", "tag"]
