"""A function as data: graph from a jaxpr, analysis, patterns, evaluation with changes."""

from jaxrel.tracing.evaluate import Edits, Evaluated, Interceptor, Step, tap_shapes
from jaxrel.tracing.graph import Constant, Graph, Node, Traced, Value, build, tag_name, trace
from jaxrel.tracing.tags import tag

__all__ = [
    "Constant",
    "Edits",
    "Evaluated",
    "Graph",
    "Interceptor",
    "Node",
    "Step",
    "Traced",
    "Value",
    "build",
    "tag",
    "tag_name",
    "tap_shapes",
    "trace",
]
