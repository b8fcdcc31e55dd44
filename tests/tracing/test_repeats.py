"""What a program repeats is traced once, and computes what it did."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention, composites, rules
from jaxrel.propagation.assignment import prepare
from jaxrel.propagation.composites import as_composite
from jaxrel.propagation.operations import Linear
from jaxrel.tracing import trace
from jaxrel.tracing.facts import Fact
from jaxrel.tracing.repeats import parts
from jaxrel.train.evaluate.flops import equations

WIDTH = 8


def layers(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 3) for name in ("up", "down", "keys")}
        | {"shift": jnp.asarray(rng.normal(size=WIDTH))}
        for _ in range(count)
    ]


def block(x, layer):
    scores = jnp.einsum("bqd,bkd->bqk", x @ layer["keys"], x)
    x = x + jax.nn.softmax(scores) @ x
    return x + jax.nn.gelu(x @ layer["up"] + layer["shift"]) @ layer["down"]


def network(params, x, around=lambda block: block):
    for layer in params:
        x = around(block)(x, layer)
    return x[:, 0]


RULES = {
    "attn_lrp": composites.attn_lrp(),
    "z+": jaxrel.Composite([(jaxrel.op("dense"), rules.ZPlus())]) + composites.attn_lrp(),
}


@pytest.mark.parametrize("around", [lambda block: block, jax.checkpoint])
@pytest.mark.parametrize("name", RULES)
def test_a_layer_more_is_one_call_more(name, around):
    """Tracing grows by the model's own equations and by calls, not by the rules' equations."""
    x = jnp.ones((2, 5, WIDTH))
    fun = functools.partial(network, around=around)
    explain = jaxrel.lrp(fun, RULES[name], argnums=1)
    few, many = (equations(explain, layers(count), x) for count in (6, 12))
    # Two calls, forward and backward, and what adds cotangents of an input.
    assert many - few <= 6 * 4


def test_attention_relevance_of_a_layer_more():
    x = jnp.ones((2, 5, WIDTH))
    score = lambda params, x: network(params, x).sum(-1)
    explain = attention.relevance(score, method="equal", argnums=1)
    few, many = (equations(explain, layers(count), x) for count in (6, 12))
    alone = equations(jax.grad(lambda x, params: score(params, x).sum()), x, layers(1))
    assert many - few < 6 * alone / 2


@pytest.mark.parametrize("around", [lambda block: block, jax.checkpoint])
@pytest.mark.parametrize("name", RULES)
def test_the_same_numbers_as_operation_by_operation(x64, name, around):
    params, x = layers(4), jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, WIDTH)))
    explain = jaxrel.lrp(functools.partial(network, around=around), RULES[name], argnums=1)
    # Of the same operations; XLA's fusions round otherwise.
    np.testing.assert_allclose(jax.jit(explain)(params, x), explain(params, x), rtol=1e-8)
    mapped = jax.vmap(explain, in_axes=(None, 0))(params, x[:, None])
    np.testing.assert_allclose(mapped[:, 0], explain(params, x), rtol=1e-8)


def test_equal_shapes_of_other_rules_or_operations_stay_apart(x64):
    params, x = layers(6), jnp.asarray(np.random.default_rng(1).normal(size=(3, WIDTH)))

    def plain(params, x):
        for i, layer in enumerate(params):
            z = x @ layer["up"]
            # The sign of the shift is the one difference between layers.
            x = jnp.tanh(z + layer["shift"] if i < 3 else z - layer["shift"])
        return x

    first = jaxrel.path("0/*") | jaxrel.path("1/*")
    mixed = [(first, rules.ZPlus()), (jaxrel.op("dense"), rules.Epsilon(0.1))]
    for chosen in (mixed, rules.Epsilon(0.1)):
        explain = jaxrel.lrp(plain, chosen, argnums=1)
        np.testing.assert_allclose(jax.jit(explain)(params, x), explain(params, x), rtol=1e-9)


def test_what_a_later_part_reads_leaves_the_part(x64):
    """An intermediate value of one layer alone is used at the end: all layers return it."""
    params, x = layers(5), jnp.asarray(np.random.default_rng(1).normal(size=(3, WIDTH)))

    def skipping(params, x):
        kept = []
        for layer in params:
            y = jnp.tanh(x @ layer["up"] + layer["shift"])
            kept.append(y)
            x = jnp.tanh(y @ layer["down"] + layer["shift"])
        return x + kept[1] + kept[3]

    explain = jaxrel.lrp(skipping, rules.Epsilon(0.1), argnums=1)
    np.testing.assert_allclose(jax.jit(explain)(params, x), explain(params, x), rtol=1e-9)


def test_parts_of_a_program():
    def fun(x):
        x = jnp.sin(x)
        for _ in range(5):
            x = jnp.cos(jnp.exp(jnp.tanh(x * 2)))
        return jnp.log(x)

    graph = trace(fun, jnp.ones(3)).graph
    key = lambda node: node.name
    found = parts(graph.nodes, lambda node: node.ins, key, (), graph.outs)
    assert [len(part.nodes) for part in found] == [1, 4, 4, 4, 4, 4, 1]
    assert [part.key is not None for part in found] == [False, *[True] * 5, False]
    assert len({part.key for part in found[1:6]}) == 1
    assert all(len(part.ins) == len(part.outs) == 1 for part in found[1:6])
    assert [node for part in found for node in part.nodes] == [*graph.nodes]


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, lambda x: jnp.maximum(x, 0)])
def test_rectifiers_tell_linear_maps_of_signs(activation):
    """After a ReLU, cut off or not, nothing is negative; before it, nothing comes to negatives."""
    w = jnp.ones((WIDTH, WIDTH))
    traced = trace(lambda x: activation(activation(x @ w) @ w) @ w, jnp.ones((2, WIDTH)))
    explained = [Fact(active=True, fresh=True)]
    prepared = prepare(traced.graph, as_composite(composites.epsilon_plus()), explained)
    maps = [one.operation for one in prepared.choices if isinstance(one.operation, Linear)]
    assert [one.nonneg for one in maps] == [False, True, True]
    assert [one.relu_after for one in maps] == [True, True, False]
