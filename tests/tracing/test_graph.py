"""The tracing core: graphs evaluate to what they were traced from; edits reach everywhere."""

import functools

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxrel
from jaxrel.tracing import Edits, Interceptor, Step, tag_name, tap_shapes, trace
from jaxrel.tracing.flow import dependents
from jaxrel.tracing.evaluate import evaluate
from jaxrel.tracing.rewrite import cut_scans

LAYERS, BATCH, WIDTH = 3, 2, 4
WEIGHTS = np.random.default_rng(0).normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(BATCH, WIDTH)).astype(np.float32)


def layer(x, w):
    hidden = jaxrel.tag(jax.nn.softmax(x @ w), "hidden")
    return x + hidden @ w.T


def scanned(x):
    return lax.scan(lambda x, w: (layer(x, w), None), x, WEIGHTS)[0].sum(-1)


def unrolled(x):
    for w in WEIGHTS:
        x = layer(x, w)
    return x.sum(-1)


def remat(x):
    return lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, WEIGHTS)[0].sum(-1)


def unrolled_remat(x):
    for w in WEIGHTS:
        x = jax.checkpoint(layer)(x, w)
    return x.sum(-1)


def fori(x):
    ws = jnp.asarray(WEIGHTS)
    return lax.fori_loop(0, LAYERS, lambda i, x: layer(x, ws[i]), x).sum(-1)


def vmapped(x):
    return jax.vmap(lambda x: scanned(x[None])[0])(x)


def in_jit(x):
    return jax.jit(lambda x: jax.jit(scanned)(x))(x)


SAME = {
    "unrolled": unrolled,
    "remat": remat,
    "unrolled_remat": unrolled_remat,
    "fori": fori,
    "jit": in_jit,
}


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


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g * 7,))

CONSTRUCTS = {
    "scan": scanned,
    "remat": remat,
    "vmap": vmapped,
    "cond": lambda x: lax.cond(x.sum() > 0, scanned, unrolled, x),
    "switch": lambda x: lax.switch(1, [scanned, unrolled], x),
    "while": lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x).sum(-1),
    "custom_vjp": lambda x: clipped(x).sum(-1),
    "custom_jvp": lambda x: jax.nn.relu(x).sum(-1),
    "map": lambda x: lax.map(lambda x: x.sum(), x),
    "associative_scan": lambda x: lax.associative_scan(jnp.add, x, axis=1)[:, -1],
    "fft": lambda x: jnp.abs(jnp.fft.fft(x)).sum(-1),
    "top_k": lambda x: lax.top_k(x, 2)[0].sum(-1),
    "solve": lambda x: jnp.linalg.solve(WEIGHTS[0], x.T).sum(0),
    "reverse_scan": lambda x: lax.scan(
        lambda x, w: (layer(x, w), None), x, WEIGHTS, reverse=True, unroll=2
    )[0].sum(-1),
}


@pytest.mark.parametrize("fun", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
def test_an_evaluated_graph_is_the_function_and_keeps_its_derivative(fun):
    # Rebuild every body: an interceptor on everything tagged, that does nothing.
    def again(x):
        traced = trace(fun, x)
        interceptors = {
            node.outs[0]: Interceptor(lambda carrier, value: (carrier, value))
            for node in traced.graph.walk()
            if tag_name(node)
        }
        result = evaluate(traced.graph, traced.args, Edits(interceptors=interceptors), carrier=0.0)
        return traced.unflatten(result.outs)

    np.testing.assert_array_equal(again(X), fun(X))
    # Same operations in the same order, recompiled: rounding only.
    differentiable = jax.make_jaxpr(fun)(X).eqns[0].primitive.name != "while"
    if differentiable:
        want = jax.grad(lambda x: fun(x).sum())(X)
        got = jax.grad(lambda x: again(x).sum())(X)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cut_scan_keeps_its_stacked_outputs_in_order(reverse):
    def fun(x):
        step = lambda x, w: (layer(x, w), x.sum())
        return lax.scan(step, x, WEIGHTS, reverse=reverse)

    traced = trace(fun, X)
    cut = cut_scans(traced.graph, lambda node: [1])
    assert [node.cuts for node in cut.walk() if node.scan] == [(0, 1, LAYERS)]
    got = traced.unflatten(evaluate(cut, traced.args).outs)
    # Same operations in the same order, recompiled: rounding only.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, got, fun(X))


def test_a_step_can_be_replaced_inside_a_remated_scan():
    traced = trace(remat, X)
    softmaxes = [node for node in traced.graph.walk() if node.name == "exp"]
    steps = {node: Step(node.ins, lambda x: [jnp.cosh(x)]) for node in softmaxes}
    got = evaluate(traced.graph, traced.args, Edits(steps=steps)).outs[0]

    def expected(x):
        for w in WEIGHTS:
            s = x @ w
            e = jnp.cosh(s - s.max(-1, keepdims=True))
            x = x + (e / e.sum(-1, keepdims=True)) @ w.T
        return x.sum(-1)

    np.testing.assert_allclose(got, expected(X), rtol=1e-5)  # float32, other fusion


def test_a_carrier_rides_through_control_flow_and_back():
    """An interceptor that counts on the way forward and doubles its cotangent on the way back."""

    @jax.custom_vjp
    def count(carrier, value):
        return carrier + 1, value

    count.defvjp(lambda c, v: (count(c, v), None), lambda _, ct: (2 * ct[0], ct[1]))

    def run(fun, start):
        traced = trace(fun, X)
        tags = [node.outs[0] for node in traced.graph.walk() if tag_name(node)]
        edits = Edits(interceptors={value: Interceptor(count) for value in tags})
        return evaluate(traced.graph, traced.args, edits, carrier=start).carrier

    both = lambda x: lax.cond(x.sum() > -9, scanned, unrolled, x)
    for fun in (*SAME.values(), both):
        forward, back = jax.value_and_grad(lambda start, fun=fun: run(fun, start))(0.0)
        assert (forward, back) == (LAYERS, 2**LAYERS)


def test_tap_shapes_are_known_before_running():
    traced = trace(remat, X)
    taps = {node.outs[0]: "tap" for node in traced.graph.walk() if tag_name(node)}
    assert tap_shapes(traced.graph, taps)["tap"].shape == (LAYERS, BATCH, WIDTH)


def test_dependents_follow_loops_to_a_fixpoint():
    def fun(x, y):
        def step(state, _):
            a, b, c = state
            return (b, c, c), a.sum()

        return lax.scan(step, (y, y, x), None, length=4)

    traced = trace(fun, X, X)
    found = dependents(traced.graph, traced.graph.ins[:1])
    assert [out in found for out in traced.graph.outs] == [True, True, True, True]
    found = dependents(traced.graph, traced.graph.ins[1:])
    assert [out in found for out in traced.graph.outs] == [True, False, False, True]


def test_dependents_count_conditions_and_integers():
    traced = trace(lambda x, y: (lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, y), y * 2), X, X)
    found = dependents(traced.graph, traced.graph.ins[:1])
    assert [out in found for out in traced.graph.outs] == [True, False]


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
        r"while at .*test_graph.py:\d+.* use lax.scan, or fori_loop with static bounds",
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
    with pytest.raises(NotImplementedError, match=r"test_graph.py:\d+.*move the tag outside"):
        jaxrel.capture(lambda x: opaque(x))(X)


@pytest.mark.devices(8)
def test_a_tag_inside_shard_map_raises():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    fun = jax.shard_map(lambda x: jaxrel.tag(x, "a"), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match="call jaxrel inside the shard_map"):
        jaxrel.capture(fun)(jnp.ones((8, 2)))
