"""`tag`: give an intermediate value a name, so that a transformation can find it.

The primitive is our own, and not only `checkpoint_name`, for one reason: its batching rule
moves the mapped axis to the front, so a tagged value has its batch axis first however the
model was written. `jax.ad_checkpoint.checkpoint_name` is understood as well (see
`graph.tag_name`), with the axis wherever the model left it.
"""

from jax import numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxrel.tracing import primitives

# Errors point at the line that calls `tag`, not into this file.
primitives.hide(__file__)


def tag(x: ArrayLike, name: str) -> Array:
    """Mark an intermediate value with a name; the value itself is unchanged.

    A tag costs nothing when nobody asks for it. It survives `jit`, `scan`, `remat`, `cond`,
    `vmap` (which puts the mapped axis first) and differentiation. `jaxrel.capture` returns
    tagged values, `jaxrel.capture_with_grad` their gradients too.

    Args:
      x: any array.
      name: a non-empty name; several values with one name are stacked by `capture`.

    Returns:
      `x`.

    Raises:
      TypeError: `name` is not a string.
      ValueError: `name` is empty.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"tag: name must be a string, got {type(name).__name__}: tag(x, 'attention')"
        )
    if not name:
        raise ValueError("tag: name is empty; give the value a name, as in tag(x, 'attention')")
    return primitives.tag_p.bind(jnp.asarray(x), name=name)
