"""Convolutions as rules compute them: products of patches, and kernels that are reordered."""

import itertools

import jax
import numpy as np
import pytest
from jax import lax

import jaxrel
from jaxrel import gradients, rules
from jaxrel.propagation.convolutions import patch_product, quick_steps, transposable
from jaxrel.tracing import trace
from jaxrel.tracing.evaluate import Edits, evaluate

pytestmark = pytest.mark.usefixtures("x64")

# Layouts, shapes of image and kernel, and strides; the second image has pixels that no patch takes.
CASES = [
    (("NHWC", "HWIO", "NHWC"), (2, 8, 6, 3), (4, 3, 3, 5), (4, 3)),
    (("NHWC", "HWIO", "NHWC"), (2, 9, 7, 3), (4, 3, 3, 5), (4, 3)),
    (("NCHW", "OIHW", "NCHW"), (2, 3, 4, 6), (5, 3, 2, 3), (2, 3)),
    (("HWCN", "IOHW", "NCWH"), (4, 6, 3, 2), (3, 5, 2, 3), (2, 3)),
    (("NHC", "HIO", "NHC"), (2, 9, 3), (3, 3, 5), (3,)),
    (("NDHWC", "DHWIO", "NDHWC"), (1, 4, 4, 6, 2), (2, 2, 3, 2, 4), (2, 2, 3)),
]


def convolution(layouts, strides):
    def conv(x, w):
        return lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=layouts)

    return conv


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def by_loops(x, w, strides, layouts):
    """The convolution, one product of two numbers at a time."""
    image, kernel, made = layouts
    space = [axis for axis in image if axis not in "NC"]
    size = {axis: x.shape[image.index(axis)] for axis in image}
    side = {axis: w.shape[kernel.index(axis)] for axis in kernel}
    step = dict(zip(space, strides, strict=True))
    count = {axis: (size[axis] - side[axis]) // step[axis] + 1 for axis in space}
    count |= {"N": size["N"], "C": side["O"]}
    z = np.zeros([count[axis] for axis in made])
    for place in itertools.product(*(range(count[axis]) for axis in made)):
        at = dict(zip(made, place, strict=True))
        for inner in itertools.product(*(range(side[axis]) for axis in "I" + "".join(space))):
            within = dict(zip(["I", *space], inner, strict=True))
            pixel = {axis: at[axis] * step[axis] + within[axis] for axis in space}
            pixel |= {"N": at["N"], "C": within["I"]}
            weight = within | {"O": at["C"]}
            z[place] += (
                x[tuple(pixel[axis] for axis in image)] * w[tuple(weight[axis] for axis in kernel)]
            )
    return z


@pytest.mark.parametrize(("layouts", "image", "kernel", "strides"), CASES)
def test_the_product_is_the_convolution(layouts, image, kernel, strides):
    x, w = arrays(image, kernel)
    (core,) = trace(convolution(layouts, strides), x, w).graph.nodes
    product = patch_product(core)
    # float64, sums of a few dozen numbers.
    np.testing.assert_allclose(
        product(*map(jax.numpy.asarray, (x, w))), by_loops(x, w, strides, layouts), atol=1e-13
    )


@pytest.mark.parametrize("rule", [rules.Epsilon(1e-6), rules.ZPlus(), rules.Gamma(0.25)], ids=repr)
def test_no_strided_convolution_is_transposed(rule):
    layouts, image, kernel, strides = CASES[1]
    x, w = arrays(image, kernel)
    explained = jax.jit(jaxrel.lrp(convolution(layouts, strides), rule))
    assert "lhs_dilate" not in explained.lower(x, w).as_text("hlo")
    # The same numbers as by a kernel that no longer counts as side by side.
    wider = np.pad(w, ((0, 1), (0, 0), (0, 0), (0, 0)))
    overlapping = jax.jit(jaxrel.lrp(convolution(layouts, strides), rule))
    assert "lhs_dilate" in overlapping.lower(x, wider).as_text("hlo")
    np.testing.assert_allclose(explained(x, w), overlapping(x, wider), atol=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {"padding": ((1, 1), (0, 0))},
        {"window_strides": (2, 3)},
        {"window_strides": (1, 1), "lhs_dilation": (2, 2)},
        {"rhs_dilation": (2, 1)},
        {"feature_group_count": 3},
        {"batch_group_count": 2},
    ],
    ids=str,
)
def test_other_convolutions_stay(changed):
    options = {"window_strides": (4, 3), "padding": ((0, 0), (0, 0))} | changed
    depth, features = (1, 6) if "feature_group_count" in changed else (3, 6)
    x, w = arrays((2, 8, 6, 3), (4, 3, depth, features))

    def conv(x, w):
        layouts = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, dimension_numbers=layouts, **options)

    (core,) = trace(conv, x, w).graph.nodes
    assert patch_product(core) is None


