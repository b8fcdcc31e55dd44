"""The old name of `jaxrel.models.checkpoint`, for one version."""

from jaxrel.renamed import renamed

__getattr__ = renamed(__name__, {"*": "jaxrel.models.checkpoint"})
