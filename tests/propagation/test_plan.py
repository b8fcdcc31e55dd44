"""`plan`: the table of operations and rules."""

from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import composites
from jaxrel.propagation.rules import (
    Flat,
    Pass,
)
from tests.propagation.networks import RNGS, W42


def test_the_plan_says_what_happens(x64):
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), rngs=RNGS),
        nnx.BatchNorm(4, use_running_average=True, rngs=RNGS),
        nnx.relu,
        lambda x: x.mean((1, 2)),
        nnx.Linear(4, 2, rngs=RNGS),
    )
    x = jnp.ones((1, 6, 6, 3))
    table = jaxrel.plan(lambda m, x: m(x), composites.epsilon_plus_flat(), argnums=1)(model, x)
    assert [row.kind for row in table] == ["conv", "activation", "mean", "dense"]
    conv, relu, _, linear = table
    assert conv.rule == Flat()
    assert conv.first
    assert "folded" in conv.note
    assert conv.paths == ("layers/0/kernel",)
    assert relu.rule == Pass()
    assert relu.default
    assert relu.note == "relu"
    assert linear.bias == "fused"
    assert "x >= 0" in linear.note
    text = str(table)
    assert "test_plan.py" in text
    assert "Flat()" in text
    assert "layers/4/kernel" in text


def test_the_plan_shows_what_is_not_covered():
    table = jaxrel.plan(lambda x: jnp.fft.fft(x).real @ W42, [])(jnp.ones(4))
    assert {row.kind for row in table.uncovered} >= {"fft", "dense"}
    assert "NONE" in str(table)


def test_lines_of_a_package_begin_with_its_name():
    """No line of the calls is the user's, and no folder of an environment is in the way."""
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=RNGS), nnx.relu, nnx.Linear(8, 3, rngs=RNGS))
    first, activation, last = jaxrel.plan(model, composites.epsilon_plus())(jnp.ones((2, 4)))
    assert first.where == last.where
    assert first.where.startswith("flax/nnx/nn/linear.py:")
    assert activation.where.startswith("flax/nnx/helpers.py:")