OVERLAPPING = [
    (layouts, image, kernel, (1,) * len(strides)) for layouts, image, kernel, strides in CASES
]


@pytest.mark.parametrize(("layouts", "image", "kernel", "strides"), OVERLAPPING)
def test_a_reordered_kernel_makes_the_same_convolution(layouts, image, kernel, strides):
    x, w = arrays(image, kernel)
    conv = convolution(layouts, strides)
    (core,) = trace(conv, x, w).graph.nodes
    found, expected = (jax.vjp(lambda x, f=f: f(x, w), x) for f in (transposable(core), conv))
    (s,) = arrays(expected[0].shape)
    # float64, sums of a few dozen numbers.
    np.testing.assert_allclose(found[0], by_loops(x, w, strides, layouts), atol=1e-13)
    np.testing.assert_allclose(found[1](s)[0], expected[1](s)[0], atol=1e-13)


def kernel_orders(function, *args):
    """The order in which each convolution of a program reads its kernel."""
    text = jax.jit(function).lower(*args).as_text("hlo")
    lines = [line for line in text.splitlines() if " convolution(" in line]
    return [line.split("dim_labels=")[1].split("_")[1][:4] for line in lines]


@pytest.mark.parametrize("layouts", [CASES[0][0], CASES[2][0]], ids=str)
def test_a_transposed_convolution_reads_its_kernel_in_the_fast_order(layouts):
    """Space, input, output: "01io" in the words of XLA."""
    image, kernel = (2, 6, 6, 3), (3, 3, 3, 5)
    shapes = [
        tuple(size["NHWC".index(axis)] for axis in layouts[0])
        if name == "image"
        else tuple(size["HWIO".index(axis)] for axis in layouts[1])
        for name, size in (("image", image), ("kernel", kernel))
    ]
    x, w = arrays(*shapes)
    explain = jax.jit(jaxrel.lrp(convolution(layouts, (1, 1)), rules.Epsilon(1e-6)))
    assert kernel_orders(explain, x, w)[-1] == "01io"


def test_convolutions_in_groups_keep_their_kernel():
    x, w = arrays((2, 8, 6, 3), (4, 3, 1, 6))

    def conv(x, w):
        layouts = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layouts, feature_group_count=3
        )

    (core,) = trace(conv, x, w).graph.nodes
    assert transposable(core) is None


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
@pytest.mark.parametrize(("layouts", "image", "kernel", "strides"), CASES[1:3] + OVERLAPPING[:3])
def test_quick_steps_have_the_same_derivatives(layouts, image, kernel, strides, argnums):
    x, w = map(jax.numpy.asarray, arrays(image, kernel))
    conv = convolution(layouts, strides)
    graph = trace(conv, x, w).graph
    steps = quick_steps(graph)
    assert len(steps) == 1

    def found(x, w):
        return (evaluate(graph, (x, w), Edits(steps)).outs[0] ** 3).sum()

    def expected(x, w):
        return (conv(x, w) ** 3).sum()

    # float64, sums of a few dozen numbers; cubes of up to about 20.
    pairs = zip(
        *(jax.tree.leaves(jax.grad(f, argnums)(x, w)) for f in (found, expected)), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-9)


LOOPS = {
    "integrated_gradients": lambda f: gradients.integrated_gradients(f, steps=3),
    "smooth_grad": lambda f: lambda x: gradients.smooth_grad(f, samples=3)(jax.random.key(0), x),
    "guided_backprop": lambda f: (
        lambda x: jax.lax.map(
            lambda seed: gradients.guided_backprop(f)(x, seed=seed), jax.numpy.ones((2, 2))
        )
    ),
}


@pytest.mark.parametrize("method", LOOPS)
@pytest.mark.parametrize("body", [False, True], ids=["plain", "in a scan of layers"])
def test_gradients_in_loops_read_kernels_in_the_fast_order(method, body):
    """XLA's CPU backend takes many times as long in the other, and changes it only outside."""
    x, w = arrays((2, 6, 6, 3), (2, 3, 3, 3, 3))
    conv = convolution(("NHWC", "HWIO", "NHWC"), (1, 1))

    def network(x):
        if body:
            pad = ((0, 0), (1, 1), (1, 1), (0, 0))
            x, _ = lax.scan(lambda x, w: (jax.nn.relu(conv(jax.numpy.pad(x, pad), w)), None), x, w)
        else:
            x = jax.nn.relu(conv(conv(x, w[0]), w[1]))
        return (x**2).sum((1, 2, 3))

    explain = LOOPS[method](network)
    assert {*kernel_orders(explain, x)} == {"01io"}
