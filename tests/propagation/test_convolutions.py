"""Convolutions as rules compute them: products of patches, and kernels that are reordered."""

import itertools

import jax
import numpy as np
import pytest
from jax import lax

import jaxrel
from jaxrel import rules
from jaxrel.propagation.convolutions import patch_product, transposable
from jaxrel.tracing import trace

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
    text = explain.lower(x, w).as_text("hlo")
    orders = [
        line.split("dim_labels=")[1].split("_")[1][:4]
        for line in text.splitlines()
        if " convolution(" in line
    ]
    assert orders[-1] == "01io"


def test_convolutions_in_groups_keep_their_kernel():
    x, w = arrays((2, 8, 6, 3), (4, 3, 1, 6))

    def conv(x, w):
        layouts = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layouts, feature_group_count=3
        )

    (core,) = trace(conv, x, w).graph.nodes
    assert transposable(core) is None
