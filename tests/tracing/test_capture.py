"""Tags and what is captured at them: the same however a model is written."""

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxrel
from tests.tracing.layers import BATCH, LAYERS, SAME, WEIGHTS, WIDTH, X, layer, remat, scanned


@pytest.mark.parametrize("fun", SAME.values(), ids=SAME.keys())
def test_capture_with_grad_is_the_same_however_the_model_is_written(fun):
    out, values, grads = jaxrel.capture_with_grad(scanned, "hidden")(X)
    assert values["hidden"].shape == grads["hidden"].shape == (LAYERS, BATCH, WIDTH)
    other = jaxrel.capture_with_grad(fun, "hidden")(X)
    # Same operations, other fusion: float32 rounding only.
    for got, want in zip(other, (out, values, grads), strict=True):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-6), got, want)


def test_capture_with_grad_agrees_with_jax_grad_by_an_explicit_offset():
    def offset(offsets):
        def step(x, wo):
            hidden = jax.nn.softmax(x @ wo[0]) + wo[1]
            return x + hidden @ wo[0].T, None

        return lax.scan(step, jnp.asarray(X), (WEIGHTS, offsets))[0].sum()

    want = jax.grad(offset)(jnp.zeros((LAYERS, BATCH, WIDTH)))
    _, _, grads = jax.jit(jaxrel.capture_with_grad(scanned, "hidden"))(X)
    np.testing.assert_allclose(grads["hidden"], want, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_vmap_puts_the_batch_axis_first():
    def one(x):
        return jaxrel.tag(jnp.outer(x, x), "square").sum()

    xs = jnp.arange(6.0).reshape(3, 2)
    _, values = jaxrel.capture(jax.vmap(one, in_axes=1))(xs)
    assert values["square"].shape == (2, 3, 3)
    _, values = jaxrel.capture(jax.vmap(lambda x: jaxrel.tag(x, "a"), in_axes=1, out_axes=1))(xs)
    np.testing.assert_array_equal(values["a"], xs.T)


def test_capture_under_vmap_equals_one_by_one():
    one = lambda x: jaxrel.capture_with_grad(scanned, "hidden")(x[None])
    batch = jax.vmap(one)(X)
    for i in range(BATCH):
        jax.tree.map(
            lambda b, s, i=i: np.testing.assert_allclose(b[i], s, rtol=2e-6, atol=2e-6),
            batch,
            one(X[i]),
        )


def test_tags_change_neither_values_nor_gradients():
    plain = lambda x: jnp.sin(x).sum()
    tagged = lambda x: jaxrel.tag(jnp.sin(jaxrel.tag(x, "a")), "b").sum()
    for transform in (lambda f: f, jax.grad, jax.hessian, lambda f: jax.jit(jax.jacfwd(f))):
        np.testing.assert_array_equal(transform(plain)(X[0]), transform(tagged)(X[0]))


def test_checkpoint_name_is_a_tag_too():
    _, values = jaxrel.capture(lambda x: checkpoint_name(x * 2, "double") + 1)(X)
    np.testing.assert_array_equal(values["double"], X * 2)


def test_cond_hands_out_the_taken_branch_and_zeros_for_the_other():
    def fun(x, yes):
        return lax.cond(
            yes,
            lambda x: jaxrel.tag(x * 2, "then").sum(),
            lambda x: jaxrel.tag(x * 3, "else").sum(),
            x,
        )

    _, values, grads = jaxrel.capture_with_grad(lambda x: fun(x, True), ("then", "else"))(X)
    np.testing.assert_array_equal(values["then"], X * 2)
    np.testing.assert_array_equal(grads["then"], np.ones_like(X))
    assert not values["else"].any()
    assert not grads["else"].any()


def test_scans_in_scans_stack_outermost_first():
    def fun(x):
        inner = lambda x, w: (jaxrel.tag(x * w, "product"), None)
        outer = lambda x, ws: (lax.scan(inner, x, ws)[0], None)
        return lax.scan(outer, x, jnp.arange(1.0, 7.0).reshape(2, 3))[0]

    _, values = jaxrel.capture(fun)(1.0)
    np.testing.assert_array_equal(values["product"], [[1, 2, 6], [24, 120, 720]])


def test_scan_with_integer_and_key_state():
    def fun(x):
        def step(state, _):
            x, count, key = state
            key, sub = jax.random.split(key)
            x = jaxrel.tag(x + jax.random.normal(sub, x.shape), "x")
            return (x, count + 1, key), count

        return lax.scan(step, (x, 0, jax.random.key(1)), None, length=3)[0][0]

    out, values = jaxrel.capture(fun)(X)
    np.testing.assert_array_equal(out, fun(X))
    np.testing.assert_array_equal(values["x"][-1], out)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return jaxrel.tag(nnx.relu(self.inner(x)), "relu").sum(-1)


def test_nnx_and_linen_models_as_arguments_and_closed_over(key):
    net = Net(nnx.Rngs(0))
    _, values, grads = jaxrel.capture_with_grad(lambda net, x: net(x), "relu")(net, X)
    _, closed, _ = jaxrel.capture_with_grad(lambda x: net(x), "relu")(X)
    np.testing.assert_array_equal(values["relu"], closed["relu"])
    np.testing.assert_array_equal(grads["relu"], np.ones_like(values["relu"]))

    class LinenNet(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jaxrel.tag(linen.Dense(3)(x), "dense")

    model = LinenNet()
    params = model.init(key, X)
    out, values = jaxrel.capture(model.apply)(params, X)
    np.testing.assert_array_equal(out, values["dense"])


def test_keyword_arguments_and_structured_outputs():
    fun = lambda x, *, scale: {"out": jaxrel.tag(x * scale, "scaled"), "other": (x,)}
    out, values = jaxrel.capture(fun)(X, scale=2.0)
    np.testing.assert_array_equal(out["out"], values["scaled"])
    assert jax.tree.structure(out) == jax.tree.structure(fun(X, scale=2.0))


@pytest.mark.devices(8)
def test_sharded_inputs_give_the_same(key):
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.random.normal(key, (16, WIDTH))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    explain = jax.jit(jaxrel.capture_with_grad(remat, "hidden"))
    sharded = explain(jax.device_put(x, sharding))
    assert sharded[0].sharding.is_equivalent_to(sharding, 1)
    jax.tree.map(
        lambda s, p: np.testing.assert_allclose(s, p, rtol=2e-6, atol=2e-6), sharded, explain(x)
    )


ERRORS = {
    "unknown name": (
        lambda: jaxrel.capture_with_grad(scanned, "hiden")(X),
        ValueError,
        "capture_with_grad: the function tags nothing named 'hiden'; its tags: 'hidden'",
    ),
    "no tags": (
        lambda: jaxrel.capture(jnp.sin, "a")(X),
        ValueError,
        r"its tags: none \(mark values with jaxrel.tag",
    ),
    "two outputs": (
        lambda: jaxrel.capture_with_grad(lambda x: (layer(x, WEIGHTS[0]), x), "hidden")(X),
        TypeError,
        r"must return one real array.*returned float32\[2,4\], float32\[2,4\]; wrap it",
    ),
    "integer output": (
        lambda: jaxrel.capture_with_grad(lambda x: jaxrel.tag(x, "a").argmax(-1), "a")(X),
        TypeError,
        r"returned int32\[2\]",
    ),
    "integer tag": (
        lambda: jaxrel.capture_with_grad(lambda x: jaxrel.tag(x.argmax(-1), "best") * 1.0, "best")(
            X
        ),
        TypeError,
        "tagged 'best' has dtype int32, and a gradient needs a real",
    ),
    "different shapes": (
        lambda: jaxrel.capture(lambda x: (jaxrel.tag(x, "a"), jaxrel.tag(x[0], "a")))(X),
        ValueError,
        r"different shapes are tagged 'a'.*\(2, 4\), \(4,\); give them names of their own",
    ),
    "while": (
        lambda: jaxrel.capture(
            lambda x: lax.while_loop(lambda c: c.sum() < 3, lambda c: jaxrel.tag(c + 1, "a"), x)
        )(X),
        NotImplementedError,
        r"while at .*test_capture.py:\d+.* use lax.scan, or fori_loop with static bounds",
    ),
    "empty name": (lambda: jaxrel.tag(X, ""), ValueError, "tag: name is empty"),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_tag_inside_a_handwritten_derivative_raises_with_its_source_line():
    @jax.custom_vjp
    def opaque(x):
        return jaxrel.tag(x * 2, "inside")

    opaque.defvjp(lambda x: (opaque(x), None), lambda _, g: (g,))
    with pytest.raises(NotImplementedError, match=r"test_capture.py:\d+.*move the tag outside"):
        jaxrel.capture(lambda x: opaque(x))(X)


@pytest.mark.devices(8)
def test_a_tag_inside_shard_map_raises():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    fun = jax.shard_map(lambda x: jaxrel.tag(x, "a"), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match="call jaxrel inside the shard_map"):
        jaxrel.capture(fun)(jnp.ones((8, 2)))
