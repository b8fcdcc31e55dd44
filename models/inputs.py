"""What all models check of their inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int

Inputs = Mapping[str, Array | np.ndarray]


def check_held(inputs: Inputs, *names: str) -> None:
    """Raise ValueError if inputs lack one of these names."""
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ValueError(
            f"inputs lack {' and '.join(missing)}; they hold {', '.join(inputs) or 'nothing'}. "
            "Make them with model.prepare(image=..., text=...)"
        )


def check_floats(
    name: str,
    x: Any,
    shape: Sequence[int],
    *,
    what: str = "normalised floats",
    advice: str = "use model.prepare",
) -> None:
    """Raise an error if `x` is not floats of shape [batch, *shape].

    Args:
      name: name of the input, for the message.
      x: the input.
      shape: without the batch.
      what: the values should be, for the message.
      advice: how to get the shape that is wanted, for the message.

    Raises:
      ValueError: another shape.
      TypeError: another dtype.
    """
    if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != tuple(shape):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [batch, {sizes}], got {list(x.shape)}; {advice}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be {what}, got {x.dtype}; use model.prepare")


def check_text(text: Any, context: int) -> None:
    """Raise an error if `text` is not token ids of shape [batch, tokens].

    Args:
      text: the input.
      context: the number of tokens the model reads at most.

    Raises:
      ValueError: another shape.
      TypeError: another dtype.
    """
    if text.ndim != 2 or not 1 <= text.shape[1] <= context:
        raise ValueError(
            f"text must be token ids of shape [batch, tokens] with at most {context} tokens, "
            f"got {list(text.shape)}; use model.prepare"
        )
    if not jnp.issubdtype(text.dtype, jnp.integer):
        raise TypeError(f"text must be integer token ids, got {text.dtype}; use model.prepare")


def as_pairs(inputs: Inputs, texts: str, advice: str) -> dict[str, Array]:
    """Bring inputs to one image and one text per row; one of either goes with all of the other.

    Args:
      inputs: "image", "text" and others with a row for each of either.
      texts: what the texts are called, for the message.
      advice: what to give instead, for the message.

    Raises:
      ValueError: there are other numbers of images and texts.
    """
    rows = _count_pairs(len(inputs["image"]), len(inputs["text"]), texts, advice)
    return {name: jnp.broadcast_to(x, (rows, *x.shape[1:])) for name, x in inputs.items()}


def _count_pairs(images: int, rows: int, texts: str, advice: str) -> int:
    if images != rows and 1 not in (images, rows):
        raise ValueError(f"{images} images and {rows} {texts} make no pairs: give {advice}")
    return max(images, rows)


def as_list(given: Any) -> list:
    """What a user gave one or several of, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def by_example(image: Any, text: Any, texts: str, advice: str) -> dict[str, list]:
    """Images and texts as lists with an entry per pair, as `as_pairs` makes pairs.

    Args:
      image: an image, or a list of them.
      text: a text, or a list of them.
      texts: as in `as_pairs`.
      advice: as in `as_pairs`.

    Raises:
      ValueError: as `as_pairs`.
    """
    lists = {"image": as_list(image), "text": as_list(text)}
    if not all(lists.values()):
        return lists  # `prepare` says that there is none
    rows = _count_pairs(len(lists["image"]), len(lists["text"]), texts, advice)
    return {name: x * rows if len(x) == 1 else x for name, x in lists.items()}


def words_before(text: Any, last: Int[Array, " batch"]) -> Bool[Array, "batch tokens"]:
    """Return where texts have tokens after their start, and before the position `last`."""
    place = jnp.arange(text.shape[1])
    return (place >= 1) & (place < last[:, None])
