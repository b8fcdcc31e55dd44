"""Images and relevance maps as pixels: scaled, laid over each other, written as PNG."""

import io

import numpy as np
from jaxtyping import Float, Float32, Real, UInt8
from PIL import Image

from jaxrel.report import colours

# The same everywhere: an opacity that grew with relevance would draw lines around its zeros.
_OPACITY = 0.65


def upsample(
    relevance: Real[np.ndarray, "rows columns"], height: int, width: int
) -> Float32[np.ndarray, "height width"]:
    """Bilinear interpolation between pixel centres, edges held (align_corners=False).

    Where the map has more pixels than are asked for, each result is a weighted mean of all
    that it covers.
    """
    grid = Image.fromarray(np.asarray(relevance, np.float32))
    return np.array(grid.resize((width, height), Image.Resampling.BILINEAR))


def overlay(
    image: UInt8[np.ndarray, "height width 3"],
    relevance: Real[np.ndarray, "rows columns"],
    *,
    signed: bool,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw relevance as heat over a pale grey version of the image.

    The colours span the map's own range: up to its maximum, or, for signed relevance, to its
    largest absolute value on both sides of zero. The image is greyed and its contrast
    reduced, so that every colour shown is heat, on any background.

    Args:
      image: RGB, 0 to 255.
      relevance: a map of any resolution, finite.
      signed: whether values below zero mean something.

    Returns:
      RGB, 0 to 255, of the image's size.
    """
    limit = colours.scale(relevance)
    height, width = image.shape[:2]
    values = colours.normalise(upsample(relevance, height, width), limit)
    heat = colours.colour(values, signed=signed) / 255
    blend = (1 - _OPACITY) * _grey(image)[..., None] + _OPACITY * heat
    return np.round(255 * blend).astype(np.uint8)


def flat(
    relevance: Real[np.ndarray, "rows columns"], height: int, width: int, *, signed: bool
) -> UInt8[np.ndarray, "height width 3"]:
    """The heat alone, for a map that has no image; its pixels stay squares."""
    values = colours.normalise(relevance, colours.scale(relevance))
    image = Image.fromarray(colours.colour(values, signed=signed))
    return np.array(image.resize((width, height), Image.Resampling.NEAREST))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def fit(image: UInt8[np.ndarray, "_ _ 3"], cell: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """The image scaled so that its longer side is `cell` pixels, each side at least one."""
    height, width = _fitted(image.shape, cell)
    # A strongly enlarged image shows its own pixels; in between, squares would be uneven.
    large = cell >= 2 * max(image.shape[:2])
    how = Image.Resampling.NEAREST if large else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize((width, height), how))


def drawn_map(
    relevance: Real[np.ndarray, "rows columns"],
    shown: UInt8[np.ndarray, "_ _ 3"] | None,
    cell: int,
    *,
    signed: bool,
) -> UInt8[np.ndarray, "height width 3"]:
    """One relevance map as a report shows it: over its image, or alone where there is none."""
    if shown is not None:
        return overlay(fit(shown, cell), relevance, signed=signed)
    return flat(relevance, *_fitted(relevance.shape, cell), signed=signed)


def _fitted(shape: tuple[int, ...], cell: int) -> tuple[int, int]:
    """Height and width of an image or a map whose longer side becomes `cell` pixels."""
    factor = cell / max(shape[:2])
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _grey(image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width"]:
    # Rec. 601 luma: how bright an image's own values look, without leaving sRGB.
    luma = image @ np.array([0.299, 0.587, 0.114]) / 255
    # Black is lifted, since heat over black would lose its own lightness.
    return 0.3 + 0.65 * luma
