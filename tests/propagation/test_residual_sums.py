"""Sums of a residual stream are computed once, so that programs grow as the layers do."""

import re

import jax
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from jaxrel.propagation.rules import Epsilon

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.skipif(
        jax.__version_info__ < (0, 12),
        reason="XLA's CPU backend of older versions drops barriers before it fuses",
    ),
]


def network(x, weights):
    for weight in weights:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = x + jnp.tanh((x - mean) / jnp.sqrt(var + 1e-5) @ weight)
    return x.sum(-1)


def most_operands(rules, layers):
    """Of the kernels that XLA makes."""
    x, weights = jnp.ones((4, 8)), jnp.ones((layers, 8, 8))
    text = jax.jit(jaxrel.lrp(network, rules)).lower(x, weights).compile().as_text()
    heads = re.findall(r"^%?\S*fused\S* \((.*)\) -> .* \{$", text, re.MULTILINE)
    assert heads
    return max(head.count(":") for head in heads)


@pytest.mark.parametrize(
    "rules",
    [composites.attn_lrp(), composites.epsilon_plus(), Epsilon(1e-6)],
    ids=["the sum is exact", "zennit's composite", "the sum has a rule"],
)
def test_no_kernel_reads_all_layers(rules):
    assert most_operands(rules, 12) == most_operands(rules, 6)
