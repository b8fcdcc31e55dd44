"""Attention relevance: equal and weighted accumulation, the baselines, and streaming forms.

`relevance` explains a function as it stands; the rest are pure functions of attention maps and
their gradients.
"""

from jaxrel.attention.accumulate import Layers, Maps, equal, weighted
from jaxrel.attention.baselines import cross_rollout, grad_cam, no_aggregation, raw, rollout
from jaxrel.attention.bimodal_relevance import value_and_bimodal_relevance, value_and_layers
from jaxrel.attention.bimodal_schedules import (
    CoAttention,
    bimodal,
    bimodal_accumulation,
    encoder_decoder,
)
from jaxrel.attention.blocks import blockwise
from jaxrel.attention.discovery import Site, Stack, sites
from jaxrel.attention.encoder_methods import grad_eclip, legrad
from jaxrel.attention.followed import Coverage
from jaxrel.attention.importance import layer_weights, measure, weights
from jaxrel.attention.maps import head_mean, row
from jaxrel.attention.methods import BIMODAL_METHODS, ENCODER_METHODS, METHODS
from jaxrel.attention.pooling import Pooling
from jaxrel.attention.streaming import Carrier
from jaxrel.attention.token_changes import token_tm
from jaxrel.attention.unimodal_relevance import layers_followed, relevance, value_and_relevance
from jaxrel.renamed import renamed

__all__ = [
    "BIMODAL_METHODS",
    "ENCODER_METHODS",
    "METHODS",
    "Carrier",
    "CoAttention",
    "Coverage",
    "Layers",
    "Maps",
    "Pooling",
    "Site",
    "Stack",
    "bimodal",
    "bimodal_accumulation",
    "blockwise",
    "cross_rollout",
    "encoder_decoder",
    "equal",
    "grad_cam",
    "grad_eclip",
    "head_mean",
    "layer_weights",
    "layers_followed",
    "legrad",
    "measure",
    "no_aggregation",
    "raw",
    "relevance",
    "rollout",
    "row",
    "sites",
    "token_tm",
    "value_and_bimodal_relevance",
    "value_and_layers",
    "value_and_relevance",
    "weighted",
    "weights",
]

__getattr__ = renamed(
    __name__,
    {
        "TWO_STREAM_METHODS": "jaxrel.attention.BIMODAL_METHODS",
        "carrier": "jaxrel.attention.streaming",
        "two_streams": "jaxrel.attention.bimodal_accumulation",
        "value_and_two_stream_relevance": "jaxrel.attention.value_and_bimodal_relevance",
    },
)
