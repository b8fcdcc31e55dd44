"""`pullback`: cotangents of arguments, taps and carrier in one pass, as `jax.vjp` has them."""

import equinox
import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import gradients
from jaxrel.tracing import Edits, Interceptor, Step, tag_name, trace
from jaxrel.tracing.pullback import Call, pullback
from tests.tracing.layers import LAYERS, WEIGHTS, X, layer, remat, scanned

# Same operations, other fusion: float32 rounding only.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def hidden(graph):
    (value,) = [node.outs[0] for node in graph.walk() if tag_name(node)]
    return value


@pytest.mark.parametrize("fun", [scanned, remat], ids=["scan", "remat"])
def test_arguments_taps_and_carrier_come_back_together(fun):
    traced = trace(lambda w, x: fun(x) @ w, X[:, 0], X)

    @jax.custom_vjp
    def count(carrier, value):
        return carrier, value

    count.defvjp(lambda c, v: ((c, v), None), lambda _, ct: (ct[0] + 1, ct[1]))
    value = hidden(traced.graph)
    edits = Edits(taps={value: "hidden"}, interceptors={value: Interceptor(count)})
    evaluated, back = pullback(traced.graph, traced.args, edits, by=[1, 0], carrier=0.0)
    c = jnp.float32(3.0)
    np.testing.assert_allclose(evaluated.outs[0], fun(X) @ X[:, 0], **CLOSE)
    pulled = back(c)
    expected = jax.grad(lambda x, w: c * (fun(x) @ w), argnums=(0, 1))(X, X[:, 0])
    for found, want in zip(pulled.args, expected, strict=True):
        np.testing.assert_allclose(found, want, **CLOSE)
    _, values, grads = jaxrel.capture_with_grad(lambda x: c * (fun(x) @ X[:, 0]), "hidden")(X)
    np.testing.assert_allclose(evaluated.taps["hidden"], values["hidden"], **CLOSE)
    np.testing.assert_allclose(pulled.taps["hidden"], grads["hidden"], **CLOSE)
    # The carrier's own cotangent is zero unless given.
    assert (pulled.carrier, back(c, 5.0).carrier) == (LAYERS, LAYERS + 5)


def test_going_back_many_times_is_a_vmap():
    traced = trace(lambda x: layer(x, WEIGHTS[0]).sum(0), X)
    _, back = pullback(traced.graph, traced.args, by=[0])
    seeds = jnp.eye(X.shape[1])
    jacobian = jax.jacobian(lambda x: layer(x, WEIGHTS[0]).sum(0))(X)
    np.testing.assert_allclose(jax.vmap(back)(seeds).args[0], jacobian, **CLOSE)


def test_replaced_steps_are_what_is_differentiated():
    traced = trace(lambda x: jnp.exp(x), X)
    (node,) = traced.graph.nodes
    edits = Edits(steps={node: Step(node.ins, lambda x: [x * 7])})
    evaluated, back = pullback(traced.graph, traced.args, edits, by=[0])
    np.testing.assert_allclose(evaluated.outs[0], 7 * X, **CLOSE)
    np.testing.assert_allclose(back(jnp.ones_like(X)).args[0], 7 * np.ones_like(X), **CLOSE)


def test_a_call_knows_its_leaves():
    args = ({"a": X, "b": [np.arange(2), X[0]]}, True, None, X[1])
    fun = lambda tree, flag, nothing, last: tree["a"].sum() if flag else last
    call = Call.of("test", fun, args, (3, 0))
    assert call.paths == ("a", "b/0", "b/1", "last")
    assert call.chosen() == [3, 0, 1, 2]
    assert call.explained() == [3, 0, 2]
    last, tree = call.gather({i: i for i in call.explained()})
    assert (last, tree["a"], tree["b"][1]) == (3, 0, 2)
    np.testing.assert_array_equal(tree["b"][0], np.zeros(2, np.float32))
    single = Call.of("test", fun, args, -1)
    assert single.gather({3: "relevance"}) == "relevance"


class Dropped(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


def linen_dropped(x, train):
    dropout = linen.Dropout(0.5, deterministic=not train)
    return dropout.apply({}, x, rngs={"dropout": jax.random.key(1)}).sum(-1)


def equinox_dropped(x, train):
    dropout = equinox.nn.Dropout(0.5, inference=not train)
    return dropout(x, key=jax.random.key(1)).sum(-1)


@pytest.mark.parametrize("fun", [linen_dropped, equinox_dropped])
def test_dropout_that_is_on_is_told(fun):
    x, rules = jnp.ones((2, 4)), jaxrel.composites.epsilon_plus()
    with pytest.warns(UserWarning, match=r"^lrp: the function draws a random mask at .*pullback"):
        jaxrel.lrp(lambda x: fun(x, True), rules)(x)
    with pytest.warns(UserWarning, match=r"^gradient: the function draws a random mask"):
        jax.jit(gradients.gradient(lambda x: fun(x, True)))(x)
    jaxrel.lrp(lambda x: fun(x, False), rules)(x)


def test_the_advice_about_dropout_gives_the_relevance_of_the_whole_model():
    x, rules, model = jnp.ones((2, 4)), jaxrel.composites.epsilon_plus(), Dropped()
    with pytest.warns(UserWarning, match=r"turn dropout off, as with model\.eval\(\)"):
        masked = jaxrel.lrp(model, rules)(x)
    model.eval()
    whole = jaxrel.lrp(lambda x: model.last(nnx.relu(model.first(x))), rules)(x)
    np.testing.assert_allclose(jaxrel.lrp(model, rules)(x), whole, rtol=1e-6)
    assert not np.allclose(masked, whole, atol=1e-2)


def test_weights_drawn_inside_are_no_dropout():
    def fun(x):
        hidden = x @ jax.random.normal(jax.random.key(0), (4, 8))
        return jnp.where(hidden > 0, hidden, 0).sum(-1)

    jaxrel.lrp(fun, jaxrel.composites.epsilon_plus())(jnp.ones((2, 4)))
