"""Composites and conditions: which entry decides, and what is refused."""

import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from jaxrel.propagation.rules import (
    Epsilon,
    Pass,
    Stop,
    ZPlus,
)


def test_a_hidden_entry_is_an_error():
    params, x = {"w": jnp.ones((4, 2))}, jnp.ones((1, 4))
    rules = [(jaxrel.everything(), Epsilon()), (jaxrel.path("w"), ZPlus())]
    with pytest.raises(ValueError, match=r"entry 1.*never decides: entry 0.*comes first"):
        jaxrel.lrp(lambda p, x: x @ p["w"], rules, argnums=1)(params, x)


@pytest.mark.parametrize(
    ("entries", "kind", "text"),
    [
        ([Epsilon()], TypeError, r"entry 0 must be a pair \(where, rule\)"),
        ([("conv", Epsilon())], TypeError, "entry 0 begins with 'conv'"),
        ([(jaxrel.op("conv"), Epsilon)], TypeError, r"did you mean Epsilon\(\)"),
        ([(jaxrel.op("softmax"), Epsilon())], ValueError, "uses Epsilon.* on 'softmax'; it is for"),
        ([(jaxrel.op("dense"), Pass())], ValueError, "it is for activation"),
    ],
)
def test_bad_composites(entries, kind, text):
    with pytest.raises(kind, match=text):
        jaxrel.Composite(entries)


def test_conditions_combine_and_read_well():
    where = jaxrel.path("a/*") & ~jaxrel.first() | jaxrel.op("conv", "dense") & jaxrel.layer(2)
    assert repr(where) == ("((path('a/*') & ~first()) | (op('conv', 'dense') & layer(2)))")
    with pytest.raises(ValueError, match="expected a glob"):
        jaxrel.path("")
    with pytest.raises(ValueError, match="expected names"):
        jaxrel.op()
    with pytest.raises(TypeError, match="int or a slice"):
        jaxrel.layer("a")


def test_ones_own_entries_come_first():
    mine = jaxrel.Composite([(jaxrel.op("conv"), Stop())])
    assert (mine + composites.epsilon_plus()).entries[0] == mine.entries[0]
