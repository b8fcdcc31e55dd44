"""The old name of `jaxrel.explanations.explain`, for one version."""

from jaxrel.renamed import renamed

__getattr__ = renamed(
    __name__,
    {
        "*": "jaxrel.explanations.explain",
        "TWO_STREAM": "jaxrel.explanations.explain.BIMODAL_METHODS",
    },
)
