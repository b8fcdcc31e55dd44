"""Attention relevance: equal and weighted accumulation, the baselines, and streaming forms.

`relevance` explains a function as it stands; the rest are pure functions of attention maps and
their gradients.
"""

from jaxrel.attention.accumulate import equal, head_mean, row, weighted
from jaxrel.attention.baselines import cross_rollout, grad_cam, no_aggregation, raw, rollout
from jaxrel.attention.bimodal_methods import (
    TWO_STREAM_METHODS,
    value_and_layers,
    value_and_two_stream_relevance,
)
from jaxrel.attention.blocks import blockwise
from jaxrel.attention.discovery import Site, Stack, sites
from jaxrel.attention.importance import layer_weights, measure, weights
from jaxrel.attention.maps import check_finite
from jaxrel.attention.schedules import (
    CoAttention,
    Layers,
    Maps,
    bimodal,
    encoder_decoder,
    two_streams,
)
from jaxrel.attention.streaming import Carrier
from jaxrel.attention.transformation import METHODS, relevance, value_and_relevance

__all__ = [
    "METHODS",
    "TWO_STREAM_METHODS",
    "Carrier",
    "CoAttention",
    "Layers",
    "Maps",
    "Site",
    "Stack",
    "bimodal",
    "blockwise",
    "check_finite",
    "cross_rollout",
    "encoder_decoder",
    "equal",
    "grad_cam",
    "head_mean",
    "layer_weights",
    "measure",
    "no_aggregation",
    "raw",
    "relevance",
    "rollout",
    "row",
    "sites",
    "two_streams",
    "value_and_layers",
    "value_and_relevance",
    "value_and_two_stream_relevance",
    "weighted",
    "weights",
]
