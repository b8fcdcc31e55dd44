"""A function as data: graph from a jaxpr, analysis, patterns, evaluation with changes."""

from jaxrel.tracing.capture import capture, capture_with_grad
from jaxrel.tracing.evaluate import Edits, Evaluated, Step, Touch, evaluate, tap_shapes
from jaxrel.tracing.graph import Constant, Graph, Node, Traced, Value, build, tag_name, trace
from jaxrel.tracing.tags import tag

__all__ = [
    "Constant",
    "Edits",
    "Evaluated",
    "Graph",
    "Node",
    "Step",
    "Touch",
    "Traced",
    "Value",
    "build",
    "capture",
    "capture_with_grad",
    "evaluate",
    "tag",
    "tag_name",
    "tap_shapes",
    "trace",
]
