"""The old name of `jaxrel.explanations.result`, for one version."""

from jaxrel.renamed import renamed

__getattr__ = renamed(__name__, {"*": "jaxrel.explanations.result"})
