"""Trees of parameters: the names of their leaves, and what they must be."""

from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import PyTree


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf, "clip/text/projection/kernel": an nnx.Variable adds nothing to it."""
    variable = jax.tree_util.GetAttrKey("value")
    path = tuple(part for part in path if part != variable)
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their name, in the tree's order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_float32(tree: PyTree, what: str, integers: bool = False) -> None:
    """Refuse leaves that an optimiser should not train.

    Args:
      tree: of arrays.
      what: they are, for the message.
      integers: True lets integers pass: an optimiser's counts.

    Raises:
      ValueError: a leaf has another dtype.
    """
    for name, leaf in named(tree).items():
        dtype = jnp.result_type(leaf)
        if dtype == jnp.float32 or (integers and jnp.issubdtype(dtype, jnp.integer)):
            continue
        raise ValueError(
            f"{what} must be float32 (bfloat16 is for the computation alone), but {name} is "
            f"{dtype}; split off what is not trained, with nnx.split(model, nnx.Param, ...)"
        )
