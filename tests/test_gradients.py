"""Gradient methods: by hand on tiny functions, and what must hold for all of them."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel import gradients

BATCH, SIDE, CLASSES, WIDTH = 3, 6, 4, 5
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


KERNEL, BIAS = normal(3, 3, 2, WIDTH), normal(WIDTH)
DENSE, TOKENS = normal(WIDTH, CLASSES), normal(BATCH, 7, WIDTH)
IMAGES = normal(BATCH, SIDE, SIDE, 2)
SEED = jax.nn.one_hot(jnp.arange(BATCH), CLASSES)


def conv(x, kernel, bias):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dimensions) + bias


def classify(x):
    """[batch, 6, 6, 2] -> [batch, classes], with feature maps [batch, 3, 3, 5]."""
    maps = jax.nn.relu(conv(x, KERNEL.astype(x.dtype), BIAS.astype(x.dtype)))
    maps = jaxrel.tag(maps, "maps")
    # Not linear in the maps, so that the gradient by them depends on the place.
    return jnp.tanh(maps).mean((1, 2)) @ DENSE.astype(x.dtype)


def read(x):
    """Tokens [batch, 7, 5] -> [batch]."""
    x = jaxrel.tag(x, "tokens")
    return (x * x).sum((1, 2))


METHODS = {
    "gradient": gradients.gradient(classify),
    "input_x_gradient": gradients.input_x_gradient(classify),
    "smooth_grad": lambda x, **kwargs: gradients.smooth_grad(classify, samples=3)(
        jax.random.key(0), x, **kwargs
    ),
    "integrated_gradients": gradients.integrated_gradients(classify, steps=3),
    "guided_backprop": gradients.guided_backprop(classify),
    "deconvnet": gradients.deconvnet(classify),
    "grad_cam": gradients.grad_cam(classify, "maps"),
    "grad_cam_resized": gradients.grad_cam(classify, "maps", size=(SIDE, SIDE)),
    "guided_grad_cam": gradients.guided_grad_cam(classify, "maps"),
}


# These programs run once, and briefly: compile them fast.
def jit(fun):
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


# float32, a handful of operations in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


# What holds for every method.


@pytest.mark.parametrize("name", METHODS)
def test_jit_is_eager(name):
    method = METHODS[name]
    expected = method(IMAGES, seed=SEED)
    assert np.any(np.asarray(expected) != 0)
    jitted = jit(lambda x, seed: method(x, seed=seed))(IMAGES, SEED)
    np.testing.assert_allclose(jitted, expected, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_batch_is_one_by_one_is_vmap(name):
    one = jit(lambda x, seed: METHODS[name](x[None], seed=seed[None])[0])
    loop = jnp.stack([one(x, seed) for x, seed in zip(IMAGES, SEED, strict=True)])
    batch = jit(lambda x, seed: METHODS[name](x, seed=seed))(IMAGES, SEED)
    np.testing.assert_allclose(batch, loop, **CLOSE)
    np.testing.assert_allclose(jax.vmap(one)(IMAGES, SEED), loop, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_seeds(name):
    # The logits as their own cotangent: nothing may be differentiated through the function.
    functions = {"top": lambda out: jax.nn.one_hot(out.argmax(-1), CLASSES), "own": lambda out: out}
    out = classify(IMAGES)
    arrays = {which: function(out) for which, function in functions.items()}
    arrays["ones"] = jnp.ones_like(out)

    @jit
    def explain(x, arrays):
        explain = lambda seeds: {k: METHODS[name](x, seed=seed) for k, seed in seeds.items()}
        return explain(functions | {"ones": None}), explain(arrays)

    found, expected = explain(IMAGES, arrays)
    for which in found:
        np.testing.assert_allclose(found[which], expected[which], **CLOSE)
    assert np.max(np.abs(found["top"] - found["ones"])) > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_relevance_is_wide_and_as_that_of_float32(name):
    x = IMAGES.astype(jnp.bfloat16)
    method = jit(lambda x, seed: METHODS[name](x, seed=seed))
    found, expected = method(x, SEED), method(x.astype(jnp.float32), SEED)
    assert found.dtype == expected.dtype == jnp.float32
    # bfloat16 has 8 bits, and a dozen roundings follow each other; compared with the maximum.
    np.testing.assert_allclose(found, expected, atol=0.1 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("name", METHODS)
def test_float64(x64, name):
    x = IMAGES.astype(jnp.float64)
    assert jax.eval_shape(METHODS[name], x).dtype == jnp.float64


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_seed(name):
    function = name.removesuffix("_resized")
    with pytest.raises(
        ValueError, match=rf"{function}: the seed has shape \(4,\) and the output \(3, 4\)"
    ):
        METHODS[name](IMAGES, seed=jnp.ones(CLASSES))


@pytest.mark.parametrize("name", METHODS)
def test_more_than_one_output(name):
    transform = {
        "smooth_grad": lambda f: lambda x: gradients.smooth_grad(f)(jax.random.key(0), x),
        "grad_cam": lambda f: gradients.grad_cam(f, "maps"),
        "grad_cam_resized": lambda f: gradients.grad_cam(f, "maps", size=(2, 2)),
        "guided_grad_cam": lambda f: gradients.guided_grad_cam(f, "maps"),
    }.get(name) or getattr(gradients, name)
    with pytest.raises(TypeError, match="must return one real array"):
        transform(lambda x: (classify(x), x))(IMAGES)


# What is explained.

OF_ARGUMENTS = {
    "gradient": gradients.gradient,
    "input_x_gradient": gradients.input_x_gradient,
    "smooth_grad": lambda fun, **kwargs: (
        lambda *args: gradients.smooth_grad(fun, samples=2, **kwargs)(jax.random.key(0), *args)
    ),
    "integrated_gradients": gradients.integrated_gradients,
    "guided_backprop": gradients.guided_backprop,
    "deconvnet": gradients.deconvnet,
}


def of_dict(scale, inputs):
    chosen = jnp.take_along_axis(inputs["x"], inputs["index"][:, None], 1)
    return jax.nn.relu(scale * chosen[:, 0])


@pytest.mark.parametrize("name", OF_ARGUMENTS)
def test_structure_of_the_explained_argument(name):
    inputs = {"x": normal(BATCH, WIDTH), "index": jnp.array([0, 2, 1])}
    scale = jnp.ones(BATCH)
    found = OF_ARGUMENTS[name](of_dict, argnums=1)(scale, inputs)
    assert jax.tree.structure(found) == jax.tree.structure(inputs)
    assert found["x"].shape == (BATCH, WIDTH)
    np.testing.assert_array_equal(found["index"], jnp.zeros(BATCH))
    assert found["index"].dtype == jnp.float32
    of_scale, again = OF_ARGUMENTS[name](of_dict, argnums=(0, -1))(scale, inputs)
    assert of_scale.shape == (BATCH,)
    assert again["x"].shape == (BATCH, WIDTH)


@pytest.mark.parametrize("name", OF_ARGUMENTS)
def test_integers_cannot_be_explained(name):
    with pytest.raises(TypeError, match=r"holds no real numbers \(int32\)"):
        OF_ARGUMENTS[name](lambda x: DENSE[x].sum(-1))(jnp.array([0, 1]))


@pytest.mark.parametrize("name", OF_ARGUMENTS)
def test_an_argument_that_is_not_there(name):
    with pytest.raises(ValueError, match=r"argnums=1, but .* called with 1 argument"):
        OF_ARGUMENTS[name](classify, argnums=1)(IMAGES)


def test_modules_are_arguments_and_functions():
    model = nnx.Sequential(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), nnx.relu)
    x = normal(BATCH, WIDTH)
    expected = jax.grad(lambda x: model(x).sum())(x)
    np.testing.assert_allclose(gradients.gradient(model)(x), expected, **CLOSE)
    call = lambda m, x: m(x)
    for name in ("gradient", "guided_backprop"):
        found = OF_ARGUMENTS[name](call, argnums=1)(model, x)
        np.testing.assert_allclose(found, expected, **CLOSE)  # one layer: all cotangents are 1
    of_model = gradients.gradient(call)(model, x)
    assert jax.tree.structure(of_model) == jax.tree.structure(model)
    relevance = gradients.integrated_gradients(call)(model, x)
    # The line from no weights to these is straight for one layer: no unit changes its sign.
    total = sum(leaf.sum() for leaf in jax.tree.leaves(relevance))
    np.testing.assert_allclose(total, model(x).sum(), rtol=1e-5)


# gradient, input x gradient.


def test_gradient_is_that_of_jax():
    expected = jax.grad(lambda x: (SEED * classify(x)).sum())(IMAGES)
    found = gradients.gradient(classify)(IMAGES, seed=SEED)
    np.testing.assert_allclose(found, expected, **CLOSE)
    times = gradients.input_x_gradient(classify)(IMAGES, seed=SEED)
    np.testing.assert_allclose(times, IMAGES * expected, **CLOSE)


def test_input_x_gradient_of_a_relu_network_without_biases_is_complete():
    x, w = normal(BATCH, WIDTH), normal(WIDTH, WIDTH)
    fun = lambda x: (jax.nn.relu(x @ w) @ DENSE)[:, 0]
    relevance = gradients.input_x_gradient(fun)(x)
    np.testing.assert_allclose(relevance.sum(-1), fun(x), rtol=1e-4, atol=1e-5)


# SmoothGrad.


def test_smooth_grad_of_a_linear_function_is_its_gradient(key):
    x = normal(BATCH, WIDTH)
    found = gradients.smooth_grad(lambda x: x @ DENSE[:, 0], noise=3.0, samples=5)(key, x)
    np.testing.assert_allclose(found, jnp.broadcast_to(DENSE[:, 0], x.shape), rtol=1e-6)


def test_smooth_grad_without_noise_is_the_gradient(key):
    found = gradients.smooth_grad(classify, noise=0.0, samples=2)(IMAGES, key=key)
    np.testing.assert_allclose(found, gradients.gradient(classify)(IMAGES), **CLOSE)


def test_noise_is_relative_to_each_examples_range(key):
    # The gradient of x^2 / 2 is the noisy copy itself.
    fun = lambda x: (x * x).sum(-1) / 2
    x = jnp.stack([jnp.linspace(0, span, 1000) for span in (1.0, 10.0, 0.0)])
    noise = gradients.smooth_grad(fun, noise=0.2, samples=1)(key, x) - x
    # The standard deviation of 1000 draws is known to 2 percent; 5 times that.
    np.testing.assert_allclose(noise.std(-1), [0.2, 2.0, 0.0], rtol=0.1)
    # The same draws for all, or an explanation would depend on its neighbours in the batch.
    np.testing.assert_allclose(10 * noise[0], noise[1], atol=1e-4)


def test_samples_are_independent_and_averaged(key):
    fun = lambda x: (x * x).sum(-1) / 2
    x = jnp.linspace(0, 1, 1000)[None]
    noise = gradients.smooth_grad(fun, noise=0.2, samples=25)(key, x) - x
    np.testing.assert_allclose(noise.std(), 0.2 / np.sqrt(25), rtol=0.1)
    other = gradients.smooth_grad(fun, noise=0.2, samples=25)(jax.random.key(1), x) - x
    assert abs(np.corrcoef(noise[0], other[0])[0, 1]) < 0.2  # 1000 draws: 0.03 by chance
    squares = gradients.smooth_grad(fun, noise=0.2, samples=25, squared=True)(key, x)
    # mean (x + e)^2 = x^2 + 0.04, and 25 x 1000 draws know it to 1e-3.
    np.testing.assert_allclose((squares - x * x).mean(), 0.04, atol=5e-3)


def test_smooth_grad_of_a_scalar_has_one_example(key):
    fun = lambda x: jnp.sin(x).sum()
    x = normal(BATCH, WIDTH)
    batched = gradients.smooth_grad(lambda x: jax.vmap(fun)(x))
    one = jax.vmap(gradients.smooth_grad(fun), in_axes=(None, 0))
    np.testing.assert_allclose(one(key, x), batched(key, x), **CLOSE)


def test_smooth_grad_of_several_arguments_draws_for_each(key):
    fun = lambda x, y: (x * x + y * y).sum(-1) / 2
    x = jnp.linspace(0, 1, 100)[None]
    of_x, of_y = gradients.smooth_grad(fun, argnums=(0, 1), samples=1)(key, x, x)
    assert np.all(np.asarray(of_x != of_y))


def test_old_keys():
    x = normal(1, WIDTH)
    explain = gradients.smooth_grad(lambda x: jnp.sin(x).sum(-1))
    np.testing.assert_array_equal(explain(jax.random.PRNGKey(0), x), explain(jax.random.key(0), x))


# Integrated gradients.


def test_integrated_gradients_of_a_polynomial():
    x = normal(BATCH, WIDTH)
    # One midpoint integrates the gradient of a square exactly: x * x.
    one = gradients.integrated_gradients(lambda x: (x * x).sum(-1), steps=1)(x)
    np.testing.assert_allclose(one, x * x, rtol=1e-5)
    # f = x0 x1 shares evenly between the two.
    shared = gradients.integrated_gradients(lambda x: x[:, 0] * x[:, 1])(x)
    np.testing.assert_allclose(shared[:, 0], x[:, 0] * x[:, 1] / 2, rtol=1e-5)
    np.testing.assert_allclose(shared[:, 1], x[:, 0] * x[:, 1] / 2, rtol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 0.5, "array"])
def test_integrated_gradients_are_complete(x64, baseline):
    x = IMAGES.astype(jnp.float64)
    baseline = x.mean((0, 1, 2)) if baseline == "array" else baseline
    fun = lambda x: jnp.tanh(conv(x, KERNEL.astype(x.dtype), BIAS)).sum((1, 2, 3))
    expected = fun(x) - fun(jnp.broadcast_to(jnp.asarray(baseline), x.shape))

    def error(steps):
        relevance = gradients.integrated_gradients(fun, steps=steps, baseline=baseline)(x)
        return np.max(np.abs(relevance.sum((1, 2, 3)) - expected))

    # The midpoint rule's error falls as steps^-2: to 1/16 for four times the steps.
    assert error(256) < 1e-3
    np.testing.assert_allclose(error(64) / error(256), 16, rtol=0.2)


def test_the_seed_is_chosen_at_the_input_and_kept():
    # At the baseline class 0 is the greatest, at the input class 1.
    fun = lambda x: jnp.stack([1 - x[:, 0], 3 * x[:, 0]], 1)
    top = lambda out: jax.nn.one_hot(out.argmax(-1), 2)
    relevance = gradients.integrated_gradients(fun)(jnp.ones((1, 1)), seed=top)
    np.testing.assert_allclose(relevance, [[3.0]], rtol=1e-6)


def test_baselines_of_several_arguments():
    fun = lambda x, y: (x * y["y"]).sum(-1)
    x, y = normal(BATCH, WIDTH), {"y": normal(BATCH, WIDTH)}
    for baseline in (1.0, (1.0, {"y": jnp.ones(WIDTH)}), (jnp.ones(()), 1.0)):
        explain = gradients.integrated_gradients(fun, argnums=(0, 1), baseline=baseline)
        of_x, of_y = explain(x, y)
        # sum xy - sum 1, from a gradient that is linear on the line: exact but for rounding.
        total = (of_x + of_y["y"]).sum(-1)
        np.testing.assert_allclose(total, fun(x, y) - WIDTH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["smooth_grad", "integrated_gradients"])
def test_memory_does_not_grow_with_the_number_of_gradients(key, name):
    def temporary(count):
        if name == "smooth_grad":
            explain = lambda x: gradients.smooth_grad(classify, samples=count)(key, x)
        else:
            explain = gradients.integrated_gradients(classify, steps=count)
        x = jnp.ones((4, 64, 64, 2))
        return jax.jit(explain).lower(x).compile().memory_analysis().temp_size_in_bytes

    # What does grow is one key or number a step: 64 more against half a million bytes.
    assert temporary(66) - temporary(2) <= 0.01 * temporary(2)


# Guided backpropagation and the deconvnet.


def test_guided_backprop_and_deconvnet_by_hand():
    # x -> relu(x) -> times w: the cotangent at the ReLU is w.
    x, w = jnp.array([[1.0, 1.0, -1.0, -1.0]]), jnp.array([2.0, -2.0, 2.0, -2.0])
    fun = lambda x: jax.nn.relu(x) @ w
    np.testing.assert_array_equal(gradients.gradient(fun)(x), [[2, -2, 0, 0]])
    np.testing.assert_array_equal(gradients.guided_backprop(fun)(x), [[2, 0, 0, 0]])
    np.testing.assert_array_equal(gradients.deconvnet(fun)(x), [[2, 0, 2, 0]])


# Grad-CAM.


def test_grad_cam_by_hand():
    maps = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])[..., None] * jnp.array([1.0, 3.0])  # [1,2,2,2]
    # The gradient by channel 0 is 4 at one of four places, and so 1 on average.
    fun = lambda x: 4 * jaxrel.tag(x, "a")[:, 0, 1, 0]
    np.testing.assert_allclose(gradients.grad_cam(fun, "a")(maps), [[[1, 0], [0, 2]]])

    def minus(x):
        x = jaxrel.tag(x, "a")
        return 4 * x[:, 0, 1, 0] - x[..., 1].sum((1, 2)) / 3

    # By channel 1 it is -1/3 everywhere: 1 * 1 - 1/3 * 3 = 0 wherever there is anything.
    np.testing.assert_allclose(gradients.grad_cam(minus, "a")(maps), jnp.zeros((1, 2, 2)))
    negative = lambda x: -jaxrel.tag(x, "a").sum((1, 2, 3))
    np.testing.assert_array_equal(gradients.grad_cam(negative, "a")(maps), jnp.zeros((1, 2, 2)))


def test_grad_cam_of_a_network_by_its_definition():
    def head(maps):
        return jnp.tanh(maps).mean((1, 2)) @ DENSE

    maps = jax.nn.relu(conv(IMAGES, KERNEL, BIAS))
    grad = jax.grad(lambda maps: (SEED * head(maps)).sum())(maps)
    expected = jnp.maximum(jnp.einsum("bc,bhwc->bhw", grad.mean((1, 2)), maps), 0)
    found = gradients.grad_cam(classify, "maps")(IMAGES, seed=SEED)
    assert found.shape == (BATCH, 3, 3)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_grad_cam_of_tokens():
    expected = jnp.maximum((TOKENS * 2 * TOKENS.mean(1, keepdims=True)).sum(-1), 0)
    found = gradients.grad_cam(read, "tokens")(TOKENS)
    assert found.shape == (BATCH, 7)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_grad_cam_is_resized():
    found = gradients.grad_cam(classify, "maps", size=(6, 9))(IMAGES)
    small = gradients.grad_cam(classify, "maps")(IMAGES)
    assert found.shape == (BATCH, 6, 9)
    np.testing.assert_allclose(found, jax.image.resize(small, found.shape, "bilinear"), **CLOSE)


def test_grad_cam_of_volumes_by_its_definition():
    x, w = normal(BATCH, 4, 5, 6, 3), normal(3, 4)

    def fun(x):
        return (jaxrel.tag(jax.nn.relu(x @ w), "maps") ** 2).mean((1, 2, 3))

    maps = np.maximum(np.asarray(x) @ np.asarray(w), 0)
    weights = (2 * maps / (4 * 5 * 6)).mean((1, 2, 3), keepdims=True)
    expected = np.maximum((weights * maps).sum(-1), 0)
    np.testing.assert_allclose(gradients.grad_cam(fun, "maps")(x), expected, **CLOSE)
    larger = gradients.grad_cam(fun, "maps", size=(8, 5, 3))(x)
    np.testing.assert_allclose(
        larger, jax.image.resize(expected, (BATCH, 8, 5, 3), "linear"), **CLOSE
    )
    guided = gradients.guided_grad_cam(fun, "maps")(x)
    details = gradients.guided_backprop(fun)(x)
    np.testing.assert_allclose(guided, details * expected[..., None], **CLOSE)
    with pytest.raises(ValueError, match=r"size \(8, 5\) must have a number for each axis"):
        gradients.grad_cam(fun, "maps", size=(8, 5))(x)


def test_integer_images_are_to_be_cast():
    fun = lambda x: (x / 255.0).sum((1, 2))
    with pytest.raises(TypeError, match=r"uint8.*cast the images, x\.astype.*at='pixels'"):
        jaxrel.lrp(fun, jaxrel.rules.Epsilon())(jnp.zeros((1, 2, 2), jnp.uint8))
    tagged = lambda x: (jaxrel.tag(x.astype(jnp.float32), "pixels") / 255.0).sum((1, 2))
    image = jnp.full((1, 2, 2), 51, jnp.uint8)
    found = jaxrel.lrp(tagged, jaxrel.rules.Epsilon(), argnums=None, at="pixels")(image)["pixels"]
    np.testing.assert_allclose(found, jnp.full((1, 2, 2), 0.2), **CLOSE)


def test_grad_cam_explains_functions_of_integers():
    table = normal(10, WIDTH)
    fun = lambda ids: read(table[ids])
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    found = gradients.grad_cam(fun, "tokens")(ids)
    np.testing.assert_allclose(found, gradients.grad_cam(read, "tokens")(table[ids]), **CLOSE)


def test_guided_grad_cam_is_the_product():
    found = gradients.guided_grad_cam(classify, "maps")(IMAGES, seed=SEED)
    guided = gradients.guided_backprop(classify)(IMAGES, seed=SEED)
    cam = gradients.grad_cam(classify, "maps", size=(SIDE, SIDE))(IMAGES, seed=SEED)
    np.testing.assert_allclose(found, guided * cam[..., None], **CLOSE)


# Errors.


def twice(x):
    return read(jaxrel.tag(x, "tokens") + 1)


def in_a_scan(x):
    step = lambda x, _: (jaxrel.tag(jnp.sin(x), "tokens"), None)
    return lax.scan(step, x, None, length=2)[0].sum((1, 2))


def forgotten(x):
    jaxrel.tag(x, "tokens")
    return x.sum((1, 2))


def tagged(make):
    def fun(x):
        return x.sum((1, 2)) + jaxrel.tag(make(x), "a").sum()

    return fun


def cam(fun, layer="tokens", **kwargs):
    return lambda: gradients.grad_cam(fun, layer, **kwargs)(TOKENS)


def smooth(fun, *args, **kwargs):
    return lambda: gradients.smooth_grad(fun, **kwargs)(*args)


def integrated(fun, *args, **kwargs):
    return lambda: gradients.integrated_gradients(fun, **kwargs)(*args)


KEY = jax.random.key(0)
ERRORS = {
    "tag": (cam(read, "toekns"), "grad_cam: .* tags nothing named 'toekns'; its tags: 'tokens'"),
    "no tag": (cam(lambda x: x.sum((1, 2)), "a"), "its tags: none"),
    "axes": (cam(tagged(lambda x: x[..., 0]), "a"), r"got shape \(3, 7\) for an output .* \(3,\)"),
    "batch": (cam(tagged(lambda x: x.swapaxes(0, 1)), "a"), r"got shape \(7, 3, 5\)"),
    "several": (cam(twice), "2 values are tagged 'tokens'"),
    "scan": (cam(in_a_scan), "inside a scan, in each of its 2 steps"),
    "forgotten": (cam(forgotten), "does not depend on the value tagged 'tokens'"),
    "size of tokens": (cam(read, size=(2, 2)), r"holds tokens, shape \(3, 7, 5\)"),
    "size": (cam(read, size=(2, 0)), r"two positive ints, got \(2, 0\)"),
    "images": (
        lambda: gradients.guided_grad_cam(lambda x: read(jax.nn.relu(x)), "tokens")(TOKENS),
        r"guided_grad_cam: .* \[batch, height, width, channels\], got \(3, 7, 5\)",
    ),
    "noise": (smooth(read, KEY, TOKENS, noise=-0.1), "noise must be 0 or more, got -0.1"),
    "no number": (smooth(read, KEY, TOKENS, noise=float("nan")), "noise must be 0 or more"),
    "samples": (smooth(read, KEY, TOKENS, samples=0), "samples must be an int, 1 or more, got 0"),
    "no batch": (
        smooth(lambda x: read(x[None])[0] * jnp.ones(4), KEY, TOKENS[0]),
        r"input has shape \(7, 5\) and the output \(4,\); the first axis of both",
    ),
    "steps": (integrated(read, TOKENS, steps=0), "steps must be an int, 1 or more, got 0"),
    "baseline": (
        integrated(read, TOKENS, baseline=jnp.ones(4)),
        r"the baseline, \(4,\), does not broadcast to the explained argument, \(3, 7, 5\)",
    ),
    "baselines": (
        integrated(lambda x, y: read(x + y), TOKENS, TOKENS, argnums=(0, 1), baseline=(0.0,)),
        r"the baseline, \(\(\),\), does not broadcast",
    ),
}


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_grad_cam_of_a_tag_in_a_function_with_a_derivative_of_its_own_says_so():
    inner = jax.custom_vjp(lambda x: jaxrel.tag(jnp.tanh(x), "tokens"))
    inner.defvjp(lambda x: (inner(x), x), lambda x, c: (c * (1 - jnp.tanh(x) ** 2),))
    with pytest.raises(NotImplementedError, match="call the function without its custom_vjp"):
        cam(lambda x: inner(x).sum((1, 2)))()


TYPE_ERRORS = {
    "key forgotten": (smooth(read, TOKENS), r"must be a PRNG key, .* got float32\[3,7,5\]"),
    "number for a key": (smooth(read, 0, TOKENS), "must be a PRNG key, .* got int"),
    "tagged integers": (
        cam(tagged(lambda x: jnp.ones_like(x, dtype=jnp.int32)), "a"),
        "'a' holds int32, not real numbers",
    ),
    "integers": (cam(lambda x: read(x).astype(jnp.int32)), "returned int32"),
}


@pytest.mark.parametrize(("call", "text"), TYPE_ERRORS.values(), ids=TYPE_ERRORS.keys())
def test_type_errors(call, text):
    with pytest.raises(TypeError, match=text):
        call()


def embedded(x):
    """A function of what it tags: [batch, 5] to [batch, classes]."""
    return from_hidden(jaxrel.tag(jnp.tanh(x @ normal_weights(0)), "hidden"))


def from_hidden(h):
    return jnp.tanh(jax.nn.relu(h @ normal_weights(1))) @ DENSE


def normal_weights(seed):
    return np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32)


AT = {
    "gradient": gradients.gradient,
    "input_x_gradient": gradients.input_x_gradient,
    "guided_backprop": gradients.guided_backprop,
    "deconvnet": gradients.deconvnet,
    "integrated_gradients": gradients.integrated_gradients,
    "smooth_grad": gradients.smooth_grad,
}


@pytest.mark.parametrize("name", AT)
def test_tagged_values_are_explained_as_arguments_are(name):
    """At a tag it is the method of the function from there on, by a target or its seed."""
    x, key = TOKENS[:, 0], (jax.random.key(0),) if name == "smooth_grad" else ()
    hidden = jnp.tanh(x @ normal_weights(0))
    of_input, places = AT[name](embedded, at="hidden")(*key, x, target=2)
    seed = jax.nn.one_hot(jnp.full(BATCH, 2), CLASSES)
    # float32 rounding: what is tagged is written as itself and what is added to it.
    close = {"rtol": 1e-5, "atol": 1e-6}
    want = AT[name](from_hidden)(*key, hidden, seed=seed)
    np.testing.assert_allclose(places["hidden"], want, **close)
    want = AT[name](embedded)(*key, x, seed=seed)
    np.testing.assert_allclose(of_input, want, **close)
    alone = AT[name](embedded, argnums=None, at=("hidden",))(*key, x, target=jnp.full(BATCH, 2))
    np.testing.assert_allclose(alone["hidden"], places["hidden"], **close)


def test_tags_in_a_scan_are_stacked():
    def model(x):
        step = lambda x, w: (jaxrel.tag(jnp.tanh(x @ w), "layer"), None)
        return lax.scan(step, x, jnp.stack([normal_weights(0), normal_weights(1)]))[0] @ DENSE

    x = TOKENS[:, 0]
    found = gradients.gradient(model, argnums=None, at="layer")(x)["layer"]
    want = jaxrel.capture_with_grad(model, "layer")(x)[2]["layer"]
    np.testing.assert_array_equal(found, want)


def test_targets_and_places_that_do_not_fit():
    x = TOKENS[:, 0]
    explain = gradients.gradient(embedded)
    with pytest.raises(ValueError, match="gradient: target 4 does not exist; there are 4"):
        explain(x, target=4)
    with pytest.raises(ValueError, match="seed=, an array, or target=, an index; not both"):
        explain(x, target=1, seed=SEED)
    with pytest.raises(ValueError, match=r"target has shape \(2,\) and the output \(3, 4\)"):
        explain(x, target=[1, 2])
    with pytest.raises(TypeError, match="target must be an index along the output's last axis"):
        explain(x, target=0.5)
    with pytest.raises(ValueError, match="tags nothing named 'other'; its tags: 'hidden'"):
        gradients.gradient(embedded, at="other")(x)
    with pytest.raises(ValueError, match="argnums=None explains no argument"):
        gradients.gradient(embedded, argnums=None)
    with pytest.raises(TypeError, match="at must be names of tags"):
        gradients.gradient(embedded, at=[jaxrel.path("w")])


@pytest.mark.parametrize("target", [2, -2, [0, 1, 3]])
def test_lrp_has_the_same_targets(target):
    x = TOKENS[:, 0]
    index = jnp.broadcast_to(jnp.asarray(target) % CLASSES, (BATCH,))
    explain = jaxrel.lrp(embedded, jaxrel.composites.epsilon_plus())
    seed = lambda out: jax.nn.one_hot(index, CLASSES) * out
    np.testing.assert_array_equal(explain(x, target=target), explain(x, seed=seed))


def test_a_function_may_have_a_target_of_its_own():
    fun = lambda x, target: embedded(x)[:, target]
    got = jaxrel.lrp(fun, jaxrel.rules.Epsilon())(TOKENS[:, 0], target=1)
    want = jaxrel.lrp(embedded, jaxrel.rules.Epsilon())(TOKENS[:, 0], target=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32 rounding
