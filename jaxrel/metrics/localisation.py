"""Does relevance lie where the object is? Measures against a known mask."""

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

Maps = Float[Array | np.ndarray, "batch rows columns"]
# As many as maps; told apart here so that a wrong number meets our own error.
Masks = Bool[np.ndarray, "masks height width"]


def relevance_mass_accuracy(relevance: Maps, masks: Masks) -> Float[np.ndarray, " batch"]:
    """Relevance mass accuracy (Arras et al. 2022): the share of positive relevance in a mask.

    Each cell of the map spreads its relevance evenly over the pixels it covers. What chance
    gives is the mask's share of the image, `chance(masks)`.

    Args:
      relevance: maps at any resolution that divides the image.
      masks: true where the object is.

    Returns:
      From 0 to 1; 0 for a map without positive relevance.

    Raises:
      ValueError: the numbers differ, or a cell would not cover whole pixels.
    """
    inside = _cover(relevance, masks)
    positive = np.maximum(np.asarray(relevance, np.float64), 0)
    total = positive.sum((1, 2))
    return (positive * inside).sum((1, 2)) / np.where(total > 0, total, 1)


def chance(masks: Masks) -> Float[np.ndarray, " masks"]:
    """The mass accuracy of a map without any information: the mask's share of the image."""
    return masks.mean((1, 2), dtype=np.float64)


def pointing_game(relevance: Maps, masks: Masks) -> Bool[np.ndarray, " masks"]:
    """The pointing game (Zhang et al. 2018): is the most relevant point on the object?

    The map is interpolated (bilinear) to the image's size first.

    Args:
      relevance: maps at any resolution.
      masks: true where the object is.

    Raises:
      ValueError: the numbers of maps and masks differ.
    """
    _same_number(relevance, masks)
    fine = jax.image.resize(jnp.asarray(relevance), masks.shape, "bilinear")
    best = np.asarray(fine.reshape(len(masks), -1).argmax(-1))
    return masks.reshape(len(masks), -1)[np.arange(len(masks)), best]


def _cover(relevance: Maps, masks: Masks) -> Float[np.ndarray, "batch rows columns"]:
    """How much of each cell is mask."""
    _same_number(relevance, masks)
    (batch, rows, columns), (_, height, width) = relevance.shape, masks.shape
    if height % rows or width % columns:
        raise ValueError(
            f"maps of {rows} x {columns} cells do not divide masks of {height} x {width} pixels; "
            "resize the masks to a multiple"
        )
    cells = masks.reshape(batch, rows, height // rows, columns, width // columns)
    return cells.mean((2, 4), dtype=np.float64)


def _same_number(relevance: Maps, masks: Masks) -> None:
    if len(relevance) != len(masks):
        raise ValueError(f"{len(relevance)} maps and {len(masks)} masks; give one mask per map")
