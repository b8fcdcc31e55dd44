"""Convolutions in forms that are cheap to transpose, for rules and for gradients in loops."""

from collections.abc import Callable

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxrel.tracing import primitives
from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.graph import Graph, Node


def patch_product(core: Node) -> Callable[[Array, Array], Array] | None:
    """The function of image and kernel that a convolution is; None where windows overlap.

    XLA transposes a strided convolution by another, of values with zeros between them, which its
    CPU backend multiplies: for patches of 16 x 16 that takes 80 times as long as the transposed
    product does.
    """
    options = primitives.side_by_side(core.equation) if core.name in primitives.CONV else None
    if options is None:
        return None
    shape, kernel = (value.shape for value in core.ins)
    (batch, features, *space), (_, depth, *inside), made = primitives.conv_axes(core.equation)
    sides = {axis: kernel[of_kernel] for axis, of_kernel in zip(space, inside, strict=True)}
    if {*sides.values()} == {1}:
        return None
    # Each axis of space is cut in two: which patch, and where in it.
    first = [axis + sum(other < axis for other in space) for axis in range(len(shape))]
    cut = [
        size
        for axis, whole in enumerate(shape)
        for size in ((whole // sides[axis], sides[axis]) if axis in sides else (whole,))
    ]
    summed = [first[features], *(first[axis] + 1 for axis in space)]
    kept = [axis for axis in range(len(shape)) if axis != features]
    # The product has the axes that are kept, in their order, and then the kernel's features.
    order = [kept.index(batch), len(kept), *map(kept.index, space)]
    back = [order[made.index(axis)] for axis in range(len(made))]

    def product(x: Array, w: Array) -> Array:
        for axis, side in sides.items():
            x = lax.slice_in_dim(x, 0, shape[axis] // side * side, axis=axis)
        dimensions = ((summed, [depth, *inside]), ((), ()))
        return lax.dot_general(x.reshape(cut), w, dimensions, **options).transpose(back)

    return product


def transposable(core: Node) -> Callable[[Array, Array], Array] | None:
    """The function of image and kernel that a convolution is, for its transpose in the image.

    XLA's CPU backend has a fast kernel for filters in the order space, input, output. Inside of a
    loop it brings no other to that order, and computes them eight times as slowly; JAX's transpose
    of a convolution exchanges input and output. Here the kernel is put in the order whose exchange
    is the fast one. None where nothing is gained.
    """
    ordered = primitives.with_kernel_order(core.equation) if core.name in primitives.CONV else None
    if ordered is None:
        return None
    order, bind = ordered
    return lambda x, w: bind(x, lax.transpose(w, order))


def quick_steps(graph: Graph) -> dict[Node, Step]:
    """What computes a graph's convolutions, with the same derivatives in a form that is cheap."""
    steps: dict[Node, Step] = {}
    for node in graph.nodes:
        if node.is_open:
            for body in node.bodies:
                steps |= quick_steps(body)
        elif (function := patch_product(node) or _quick(node)) is not None:
            same = primitives.same_as(node.equation)
            key = None if same is None else (quick_steps, same)
            steps[node] = Step(node.ins, lambda x, w, f=function: [f(x, w)], key=key)
    return steps


def _quick(core: Node) -> Callable[[Array, Array], Array] | None:
    """A convolution whose derivative by the image is that of `transposable`."""
    backward = transposable(core)
    if backward is None:
        return None

    def function(x, w):
        return core.bind(x, w)[0]

    def forward(x, w):
        # Residuals are arrays: whose derivative is wanted is said by their structure.
        parts = tuple(() if part.perturbed else None for part in (x, w))
        return function(x.value, w.value), (x.value, w.value, *parts)

    def back(residuals, c):
        x, w, *parts = residuals
        if isinstance(c, SymbolicZero):
            return None, None
        by_x = jax.linear_transpose(lambda x: backward(x, w), x) if parts[0] == () else None
        by_w = jax.linear_transpose(lambda w: function(x, w), w) if parts[1] == () else None
        return tuple(None if pull is None else pull(c)[0] for pull in (by_x, by_w))

    convolution = jax.custom_vjp(function)
    convolution.defvjp(forward, back, symbolic_zeros=True)
    return convolution
