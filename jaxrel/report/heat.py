"""Images and relevance maps as pixels: scaled, laid over each other, written as PNG."""

import io

import numpy as np
from jaxtyping import Float, Float32, Real, Shaped, UInt8
from PIL import Image

from jaxrel.report import colours

# The same everywhere: an opacity that grew with relevance would draw lines around its zeros.
OPACITY = 0.65

# Weights of Rec. 601 luma: how bright an image's own values look, without leaving sRGB.
_LUMA = np.array([0.299, 0.587, 0.114])
# The grey image spans its colours, but nothing smaller than this is spread: noise stays noise.
_LEAST_SPAN = 0.25

# Negative relevance is hatched, for grey print: below this share of the largest absolute value.
HATCHED_BELOW = -0.06
# Pixels between two lines, their width, and what is left of the light there.
HATCH = (8, 2, 0.55)


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
    largest absolute value on both sides of zero; negative parts are hatched. The image is `pale`,
    so that every colour shown is heat, on any background.

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
    return hatched(_blended(colours.colour(values, signed=signed), pale(image)), values)


def bar(
    width: int, image: UInt8[np.ndarray, "_ _ 3"] | None, *, signed: bool, height: int = 8
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The colour table as `drawn_map` draws it: over the image's mean grey, hatched if negative."""
    values = np.broadcast_to(np.linspace(-1 if signed else 0, 1, width), (height, width))
    heat = colours.colour(values, signed=signed)
    if image is not None:
        heat = _blended(heat, np.full(values.shape, mean_pale(image)))
    return hatched(heat, values)


def pale(image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width"]:
    """The image as it is below the heat: grey, of low contrast, 0.35 to 1.

    A grey of the brightness alone would hide a red circle on slate. Here a pixel is as far from
    the middle as its colour is from the image's median colour, brighter or darker as the pixel
    is, so that whatever has another colour than most of the image shows.
    """
    away = image.astype(np.float32) / 255
    away -= np.median(away, axis=(0, 1))
    side = np.where(away @ _LUMA < 0, -1, 1)
    grey = side * np.sqrt((away**2).mean(axis=-1))
    low, high = np.quantile(grey, (0.005, 0.995))
    span = max(high - low, _LEAST_SPAN)
    grey = np.clip(0.5 + (grey - (low + high) / 2) / span, 0, 1)
    # Black is lifted, since heat over black would lose its own lightness.
    return 0.35 + 0.65 * grey


def mean_pale(image: UInt8[np.ndarray, "_ _ 3"]) -> float:
    """How bright the pale image is on average, 0 to 1; of photographs, as a small one."""
    return float(pale(fit(image, 320) if max(image.shape) > 320 else image).mean())


def hatched(
    drawn: UInt8[np.ndarray, "height width 3"], values: Shaped[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Colours with dark lines across what is negative; `values` is between -1 and 1."""
    height, width = values.shape
    period, thick, light = HATCH
    lines = np.add.outer(np.arange(height), np.arange(width)) % period < thick
    dark = np.round(drawn * light).astype(np.uint8)
    return np.where((lines & (values < HATCHED_BELOW))[..., None], dark, drawn)


def _blended(
    heat: UInt8[np.ndarray, "height width 3"], grey: Float[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    blend = (1 - OPACITY) * grey[..., None] + OPACITY * heat / 255
    return np.round(255 * blend).astype(np.uint8)


def flat(
    relevance: Real[np.ndarray, "rows columns"], height: int, width: int, *, signed: bool
) -> UInt8[np.ndarray, "height width 3"]:
    """The heat alone, for a map that has no image; its pixels stay squares."""
    values = colours.normalise(relevance, colours.scale(relevance))
    # Each pixel has the value of the nearest cell.
    at = [np.arange(n) * m // n for n, m in zip((height, width), values.shape, strict=True)]
    values = values[np.ix_(*at)]
    return hatched(colours.colour(values, signed=signed), values)


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
