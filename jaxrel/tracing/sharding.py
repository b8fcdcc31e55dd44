"""Arrays made of a shape alone, sharded as the values that they meet.

In an explicit mesh (`jax.make_mesh`'s default) how an array is sharded is part of its type. What
a loop starts from, a branch not taken returns or a probe adds must have the type of what it
stands for, and zeros of a mere shape are not sharded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
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
      shape: by default that of `like`.
      dtype: by default that of `like`.

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
