"""Convolutions as rules compute them: in forms that are cheap to transpose."""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array

from jaxrel.tracing import primitives
from jaxrel.tracing.graph import Node


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
