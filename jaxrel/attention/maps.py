"""Attention maps as data: the checks, the selection and the target token that all methods share."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

# Shapes are checked by the functions themselves, so that a wrong one is reported in
# their own words: which map, what was given, what was expected.
FloatArray = Float[Array, "..."] | Float[np.ndarray, "..."]
TargetToken = (
    int | np.integer | Int[Array, "..."] | Int[np.ndarray, "..."] | Float[Array, "batch query"]
)
Selection = slice | Sequence[int] | None

# An accelerator multiplies float32 matrices in fewer bits unless told otherwise.
matmul = functools.partial(jnp.matmul, precision="highest")


def relevance_dtype(*arrays: Any) -> Any:
    """The dtype relevance is accumulated in: float64 if any input is float64, else float32."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def indices(selection: Any, count: int, what: str) -> tuple[int, ...]:
    """The indices that a selection names, as a set: ascending, each once.

    Args:
      selection: None for all, a slice, or a sequence of indices; negative ones count from
        the end.
      count: how many there are.
      what: "layers" or "heads", for the errors.

    Returns:
      Indices from 0 to `count - 1`.

    Raises:
      ValueError: an index, or a bound of the slice, does not exist, or nothing is selected.
      TypeError: the selection is of another type.
    """
    have = f"there are {count} {what}, 0 to {count - 1} (or -{count} to -1 from the end)"
    if selection is None:
        return tuple(range(count))
    if isinstance(selection, slice):
        bounds = [b for b in (selection.start, selection.stop) if b is not None]
        missing = [b for b in bounds if not -count <= b <= count]
        chosen = set(range(count)[selection])
    else:
        try:
            asked = [operator.index(i) for i in selection]
        except TypeError as error:
            raise TypeError(
                f"{what}: expected None, a slice or a sequence of indices, got {selection!r}; "
                f"write {what}=[0] for the first and {what}=slice(-2, None) for the last two"
            ) from error
        missing = [i for i in asked if not -count <= i < count]
        chosen = {i % count for i in asked if i not in missing}
    if missing:
        raise ValueError(f"{what}: {missing[0]} does not exist; {have}")
    if not chosen:
        raise ValueError(f"{what}: {selection} selects none; {have}")
    return tuple(sorted(chosen))


def take(array: Array, chosen: Sequence[int], axis: int) -> Array:
    """The chosen entries of one axis; the array itself where that is all of them."""
    if len(chosen) == array.shape[axis]:
        return array
    return jnp.take(array, np.asarray(chosen), axis=axis)


def check_finite(
    attn: FloatArray, grad: FloatArray | None = None, *, layers: Selection = None
) -> None:
    """Report a NaN or an infinity in attention maps, or in their gradients, with its layer.

    Only concrete arrays are looked at. Inside `jax.jit` nothing can be reported, and a NaN
    travels on into the relevance, where it shows.

    Args:
      attn: maps, `[layers, ...]`.
      grad: their gradients, of the same shape.
      layers: the layers to look at; None for all.

    Raises:
      ValueError: a value is not finite; the message names the first such layer.
    """
    require_finite("attn", attn, layers=layers)
    if grad is not None:
        require_finite("grad", grad, layers=layers)


def require_finite(name: str, array: Any, *, layers: Selection = None) -> None:
    """`check_finite` for one array `[layers, ...]` under the name that the error gives it."""
    if isinstance(array, jax.core.Tracer):
        return
    chosen = indices(layers, len(array), "layers")
    # A concrete array may be closed over by a function under trace.
    with jax.ensure_compile_time_eval():
        finite = np.asarray(jnp.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    broken = [layer for layer in chosen if not finite[layer]]
    if broken:
        raise ValueError(
            f"{name}: NaN or infinity in layer {broken[0]} of {len(array)}; "
            "look for NaN in the weights or the input, or for an overflow in a low precision"
        )


def prepare(
    where: str,
    maps: dict[str, Any],
    *,
    layers: Selection = None,
    heads: Selection = None,
    square: bool = True,
) -> tuple[Array, ...]:
    """Stacked maps, checked, with the asked layers and heads only.

    Args:
      where: the function to name in an error.
      maps: by argument name, arrays `[layers, batch, heads, query, key]` of one shape.
      layers: the layers to keep; None for all.
      heads: the heads to keep; None for all.
      square: whether queries and keys are the same tokens.

    Returns:
      The maps in the order given.

    Raises:
      ValueError: a rank, a shape, a layer or a head is wrong, or a value is not finite.
      TypeError: `layers` or `heads` is neither None, a slice nor a sequence of indices.
    """
    shapes = {name: np.shape(x) for name, x in maps.items()}
    got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    shape = next(iter(shapes.values()))
    if len(shape) != 5:
        raise ValueError(
            f"{where}: expected maps [layers, batch, heads, query, key], got {got}; "
            "add a missing axis, as in attn[None] for a single layer"
        )
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{where}: expected maps of one shape, got {got}")
    if square and shape[-1] != shape[-2]:
        raise ValueError(
            f"{where}: expected self-attention, with as many queries as keys, got {got}; "
            "for attention between two streams see bimodal and encoder_decoder"
        )
    some_layers = indices(layers, shape[0], "layers")
    some_heads = indices(heads, shape[2], "heads")
    for name, x in maps.items():
        require_finite(f"{where}: {name}", x, layers=layers)
    return tuple(take(take(jnp.asarray(x), some_layers, 0), some_heads, 2) for x in maps.values())


def token_index(target_token: Any, *, batch: int, tokens: int) -> Int[Array, " batch"]:
    """The target token of each example, from 0 to `tokens - 1`.

    Args:
      target_token: one index for all examples, or one each; negative ones count from the end.
      batch: how many examples.
      tokens: how many tokens.

    Returns:
      One index per example.

    Raises:
      ValueError: an index does not exist (not seen under `jax.jit`), or the number of
        indices is neither one nor the batch.
      TypeError: the indices are not integers.
    """
    shape = np.shape(target_token)
    if shape not in ((), (batch,)):
        raise ValueError(
            f"target_token: expected one index, or one for each of {batch} examples, "
            f"got shape {shape}"
        )
    if not jnp.issubdtype(jnp.result_type(target_token), jnp.integer):
        raise TypeError(f"target_token: expected integers, got {jnp.result_type(target_token)}")
    if not isinstance(target_token, jax.core.Tracer):
        asked = np.asarray(target_token)
        missing = asked[(asked < -tokens) | (asked >= tokens)]
        if missing.size:
            raise ValueError(
                f"target_token: {missing.flat[0]} does not exist; there are {tokens} tokens, "
                f"0 to {tokens - 1} (or -{tokens} to -1 from the end)"
            )
    index = jnp.broadcast_to(jnp.asarray(target_token), (batch,))
    return jnp.where(index < 0, index + tokens, index)
