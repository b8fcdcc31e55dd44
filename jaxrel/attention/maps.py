"""Attention maps as data: what all methods share.

Checks, the choice of layers and heads, the mean over heads, and the target token with its row.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel.renamed import renamed_keywords
from jaxrel.tracing.sharding import shaped_like, zeros

# The functions check shapes themselves, so that the error can say which map is wrong, what was
# given and what was expected.
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


def head_mean(attn: FloatArray, grad: FloatArray) -> Float[Array, "*batch query key"]:
    """Mean over the heads of `max(grad * attn, 0)`: Chefer, Gur and Wolf 2021, eq. 5.

    Args:
      attn: attention maps, `[..., heads, query, key]`; or the LRP relevance of the maps,
        which gives the variants "with LRP".
      grad: gradient of the explained scalar with respect to the maps.

    Returns:
      `[..., query, key]`, 0 or more, in float32 (float64 for float64 maps).
    """
    dtype = relevance_dtype(attn, grad)
    product = jnp.maximum(grad.astype(dtype) * attn.astype(dtype), 0)
    # A sum written out fuses with the product; XLA's reduction on a CPU first stores all maps.
    heads = [product[..., head, :, :] for head in range(product.shape[-3])]
    return functools.reduce(jnp.add, heads) / len(heads)


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


def require_finite(name: str, array: Any, *, layers: Selection = None) -> None:
    """Report a NaN or an infinity in an array with its layer.

    Only concrete arrays are looked at. Inside `jax.jit` nothing can be reported, and a NaN
    travels on into the relevance, where it shows.

    Args:
      name: what the error calls the array.
      array: `[layers, ...]`.
      layers: the layers to look at; None for all.

    Raises:
      ValueError: a value is not finite; the message names the first such layer.
    """
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


def is_mask(selection: Any) -> bool:
    """Whether a choice of layers or heads is a bool array, and not indices."""
    return isinstance(selection, jax.Array | np.ndarray) and selection.dtype == bool


def as_indices(selection: Any, what: str) -> Any:
    """A choice that is no mask: an array of indices as a list, all others as they are.

    Raises:
      TypeError: the indices are traced, so that how many they are of is not known.
    """
    if isinstance(selection, jax.core.Tracer):
        raise TypeError(
            f"{what}: indices cannot be traced; choose inside jit with a bool array that has an "
            f"entry for each of the {what}, or pass indices as static values"
        )
    return selection.tolist() if isinstance(selection, jax.Array | np.ndarray) else selection


def only(
    stacked: Mapping[str, Any], layers: Any = None, heads: Any = None
) -> tuple[dict[str, Any], Any]:
    """Stacked maps and values of which some layers and heads count, chosen while the program runs.

    Layers that do not count become zeros, which change nothing that is accumulated on a residual
    stream, and go before the others, so that the last is one that counts. Heads that do not count
    become zeros, and the others are scaled so that their mean over all heads is that over those.

    Args:
      stacked: maps "attn" `[layers, batch, heads, query, key]`, and others `[layers, ...]`; None
        where there is none.
      layers: which layers count, bool `[layers]`, traced or not; None for all.
      heads: which heads count, bool `[heads]`; None for all.

    Returns:
      The same in this order, and by place whether the layer counts; None where all do.

    Raises:
      ValueError: a choice has another length, or chooses none (not seen under `jax.jit`).
    """
    attn = stacked["attn"]
    for what, chosen, count in (("layers", layers, len(attn)), ("heads", heads, attn.shape[2])):
        if chosen is not None and chosen.shape != (count,):
            raise ValueError(
                f"{what}: a choice as a bool array has an entry for each of the {count} {what}, "
                f"got shape {chosen.shape}"
            )
        if chosen is not None and not isinstance(chosen, jax.core.Tracer) and not chosen.any():
            raise ValueError(f"{what}: the bool array selects none of the {count} {what}")
    if heads is not None:
        share = jnp.where(heads, len(heads) / jnp.maximum(heads.sum(), 1), 0)
        stacked = {**stacked, "attn": attn * share.astype(attn.dtype)[:, None, None]}
    if layers is None:
        return dict(stacked), None
    order = jnp.argsort(jnp.asarray(layers), stable=True)
    counts = jnp.asarray(layers)[order]

    def sorted_out(x: Any) -> Any:
        return jnp.where(counts.reshape(-1, *(1 for _ in x.shape[1:])), x[order], 0)

    kept: dict[str, Any] = {n: x if x is None else sorted_out(x) for n, x in stacked.items()}
    return kept, counts


def prepare(
    where: str,
    maps: Mapping[str, Any],
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


def prepare_values(
    where: str,
    maps_shape: tuple[int, ...],
    values: Mapping[str, Any],
    *,
    layers: Selection = None,
) -> tuple[Array, ...]:
    """The token values of the attention layers, checked, for the asked layers only.

    Args:
      where: the function to name in an error.
      maps_shape: shape of the attention maps, `[layers, batch, heads, query, key]`.
      values: by argument name, arrays `[layers, batch, query, width]` of one shape.
      layers: the layers to keep; None for all.

    Returns:
      The values in the order given.

    Raises:
      ValueError: a shape does not fit the maps, or a value is not finite.
    """
    shapes = {name: np.shape(x) for name, x in values.items()}
    count, batch, _, tokens, _ = maps_shape
    fits = all(len(s) == 4 and s[:3] == (count, batch, tokens) for s in shapes.values())
    if not fits or len(set(shapes.values())) > 1:
        raise ValueError(
            f"{where}: expected values [layers, batch, tokens, width] of one shape "
            f"({count}, {batch}, {tokens}, width), got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    chosen = indices(layers, count, "layers")
    for name, x in values.items():
        require_finite(f"{where}: {name}", x, layers=layers)
    return tuple(take(jnp.asarray(x), chosen, 0) for x in values.values())


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


@renamed_keywords(readout="target_token")
def row(
    relevance: Float[Array, "batch query key"] | Float[np.ndarray, "batch query key"],
    target_token: TargetToken,
) -> Float[Array, "batch key"]:
    """The relevance of every token for the target token.

    Args:
      relevance: a full relevance map.
      target_token: the target token: 0 for a leading class token, the index of the end token
        for a CLIP text, the predicting position for a causal captioner. One index for all
        examples, or one each; negative ones count from the end. Where the scalar is a
        weighted mean over several tokens, their weights, float [batch, query].

    Returns:
      One row per example, the target token's own entry included.

    Raises:
      ValueError: the index does not exist, or the weights are not one per token. Under `jax.jit`
        an index is not known, and one that does not exist gives a row of NaN.
      TypeError: the indices are not integers.
    """
    batch, tokens, _ = relevance.shape
    if getattr(target_token, "ndim", 0) == 2:
        weights: Any = jnp.asarray(target_token)
        if weights.shape != (batch, tokens) or not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ValueError(
                f"row: weights of target tokens must be float [{batch}, {tokens}], got "
                f"{weights.dtype} {list(weights.shape)}"
            )
        # A product over a batch wants both sharded alike.
        like = shaped_like(relevance, (0, None), shape=(batch, tokens), dtype=relevance.dtype)
        weights = weights.astype(relevance.dtype) + zeros(like)
        return matmul(weights[:, None], jnp.asarray(relevance))[:, 0]
    index = token_index(target_token, batch=batch, tokens=tokens)
    return jnp.take_along_axis(
        jnp.asarray(relevance), index[:, None, None], axis=1, mode="fill", fill_value=jnp.nan
    )[:, 0]
