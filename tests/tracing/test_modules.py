"""Modules of Flax and Equinox as functions and as arguments, whatever they hold."""

import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import Composite, attention, composites, gradients, path, rules

X = jax.random.normal(jax.random.key(0), (2, 5, 3))


class Scanned(nnx.Module):
    """`nnx.scan` over two layers."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))
        self.blocks = make(jax.random.split(rngs(), 2))

    def __call__(self, x):
        run = nnx.scan(
            lambda x, block: nnx.relu(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, self.blocks)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.rnn(x)[:, -1]


class Noisy(nnx.Module):
    """Dropout in train mode."""

    def __init__(self, rngs):
        self.drop, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(x))


@pytest.mark.filterwarnings("ignore:.*draws a random mask")
@pytest.mark.parametrize("kind", [Scanned, Recurrent, Noisy])
def test_nnx_modules_that_change_are_functions(kind):
    model = kind(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    counts = [int(x) for x in jax.tree.leaves(nnx.state(model, nnx.RngCount))]
    explain = jaxrel.lrp(lambda model, x: model(x), composites.epsilon_plus(), argnums=1)
    expected = explain(model, X)
    for fun in (model, model.__call__, functools.partial(model)):
        found = jaxrel.lrp(fun, composites.epsilon_plus())(X)
        np.testing.assert_array_equal(found, expected)
    found = jax.jit(gradients.gradient(model))(X)
    expected = gradients.gradient(lambda m, x: m(x), argnums=1)(model, X)
    # float32, compiled and not.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The module is as it was: arrays, and how often its random numbers were drawn.
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    assert counts == [int(x) for x in jax.tree.leaves(nnx.state(model, nnx.RngCount))]


@pytest.mark.filterwarnings("ignore:.*draws a random mask")
def test_nnx_modules_keep_their_parameters_paths():
    model = Noisy(nnx.Rngs(0))
    entries = Composite([(path("out/*"), rules.ZPlus())])
    assert [row.paths for row in jaxrel.plan(model, entries)(X)] == [("out/kernel",)]


@pytest.mark.parametrize("kind", [Scanned, Recurrent, Noisy])
def test_a_closure_over_a_module_that_changes_says_how_to_pass_it(kind):
    model = kind(nnx.Rngs(0))
    for explain in (
        jaxrel.lrp(lambda x: model(x), rules.Epsilon()),
        attention.sites(lambda x: model(x)),
    ):
        with pytest.raises(TypeError, match=r"the module itself.*lambda model, x: model\(x\)"):
            explain(X)


class Odd(eqx.Module):
    """Leaves of every kind: a function, a string, a boolean, a number, arrays."""

    first: eqx.nn.Linear
    activation: object
    name: str
    flag: bool
    power: float
    last: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(1))
        self.first, self.last = eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])
        self.activation, self.name, self.flag, self.power = jnp.tanh, "odd", True, 2.0

    def __call__(self, x):
        y = self.first(x) * self.power
        return self.last(self.activation(y) if self.flag and self.name == "odd" else y)


def test_equinox_modules_may_be_arguments():
    model, x, zplus = Odd(), X[:, 0], Composite([(path("last/*"), rules.ZPlus())])
    rule = zplus + composites.epsilon_plus()
    expected = jnp.stack([jaxrel.lrp(model, rule)(one) for one in x])
    fun = lambda model, x: jax.vmap(model)(x)
    np.testing.assert_allclose(jaxrel.lrp(fun, rule, argnums=1)(model, x), expected, rtol=1e-5)
    weights = jaxrel.lrp(fun, composites.epsilon_plus())(model, x)
    assert weights.activation is None
    assert weights.first.weight.shape == (4, 3)
    _, found = jaxrel.lrp(fun, rule, argnums=1, at=path("last/weight"))(model, x)
    assert list(found) == ["last/weight"]
    np.testing.assert_allclose(
        gradients.gradient(fun, argnums=1)(model, x),
        jax.grad(lambda x: jax.vmap(model)(x).sum())(x),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "batched",
    [
        jax.vmap,
        eqx.filter_vmap,
        lambda model: jax.jit(jax.vmap(model)),
        lambda model: eqx.filter_jit(eqx.filter_vmap(model)),
        lambda model: jax.vmap(lambda x: model(x)),
        lambda model: functools.partial(jax.vmap(lambda m, x: m(x), (None, 0)), model),
        lambda model: (lambda batch: lambda x: batch(x))(jax.vmap(model)),
    ],
    ids=["vmap", "filter_vmap", "jit", "filter_jit", "lambda", "partial", "closure"],
)
def test_parameters_have_their_paths_under_vmap(batched):
    model = Odd()
    rule = Composite([(path("last/*"), rules.ZPlus())]) + composites.epsilon_plus()
    fun = batched(model)
    names = [row.paths for row in jaxrel.plan(fun, rule)(X[:, 0]) if row.paths]
    assert names == [("first/weight",), ("last/weight",)]
    expected = jnp.stack([jaxrel.lrp(model, rule)(one) for one in X[:, 0]])
    np.testing.assert_allclose(jaxrel.lrp(fun, rule)(X[:, 0]), expected, rtol=1e-5)


def test_the_seed_may_be_static_in_jit():
    def fun(x, scale=1.0, *, power=1):
        return (scale * x[:, 0]) ** power

    top = lambda z: jax.nn.one_hot(z.argmax(-1), 3) * z
    explain = jaxrel.lrp(fun, rules.Epsilon())
    found = jax.jit(explain, static_argnames=("seed", "power"))(X, 2.0, seed=top, power=2)
    np.testing.assert_allclose(found, explain(X, 2.0, seed=top, power=2), rtol=1e-6)
    explain = jaxrel.value_and_lrp(fun, rules.Epsilon())
    np.testing.assert_allclose(jax.jit(explain, static_argnames="seed")(X, seed=top)[0], fun(X))


def test_a_loop_in_a_function_with_its_own_derivative_is_one_operation():
    w = jax.random.normal(jax.random.key(0), (3, 3)) / 2
    loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, x))[
        1
    ]
    solve = jax.custom_vjp(loop)
    solve.defvjp(lambda x: (loop(x), None), lambda _, g: (g @ w.T @ w.T @ w.T,))
    x, fun = X[:, 0], lambda x: (solve(x) @ w).sum(-1)
    with pytest.raises(
        NotImplementedError, match=r"custom_vjp_call \(.*test_modules.*Gradient\(\)"
    ):
        jaxrel.lrp(fun, rules.Epsilon())(x)
    entry = [
        (jaxrel.op("custom_vjp_call"), rules.Gradient()),
        (jaxrel.everything(), rules.Epsilon(0.0)),
    ]
    expected = jaxrel.lrp(lambda x: (x @ w @ w @ w @ w).sum(-1), rules.Epsilon(0.0))(x)
    np.testing.assert_allclose(jaxrel.lrp(fun, entry)(x), expected, rtol=1e-4)
    with pytest.warns(UserWarning, match="plain derivative is used"):
        found = jaxrel.lrp(fun, rules.Epsilon(0.0), unknown="warn")(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Without a derivative of its own a loop is refused as ever.
    with pytest.raises(NotImplementedError, match=r"use lax\.scan"):
        jaxrel.lrp(loop, rules.Epsilon())(x)
