"""`lrp`: its seeds, arguments, places and errors, and under JAX's own transformations."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    AlphaBeta,
    Epsilon,
    Gamma,
    Gradient,
    ZPlus,
)
from tests.propagation.networks import (
    W42,
    dense,
    dense_params,
    normal,
)


def test_a_seed_is_the_relevance_of_the_output(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jax.jit(jaxrel.lrp(dense, Epsilon(1e-12, bias="ignored"), argnums=1))
    seed = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, -3.0]])
    relevance = explain(params, x, seed=seed)
    # Rounding, and epsilon.
    np.testing.assert_allclose(relevance.sum(1), seed.sum(1), rtol=1e-8)
    both = explain(params, x, seed=seed + 1) - explain(params, x, seed=jnp.ones((2, 3)))
    np.testing.assert_allclose(both, relevance, rtol=1e-9, atol=1e-9)


def test_a_seed_may_be_a_function_of_the_output(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, Epsilon(), argnums=1)
    contrast = lambda out: out.at[:, 1].multiply(-1.0).at[:, 2].set(0.0)
    np.testing.assert_array_equal(
        explain(params, x, seed=contrast), explain(params, x, seed=contrast(dense(params, x)))
    )


def test_many_targets_by_vmap(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, ZPlus(), argnums=1)
    seeds = jnp.eye(3)[:, None] * dense(params, x)
    together = jax.vmap(lambda seed: explain(params, x, seed=seed))(seeds)
    for seed, one in zip(seeds, together, strict=True):
        np.testing.assert_allclose(one, explain(params, x, seed=seed), rtol=1e-13, atol=1e-15)


def test_modules_and_closures_name_their_parameters():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3))
    rules = [(jaxrel.path("kernel"), Epsilon())]
    expected = jaxrel.lrp(lambda m, x: m(x), rules, argnums=1)(model, x)
    for fun in (model, model.__call__, lambda x: model(x), functools.partial(model)):
        np.testing.assert_array_equal(jaxrel.lrp(fun, rules)(x), expected)
        assert jaxrel.plan(fun, rules)(x)[0].paths == ("kernel",)


def test_several_arguments_and_structures(x64):
    params = dense_params()
    x = {"a": normal(2, 4), "b": (normal(2, 4), jnp.arange(3))}

    def fun(params, x, y):
        return dense(params, x["a"] * y + x["b"][0])

    found, of_y = jaxrel.lrp(fun, Epsilon(), argnums=(1, 2))(params, x, jnp.float64(2.0))
    assert jax.tree.structure(found) == jax.tree.structure(x)
    assert found["b"][0].shape == (2, 4)
    assert not found["b"][1].any()
    assert of_y.shape == ()


def test_aux_is_passed_through(x64):
    params, x = dense_params(), normal(2, 4)

    def fun(params, x):
        out = dense(params, x)
        return out, {"twice": 2 * out, "shape": out.shape[0]}

    plain = jaxrel.lrp(dense, Epsilon(), argnums=1)(params, x)
    relevance, aux = jaxrel.lrp(fun, Epsilon(), argnums=1, has_aux=True)(params, x)
    np.testing.assert_array_equal(relevance, plain)
    np.testing.assert_array_equal(aux["twice"], 2 * dense(params, x))
    (value, aux), _ = jaxrel.value_and_lrp(fun, Epsilon(), argnums=1, has_aux=True)(params, x)
    np.testing.assert_array_equal(value * 2, aux["twice"])


def test_relevance_at_a_tag_is_kept_between_layers(x64):
    params, x = dense_params(), normal(2, 4)
    explain = jaxrel.lrp(dense, Epsilon(1e-12, bias="ignored"), argnums=1, at="hidden")
    relevance, places = explain(params, x)
    assert places["hidden"].shape == (2, 6)
    # Epsilon 1e-12.
    np.testing.assert_allclose(places["hidden"].sum(), dense(params, x).sum(), rtol=1e-9)
    np.testing.assert_allclose(relevance.sum(), places["hidden"].sum(), rtol=1e-9)


def test_a_tag_in_a_scan_is_stacked(x64):
    w = normal(3, 4, 4)

    def fun(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(jaxrel.tag(x, "x") @ w), None), x, w)[0]

    x = normal(2, 4)
    _, places = jaxrel.lrp(fun, Epsilon(1e-12), argnums=1, at="x")(w, x)
    assert places["x"].shape == (3, 2, 4)
    np.testing.assert_allclose(places["x"].sum((1, 2)), fun(w, x).sum(), rtol=1e-8)


def test_integer_tokens_are_explained_where_they_are_looked_up(x64):
    params = dense_params() | {"table": normal(10, 4)}

    def fun(params, tokens):
        return dense(params, jaxrel.tag(params["table"][tokens], "embed").mean(1))

    tokens = jnp.array([[1, 2, 3], [4, 5, 1]])
    explain = jaxrel.lrp(fun, Epsilon(1e-12, bias="ignored"), argnums=None, at="embed")
    places = jax.jit(explain)(params, tokens)
    assert places["embed"].shape == (2, 3, 4)
    np.testing.assert_allclose(places["embed"].sum(), fun(params, tokens).sum(), rtol=1e-9)
    found = jaxrel.lrp(fun, Epsilon(1e-12, bias="ignored"), argnums=1)(params, tokens)
    np.testing.assert_allclose(found, places["embed"].sum(-1), rtol=1e-9)


@pytest.mark.parametrize("rule", [Epsilon(1e-12), ZPlus(1e-12), Gamma(0.25, 1e-12), AlphaBeta()])
def test_relevance_of_weights_is_the_sum_of_the_messages(x64, rule):
    params, x = dense_params() | {"b1": jnp.zeros(6)}, normal(2, 4)
    explain = jaxrel.lrp(dense, rule, argnums=1, at=(jaxrel.path("w*"), "hidden"))
    relevance, places = explain(params, x)
    assert places["w1"].shape == (4, 6)
    # Messages through w1 sum over outputs and batch to the input's relevance, by feature.
    np.testing.assert_allclose(places["w1"].sum(1), relevance.sum(0), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(places["w2"].sum(1), places["hidden"].sum(0), rtol=1e-8, atol=1e-10)


# Composition with JAX's own transformations.


def test_grad_of_relevance(x64):
    params, x = dense_params(), normal(2, 4)

    def loss(params, rule):
        return (jaxrel.lrp(dense, rule, argnums=1)(params, x) ** 2).sum()

    for rule in (Epsilon(0.1), ZPlus(0.1), Gamma(0.3, 0.1)):
        grad = jax.grad(loss)(params, rule)["w1"][1, 2]
        step = 1e-6
        moved = [loss(params | {"w1": params["w1"].at[1, 2].add(h)}, rule) for h in (step, -step)]
        # Central differences: error of order step^2, rounding 1e-16 / step.
        np.testing.assert_allclose(grad, (moved[0] - moved[1]) / (2 * step), rtol=1e-6)


def test_inside_scan_and_lax_map(x64):
    params, x = dense_params(), normal(5, 2, 4)
    explain = jaxrel.lrp(dense, ZPlus(), argnums=1)
    mapped = lax.map(lambda x: explain(params, x), x)
    np.testing.assert_allclose(mapped, jax.vmap(explain, (None, 0))(params, x), rtol=1e-13)


@pytest.mark.devices(8)
def test_sharded_over_devices():
    mesh = jax.make_mesh((8,), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    params, x = jax.tree.map(jnp.float32, (dense_params(), normal(16, 4)))
    explain = jax.jit(jaxrel.lrp(dense, ZPlus(), argnums=1))
    found = explain(params, jax.device_put(x, sharding))
    assert len(found.sharding.device_set) == 8
    # float32, sums in another order over denominators that partly cancel.
    np.testing.assert_allclose(found, explain(params, x), rtol=1e-5, atol=1e-6)


def test_relevance_is_float32_for_a_bfloat16_model():
    params, x = jax.tree.map(jnp.bfloat16, (dense_params(), normal(2, 4)))
    relevance = jaxrel.lrp(dense, Epsilon(), argnums=1)(params, x)
    assert relevance.dtype == jnp.float32


def test_values_that_a_jitted_function_brings_with_it(x64):
    params, x, seed = dense_params(), normal(2, 4), normal(2, 3)
    explain = jaxrel.lrp(dense, Epsilon(), argnums=1)
    expected = explain(params, x, seed=seed)
    for call in (
        jax.jit(lambda x: explain(params, x, seed=seed)),
        jax.jit(lambda x: explain(dense_params(), x, seed=seed)),
    ):
        np.testing.assert_allclose(call(x), expected, rtol=1e-12)
    bad = seed / 0
    with pytest.raises(ValueError, match="seed holds NaN"):
        jax.jit(lambda x: explain(params, x, seed=bad))(x)


# Errors.

FFT = lambda x: jnp.abs(jnp.fft.rfft(x))


WHILE = lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x))


@pytest.mark.parametrize(
    ("fun", "rules", "kind", "text"),
    [
        (
            FFT,
            Epsilon(),
            NotImplementedError,
            r"fft \(.*test_lrp.py:\d+.*op\('fft'\), jaxrel.rules",
        ),
        (lambda x: WHILE(x)[1], Epsilon(), NotImplementedError, r"while.*use lax.scan"),
        (lambda x: x @ W42, [], NotImplementedError, r"dense.*op\('dense'\)"),
        (lambda x: (x, x), Epsilon(), TypeError, "must return one real array"),
        (lambda x: x > 0, Epsilon(), TypeError, "must return one real array.*bool"),
        (lambda x: x, Epsilon, TypeError, "rules must be a Composite"),
        (
            lambda x: x @ W42,
            [(jaxrel.path("nothing/*"), ZPlus()), (jaxrel.everything(), Epsilon())],
            ValueError,
            r"entry 0.*path\('nothing/\*'\).*matches no operation",
        ),
        (
            lambda x: x @ W42,
            [(jaxrel.everything(), Epsilon()), (jaxrel.op("fft"), Gradient())],
            ValueError,
            r"entry 1.*op\('fft'\).*matches no operation.*Kinds: dense",
        ),
    ],
    ids=["fft", "while", "uncovered", "tuple", "bool", "class", "path", "op"],
)
def test_errors_say_where_and_what_to_do(fun, rules, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        jaxrel.lrp(fun, rules)(jnp.arange(1.0, 5.0))


def test_unknown_operations_may_be_a_warning():
    x = jnp.arange(1.0, 5.0)
    with pytest.warns(UserWarning, match=r"(?s)fft.*plain derivative is used"):
        found = jaxrel.lrp(FFT, Epsilon(), unknown="warn")(x)
    expected = x * jax.grad(lambda x: FFT(x).sum())(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_shard_map_inside_is_refused():
    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec()
    inner = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match="inside the shard_map"):
        jaxrel.lrp(lambda x: inner(x), Epsilon())(jnp.ones(4))


def test_python_code_inside_is_refused():
    def fun(x):
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(NotImplementedError, match="Python code is opaque"):
        jaxrel.lrp(fun, Epsilon())(jnp.ones(4))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda f, x: f(x, seed=jnp.ones(3)), ValueError, r"seed has shape \(3,\).*output \(4,\)"),
        (lambda f, x: f(x, seed=x / 0), ValueError, "seed holds NaN or infinity"),
        (lambda f, x: f(x.at[1].set(jnp.nan)), ValueError, r"argument 0 \(x\) holds NaN.* 1 of 4"),
        (lambda f, x: f(x.astype(int)), TypeError, "no real numbers"),
    ],
    ids=["shape", "inf", "nan", "int"],
)
def test_bad_calls(call, kind, text):
    def fun(x):
        return x * 2.0

    with pytest.raises(kind, match=text):
        call(jaxrel.lrp(fun, Epsilon()), jnp.arange(4.0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"argnums=3.*1 argument"):
        jaxrel.lrp(jnp.tanh, Epsilon(), argnums=3)(jnp.ones(2))
    with pytest.raises(ValueError, match="argnums=None explains no argument"):
        jaxrel.lrp(jnp.tanh, Epsilon(), argnums=None)
    with pytest.raises(ValueError, match="tags nothing named 'h'; its tags: 'a'"):
        jaxrel.lrp(lambda x: jaxrel.tag(x, "a"), Epsilon(), at="h")(jnp.ones(2))
    fun = lambda w, x: x @ w
    with pytest.raises(ValueError, match=r"path\('v'\) matches no parameter; there are w"):
        jaxrel.lrp(fun, Epsilon(), argnums=1, at=jaxrel.path("v"))(jnp.ones((2, 2)), jnp.ones(2))
