"""How much of a word's relevance lies in the boxes of what the word names, by threshold.

The localisation correctness of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning
for image captioning models". One map per word:

    masks = box_masks(scale_boxes(boxes, size=(640, 480), to=(224, 224)), 224, 224)
    values = correctness(relevance, masks)             # [words, thresholds]
    curve = bootstrap_many(np.asarray(values).T)       # a mean with its interval per threshold

Words of one image are not independent; where there are several, give `bootstrap_many` their
mean per image, or resample images otherwise.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

THRESHOLDS: tuple[float, ...] = tuple(i / 10 for i in range(10))

Relevance = Float[Array | np.ndarray, "*words height width channels"]
# Other names: shapes that do not fit meet our own error.
Masks = Shaped[Array | np.ndarray, "*maps masks rows columns"]
Size = tuple[int, int]


def scale_boxes(
    boxes: Real[Array | np.ndarray, "*boxes 4"], *, size: Size, to: Size
) -> Int[np.ndarray, "*boxes 4"]:
    """Boxes of an image in the pixels of its map, whole pixels by truncation.

    A box that is narrower than a pixel of the map may be left without any, and holds nothing.

    Args:
      boxes: left, top, width and height, as COCO gives them.
      size: width and height of the image.
      to: width and height of the map.

    Returns:
      Left, top, and the ends to the right and below, which are not inside.

    Raises:
      ValueError: a size is not positive.
    """
    if min(*size, *to) <= 0:
        raise ValueError(f"scale_boxes: expected positive (width, height), got {size} and {to}")
    boxes = np.asarray(boxes, np.float64)
    ends = np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)
    # The ratio first, as the reference implementation does: rounding can move an edge.
    ratio = np.asarray(to, np.float64) / np.asarray(size, np.float64)
    return (ends * np.tile(ratio, 2)).astype(np.int64)


def box_masks(
    boxes: Int[Array | np.ndarray, "*boxes 4"], height: int, width: int
) -> Bool[Array, "*boxes {height} {width}"]:
    """Masks of boxes.

    Args:
      boxes: left, top, right, bottom, the last two not inside; a box without pixels, such as
        zeros to fill up an array, is an empty mask.
      height: of the masks.
      width: of the masks.
    """
    left, top, right, bottom = jnp.moveaxis(jnp.asarray(boxes), -1, 0)[..., None]
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return inside_rows[..., :, None] & inside_columns[..., None, :]


def correctness(
    relevance: Relevance,
    masks: Masks,
    *,
    thresholds: Sequence[int | float] = THRESHOLDS,
    negative: bool = False,
) -> Float[Array, "*words thresholds"]:
    """The share of a word's relevance inside the boxes of its category, at each threshold.

    Counted is the positive part per pixel and channel, its mean over channels, over its maximum.
    What of it is at most the threshold becomes 0, and the share of the rest is taken that lies
    inside a mask; of several masks, the one with the largest share counts. Each
    threshold and mask meets the map itself: the reference implementation thresholds in place,
    so that all boxes but the first meet the map of the last threshold.

    Args:
      relevance: signed relevance, one map per word; maps without channels as one channel.
      masks: bool, those of each word's category; words with fewer are filled up with empty
        masks, which have no share.
      thresholds: shares of the map's maximum; static.
      negative: take the negative part, as positive numbers, in place of the positive part.

    Returns:
      From 0 to 1, float32 (float64 for float64 maps); 0 where nothing is left of the map. Pure,
      and made for `jax.jit` and `jax.vmap`. With several maps for a word, one per attention
      head, the reference implementation takes the largest value per threshold.

    Raises:
      ValueError: a map is not finite (NaN under `jax.jit` and `jax.vmap`), masks are none, not
        bool or of another shape, or a threshold lies outside [0, 1).
    """
    shape, found = tuple(relevance.shape), tuple(masks.shape)
    if found[:-3] != shape[:-3] or found[-2:] != shape[-3:-1] or not found[-3]:
        raise ValueError(
            f"correctness: masks of {list(found)} for relevance of {list(shape)}; expected "
            f"{[*shape[:-3], 'masks', *shape[-3:-1]]} with at least one mask per word"
        )
    if masks.dtype != np.bool_:
        raise ValueError(f"correctness: masks must be bool, True inside, got {masks.dtype}")
    if not len(thresholds) or not all(0 <= one < 1 for one in thresholds):
        raise ValueError(f"correctness: thresholds must lie in [0, 1), got {tuple(thresholds)}")
    check_maps("correctness", relevance)
    shares = tuple(float(one) for one in thresholds)
    return _correctness(jnp.asarray(relevance), jnp.asarray(masks), shares, negative)


def check_maps(what: str, maps: Float[Array | np.ndarray, "..."]) -> None:
    """Refuse maps that are not finite, where values can be looked at."""
    if isinstance(maps, jax.core.Tracer):
        return
    bad = ~np.isfinite(np.asarray(maps))
    if bad.any():
        place = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"{what}: {bad.sum()} of {bad.size} values are not finite, first at {place} of "
            f"{list(bad.shape)}"
        )


def _normalised_part(
    relevance: Float[Array, "*words height width channels"], negative: bool
) -> Float[Array, "*words height width"]:
    relevance = relevance.astype(jnp.promote_types(relevance.dtype, jnp.float32))
    part = jnp.maximum(-relevance if negative else relevance, 0).mean(-1)
    largest = part.max((-2, -1), keepdims=True)
    return part / jnp.where(largest == 0, 1, largest)


@functools.partial(jax.jit, static_argnames=("thresholds", "negative"))
def _correctness(
    relevance: Float[Array, "*words height width channels"],
    masks: Bool[Array, "*words masks height width"],
    thresholds: tuple[float, ...],
    negative: bool,
) -> Float[Array, "*words thresholds"]:
    part = _normalised_part(relevance, negative)[..., None, :, :]
    # A comparison with NaN is false, so that NaN stays and is seen in the result.
    kept = jnp.where(part <= jnp.asarray(thresholds, part.dtype)[:, None, None], 0, part)
    inside = jnp.einsum(
        "...thw,...mhw->...tm", kept, masks.astype(part.dtype), precision=jax.lax.Precision.HIGHEST
    )
    total = kept.sum((-2, -1))
    return inside.max(-1) / jnp.where(total == 0, 1, total)
