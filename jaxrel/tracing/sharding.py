"""Sharding: of arrays made of a shape alone, and of whole batches.

In an explicit mesh (`jax.make_mesh`'s default) how an array is sharded is part of its type. What
a loop starts from, a branch not taken returns or a probe adds must have the type of what it
stands for, and zeros of a mere shape are not sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def shaped_like(
    like: Any,
    axes: Sequence[int | None] | None = None,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
) -> jax.ShapeDtypeStruct:
    """A shape and dtype, sharded as another value is.

    Args:
      like: an array, or its type: `jax.typeof`, a graph value's `aval`, a `ShapeDtypeStruct`.
      axes: for each axis of the shape, the axis of `like` that it is sharded as; None for one
        that is whole on every device. By default the axes of `like`.
      shape: the shape, by default `like`'s.
      dtype: the dtype, by default `like`'s.

    Returns:
      The three as a `jax.ShapeDtypeStruct`, without a sharding where no axis has one in its type
      (no mesh, or one that is not explicit).
    """
    aval = jax.typeof(like) if isinstance(like, jax.Array | np.ndarray) else like
    shape = aval.shape if shape is None else tuple(shape)
    dtype = aval.dtype if dtype is None else dtype
    axes = range(len(shape)) if axes is None else axes
    sharding = None
    if aval.sharding is not None:
        spec = [None if axis is None else aval.sharding.spec[axis] for axis in axes]
        if any(names is not None for names in spec):
            sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def zeros(like: Any) -> Array:
    """Zeros of a `shaped_like` type."""
    plain = jnp.zeros(like.shape, like.dtype)
    if like.sharding is None:
        return plain
    if not isinstance(plain, jax.core.Tracer) and jax.sharding.get_abstract_mesh().empty:
        # Outside of jit and of jax.set_mesh nobody says which devices the mesh has, and arrays
        # without a mesh go with all others.
        return plain
    # Inside jit no mesh need be set, and then JAX 0.12 would not heed the sharding.
    with jax.sharding.use_abstract_mesh(like.sharding.mesh):
        return jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding)


def shard_rows(tree: Any) -> Any:
    """Arrays with one row per example, shared among the devices of the mesh that is set.

    Args:
      tree: of arrays; the first axis is the rows.

    Returns:
      The tree. Where `jax.set_mesh` has set a mesh, rows lie over its first axis; arrays whose
      number of rows is no multiple of its size stay as they are.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    axis, *_ = mesh.axis_names
    by_row = NamedSharding(mesh, PartitionSpec(axis))

    def place(x: Any) -> Any:
        return x if np.ndim(x) == 0 or len(x) % mesh.shape[axis] else jax.device_put(x, by_row)

    return jax.tree.map(place, tree)


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, whole on every process; those of other processes' devices are gathered."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def compiler_sharded(fun: Callable, rows: Any, out_axes: Any = 0) -> Callable:
    """A function that sees an explicit mesh as an automatic one.

    So models run whose operations do not say how their results are sharded. To be called while
    tracing: `jax.sharding.auto_axes` for what is not known to be in an explicit mesh.

    Args:
      fun: the function.
      rows: a tree of arrays; the first axis of the first is how rows are sharded.
      out_axes: by output (a prefix of their tree), 0 where the first axis is the rows, and None
        where all of it is whole on every device.
    """
    for x in jax.tree.leaves(rows):
        sharding = jax.typeof(x).sharding
        if sharding.mesh.explicit_axes:
            break
    else:
        return fun
    specs = {0: PartitionSpec(sharding.spec[0]), None: PartitionSpec()}
    out = jax.tree.map(
        lambda axis: NamedSharding(sharding.mesh, specs[axis]),
        out_axes,
        is_leaf=lambda x: x is None,
    )
    return jax.sharding.auto_axes(fun, axes=sharding.mesh.explicit_axes, out_sharding=out)
