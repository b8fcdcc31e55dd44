"""jaxrel: relevance explanations for JAX. An explanation is a backward pass with other rules."""

from jaxrel.tracing.tags import tag

__version__ = "0.1.0"

__all__ = ["tag"]
