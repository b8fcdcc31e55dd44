"""What is one operation and what is not, however a program is written."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import composites, gradients
from jaxrel.propagation.rules import (
    AlphaBeta,
    BetaSmooth,
    Deconvnet,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    Stop,
    WSquare,
    ZPlus,
)
from tests.propagation.networks import normal, stack_params


@pytest.fixture(autouse=True)
def _x64(x64):
    return


@pytest.fixture
def p():
    return {"w": normal(4, 6), "v": normal(6, 5), "u": normal(4, 4), "s": normal(6), "b": normal(6)}


def kinds(fun, rules, *args):
    return [row.kind for row in jaxrel.plan(fun, rules, argnums=1)(*args)]


def same(fun, other, rules, p, x, rtol=1e-10):
    found, expected = (jaxrel.lrp(f, rules, argnums=1)(p, x) for f in (fun, other))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


def test_a_learned_scale_and_shift_after_an_activation_are_no_part_of_it(p):
    x = normal(2, 4)
    plain = lambda p, x: (jax.nn.relu(x @ p["w"]) * p["s"] + p["b"]) @ p["v"]
    tagged = lambda p, x: (jaxrel.tag(jax.nn.relu(x @ p["w"]), "t") * p["s"] + p["b"]) @ p["v"]
    same(plain, tagged, Epsilon(), p, x)
    # A constant that belongs to the function, as ELU's -1, is part of it.
    table = jaxrel.plan(lambda p, x: jax.nn.elu(x @ p["w"]), Epsilon(), argnums=1)(p, x)
    assert [row.kind for row in table] == ["dense", "activation"]


SOFTMAXES = {
    "logsumexp": lambda s: jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True)),
    "log_softmax": lambda s: jnp.exp(jax.nn.log_softmax(s)),
    "masked by scores": lambda s: _normalised(jnp.where(s < -100, 0.0, _exp(s))),
    "masked by product": lambda s: _normalised(_exp(s) * (s > -100)),
    "zeros first": lambda s: _normalised(jnp.where(s > -100, _exp(s), 0.0)),
    "moved": lambda s: _normalised(_exp(s)[:, None])[:, 0],
}


def _exp(s):
    return jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))


def _normalised(e):
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("composite", ["attn_lrp", "cp_lrp"])
def test_every_form_of_a_softmax(p, name, composite):
    def attention(softmax):
        def fun(p, x):
            scores = jax.nn.relu(x @ p["u"]) @ x.T
            return softmax(scores) @ x @ p["w"]

        return fun

    rules = getattr(composites, composite)()
    same(attention(SOFTMAXES[name]), attention(jax.nn.softmax), rules, p, normal(3, 4))
    table = jaxrel.plan(attention(SOFTMAXES[name]), rules, argnums=1)(p, normal(3, 4))
    assert "softmax" in [row.kind for row in table]
    # What leads to the scores has rules of its own.
    assert ("u" in [path for row in table for path in row.paths]) == (composite == "attn_lrp")


def test_a_quotient_of_two_exponentials_is_no_softmax(p):
    def fun(p, x):
        above, below = jnp.exp(x @ p["u"]), jnp.exp(x @ p["w"])
        return above / below.sum(-1, keepdims=True)

    found = kinds(fun, composites.attn_lrp(), p, normal(3, 4))
    assert "softmax" not in found
    assert found.count("activation") == 2


@pytest.mark.parametrize("rule", [ZPlus(), Gamma(), AlphaBeta(), Epsilon(0.1)], ids=str)
def test_several_biases_are_one(p, rule):
    x = normal(2, 4)
    same(
        lambda p, x: x @ p["w"] + p["b"] + p["s"],
        lambda p, x: x @ p["w"] + (p["b"] + p["s"]),
        rule,
        p,
        x,
    )


ACTIVATIONS = {
    "leaky_relu": lambda x: jax.nn.leaky_relu(x),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "mask": lambda x: x * (x > 0),
    "maximum": lambda x: jnp.maximum(x, 0.0),
    "clip": lambda x: jnp.clip(x, 0.0, 6.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_guided_backprop_knows_activations_by_what_they_do(p, name):
    f, x = ACTIVATIONS[name], normal(2, 4)
    slope = jax.vmap(jax.vmap(jax.grad(lambda h: f(h))))(x @ p["w"])
    c = jnp.ones((2, 5)) @ p["v"].T
    expected = (jnp.maximum(c, 0) * slope) @ p["w"].T
    found = gradients.guided_backprop(lambda p, x: f(x @ p["w"]) @ p["v"], argnums=1)(p, x)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_residual_is_no_part_of_the_activation(p):
    x = normal(2, 4)
    plain = lambda p, x: (x @ p["w"] + jax.nn.relu(x @ p["w"])) @ p["v"]

    def once(p, x):
        h = x @ p["w"]
        return (h + jax.nn.relu(h)) @ p["v"]

    found, expected = (gradients.guided_backprop(fun, argnums=1)(p, x) for fun in (once, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_operations_side_by_side_do_not_mix(p):
    x = normal(2, 4)

    def barrier(p, x):
        x, w = lax.optimization_barrier((x, p["w"]))
        return x @ w

    same(barrier, lambda p, x: x @ p["w"], ZPlus(), p, x)

    def ordered(p, x):
        h = x @ p["w"]
        return lax.sort((jnp.abs(h), h), num_keys=1)[1] @ p["v"]

    last = jaxrel.plan(ordered, ZPlus(), argnums=1)(p, x)[-1]
    assert last.kind == "dense"
    assert "x >= 0" not in last.note


@pytest.mark.parametrize("composite", [composites.cp_lrp(), composites.captioning()])
def test_an_output_that_the_rules_stop_is_an_error(p, composite):
    with pytest.raises(
        ValueError, match=r"stop everything.*softmax at tests/propagation/test_patterns"
    ):
        jaxrel.lrp(lambda p, x: jax.nn.softmax(x @ p["w"]), composite, argnums=1)(p, normal(2, 4))


MOVED = {
    "reflect": lambda x: jnp.pad(x, ((0, 0), (2, 2)), mode="reflect"),
    "roll": lambda x: jnp.roll(x, 1, axis=1),
    "slices": lambda x: jnp.concatenate([x[:, 2:], x[:, :2]], axis=1),
    "stack": lambda x: jnp.stack([x, 2 * x], axis=1).reshape(2, -1),
    "tile": lambda x: jnp.tile(x, (1, 2)),
    "set": lambda x: jnp.ones((2, 6)).at[:, 1:5].set(x),
    "add": lambda x: jnp.ones((2, 6)).at[:, 1:5].add(x),
    "update": lambda x: lax.dynamic_update_slice(jnp.ones((2, 6)), x, (0, 1)),
    "clip": lambda x: jnp.clip(x, -1.0, 1.0),
    "broadcast": lambda x: (x[:, None] * jnp.arange(1.0, 4.0)[:, None]).reshape(2, -1),
    "normalised": lambda x: (x - 0.5) / 0.25,
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("rule", [Flat(), WSquare(bias="ignored")], ids=str)
def test_direct_rules_reach_the_input_through_what_moves_it(name, rule):
    move = MOVED[name]
    x = jnp.zeros((2, 4))
    w = jnp.abs(normal(move(x).shape[1], 3))
    fun = lambda w, x: move(x) @ w + 1.0
    value, found = jaxrel.value_and_lrp(fun, rule, argnums=1)(w, x)
    assert jnp.abs(found).min() > 0
    if name not in ("set", "add", "update"):
        # Constants beside the input take their share; otherwise everything arrives.
        np.testing.assert_allclose(found.sum(), value.sum(), rtol=1e-4)


@pytest.mark.parametrize("activation", [BetaSmooth(1.0), Deconvnet(), Pass()], ids=str)
def test_shortcuts_ask_what_the_relu_passes(p, activation):
    rules = [(jaxrel.op("activation"), activation), (jaxrel.op("dense"), Gamma())]
    x = jnp.abs(normal(2, 4))
    with_relu = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    # The tag hides the ReLU from the product before it.
    hidden = lambda p, x: jax.nn.relu(jaxrel.tag(x @ p["w"], "t")) @ p["v"]
    same(with_relu, hidden, rules, p, x)


def test_a_resize_is_no_layer(p):
    x = normal(1, 4, 4, 2)
    w = normal(2, 3)
    fun = lambda w, x: jax.image.resize(x, (1, 6, 6, 2), "bilinear") @ w
    (row,) = jaxrel.plan(fun, composites.epsilon_plus_flat(), argnums=1)(w, x)
    assert row.first
    assert row.rule == Flat()


def test_zeros_and_infinite_slopes(p):
    fun = lambda p, x: jnp.sqrt(jax.nn.relu(x @ p["w"])) @ p["v"]
    found = jaxrel.lrp(fun, Epsilon(), argnums=1)(p, jnp.zeros((2, 4)))
    np.testing.assert_array_equal(found, 0)


EXACT = {
    "stack": lambda h: jnp.stack([h, h]).sum(0),
    "unstack": lambda h: jnp.unstack(h, axis=1)[2],
    "tile": lambda h: jnp.tile(h, 2),
    "subtract": lambda h: jnp.zeros((2, 6)).at[:, :].subtract(h),
    "segment_max": lambda h: jax.ops.segment_max(h, jnp.array([0, 0]), 1),
    "multiply": lambda h: h.at[:, 0].multiply(3.0),
    "solve": lambda h: jax.scipy.linalg.solve_triangular(jnp.eye(2) * 2, h),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_only_moves_needs_no_rule(p, name):
    fun = lambda p, x: EXACT[name](x @ p["w"])
    value, found = jaxrel.value_and_lrp(fun, Epsilon(1e-12), argnums=1)(p, normal(2, 4))
    np.testing.assert_allclose(found.sum(), value.sum(), rtol=1e-8)


def test_a_half_precision_product_with_a_float32_normalisation():
    x, w = normal(2, 4).astype(jnp.bfloat16), normal(4, 6).astype(jnp.bfloat16)
    s, b = jnp.float32(normal(6)), jnp.float32(normal(6))
    fun = lambda w, x: ((x @ w).astype(jnp.float32) - b) * s + 1.0
    found = jaxrel.lrp(fun, ZPlus(), argnums=1)(w, x)
    assert found.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(found))


@pytest.mark.devices(2)
def test_sharding_in_types(p):
    mesh = jax.make_mesh((2,), ("d",))
    if mesh.axis_types[0] != jax.sharding.AxisType.Explicit:
        pytest.skip("meshes are not explicit by default in this JAX")
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(2, 4), jax.P("d"))
        fun = lambda w, x: jax.nn.relu(x @ w)
        found = jax.jit(jaxrel.lrp(fun, Epsilon(), argnums=1))(p["w"], x)
    expected = jaxrel.lrp(fun, Epsilon(), argnums=1)(p["w"], normal(2, 4))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12)


@pytest.mark.parametrize("bias", ["fused", "separate", "ignored"])
@pytest.mark.parametrize("rule", [Gamma, ZPlus, Epsilon])
def test_conservation_with_every_bias(p, rule, bias):
    fun = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]
    x = normal(2, 4)
    total = jaxrel.conservation(fun, rule(bias=bias), argnums=1)(p, x).summary()
    relevance = jaxrel.lrp(fun, rule(bias=bias), argnums=1)(p, x)
    # float32 sums.
    np.testing.assert_allclose(total["input"], relevance.sum(), rtol=1e-4, atol=1e-4)
    assert abs(total["elsewhere"]) < 1e-4


def test_masks_of_minus_infinity_are_arguments_like_others(p):
    mask = jnp.array([[0.0, -jnp.inf, 0.0]])
    fun = lambda m, x: jax.nn.softmax(x @ x.T + m) @ x
    found = jaxrel.lrp(fun, composites.attn_lrp(), argnums=1)(mask, normal(3, 4))
    assert jnp.all(jnp.isfinite(found))
    with pytest.raises(ValueError, match=r"argument 0 \(m\) holds NaN"):
        jaxrel.lrp(fun, composites.attn_lrp(), argnums=1)(mask * jnp.nan, normal(3, 4))


def test_anything_may_be_captured(p):
    captured, x = {1: p["w"], "a": p["v"]}, normal(2, 4)
    found = jaxrel.lrp(lambda x: x @ captured[1], Epsilon())(x)
    expected = jaxrel.lrp(lambda w, x: x @ w, Epsilon(), argnums=1)(p["w"], x)
    np.testing.assert_array_equal(found, expected)


def test_switches_and_keywords_are_passed_on(p):
    def fun(p, x, double, *, name="w", train=False):
        return x @ p[name] * (2.0 if double else 1.0) + (99.0 if train else 0.0)

    explain = jaxrel.lrp(fun, Epsilon(), argnums=1)
    x = normal(2, 4)
    once = explain(p, x, False)
    np.testing.assert_allclose(explain(p, x, True), 2 * once, rtol=1e-5)
    assert explain(p, x, False, name="u").shape == (2, 4)


def test_aux_needs_a_pair(p):
    fun = lambda x: {"out": x, "aux": x}
    with pytest.raises(TypeError, match=r"must return \(output, aux\)"):
        jaxrel.lrp(fun, Epsilon(), has_aux=True)(normal(2, 4))


def test_gates_get_no_rules():
    p = stack_params()
    fun = lambda p, x: jax.nn.sigmoid(x @ p["w"][0]) * (x @ p["w"][1])
    plan = jaxrel.plan(fun, composites.captioning(), argnums=1)(p, normal(2, 5))
    assert [row.kind for row in plan] == ["dense", "product"]


def test_stop_on_an_activation(p):
    rules = [(jaxrel.op("activation"), Stop()), (jaxrel.everything(), Epsilon(1e-12))]
    fun = lambda p, x: x @ p["w"] + jnp.tanh(x @ p["w"])
    x = normal(2, 4)
    found = jaxrel.lrp(fun, rules, argnums=1)(p, x)
    # Only the other branch's share of the sum arrives; epsilon 1e-12.
    np.testing.assert_allclose(found.sum(), (x @ p["w"]).sum(), rtol=1e-9)


def test_a_rule_of_the_wrong_shape_is_named(p):
    class Transposed(Epsilon):
        def bwd(self, op, x, w, b, z, c):
            return super().bwd(op, x, w, b, z, c).T

    with pytest.raises(ValueError, match=r"Transposed\(\).bwd returned shape \(4, 2\) .*\(2, 4\)"):
        jaxrel.lrp(lambda p, x: x @ p["w"], Transposed(), argnums=1)(p, normal(2, 4))


def test_a_mistyped_path_is_answered_with_the_near_ones(p):
    rules = [(jaxrel.path("haed/kernel"), ZPlus()), (jaxrel.everything(), Epsilon())]
    fun = lambda q, x: x @ q["head"]["kernel"]
    with pytest.raises(ValueError, match=r"Parameters: head/kernel; did you mean head/kernel\?"):
        jaxrel.lrp(fun, rules, argnums=1)({"head": {"kernel": p["w"]}}, normal(2, 4))


@pytest.mark.parametrize("approximate", [True, False])
def test_a_gelu_is_one_activation(p, approximate):
    fun = lambda p, x: jax.nn.gelu(x @ p["w"], approximate=approximate) @ p["v"]
    assert kinds(fun, composites.captioning(), p, normal(2, 4)) == ["dense", "activation", "dense"]


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("pool", [lambda x: x.mean(1), lambda x: x.max(1), lambda x: x.sum(1)])
def test_a_norm_after_a_pool_is_a_norm(p, pool):
    x = normal(2, 3, 4)
    after = lambda p, x: layer_norm(pool(x)) @ p["w"]
    between = lambda p, x: layer_norm(pool(x) @ (p["i"])) @ p["w"]
    p = p | {"i": jnp.eye(4)}
    # The identity between them is a linear map that takes away nothing: epsilon.
    same(after, between, composites.attn_lrp(1e-12), p, x, rtol=1e-6)
    assert "norm" in kinds(after, composites.attn_lrp(), p, x)


def test_a_norm_that_is_the_output_is_no_norm(p):
    fun = lambda p, x: jnp.sqrt(((x @ p["w"]) ** 2).sum(-1)) * jnp.sqrt((x**2).sum(-1))
    assert "norm" not in kinds(fun, Epsilon(), p, normal(2, 4))
