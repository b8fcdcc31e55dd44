"""The old name of `jaxrel.flags`, for one version."""

from jaxrel.renamed import renamed

__getattr__ = renamed(__name__, {"Verdict": "jaxrel.flags.Flag"})
