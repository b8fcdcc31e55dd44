"""Colours for relevance: two small tables, and how a map becomes numbers on them."""

import numpy as np
from jaxtyping import Float, Shaped, UInt8

# Lightness (CIE L*) falls evenly: 98, 90, 78, 65, 50, 36, 21, so that equal steps of relevance
# look like equal steps, also in grey print.
_UNSIGNED = ("#fff8ec", "#fee0a6", "#fcba69", "#f48a47", "#db5840", "#b02a48", "#74103f")

# Blue is negative, red positive; both sides fall from L* 97 over 73, 46 to 22.
_SIGNED = ("#123f8c", "#3f7cc4", "#8fbbe3", "#f7f7f7", "#f3a88b", "#d64b45", "#8c1026")

# An odd number, so that zero has a colour of its own in the middle of the signed table.
_STEPS = 255


def _rgb(code: str) -> list[int]:
    return [int(code[i : i + 2], 16) for i in (1, 3, 5)]


def table(*, signed: bool) -> UInt8[np.ndarray, "255 3"]:
    """The colour table: from 0 to 1 for unsigned relevance, from -1 to 1 for signed."""
    anchors = np.array([_rgb(code) for code in (_SIGNED if signed else _UNSIGNED)])
    at = np.linspace(0, _STEPS - 1, len(anchors))
    columns = [np.interp(np.arange(_STEPS), at, channel) for channel in anchors.T]
    return np.round(np.stack(columns, axis=-1)).astype(np.uint8)


def anchors(*, signed: bool = False) -> list[str]:
    """The colours between which the table's are straight lines, as CSS writes them."""
    return list(_SIGNED if signed else _UNSIGNED)


def scale(relevance: Shaped[np.ndarray, "..."]) -> float:
    """The largest absolute relevance: the value at the end of the colour table."""
    return float(np.max(np.abs(relevance), initial=0.0))


def normalise(relevance: Shaped[np.ndarray, "*s"], limit: float) -> Float[np.ndarray, "*s"]:
    """Relevance over `limit`, cut to [-1, 1]; zeros where the limit is zero."""
    values = np.asarray(relevance, np.float64)
    return np.zeros_like(values) if limit == 0 else np.clip(values / limit, -1, 1)


def colour(values: Float[np.ndarray, "*s"], *, signed: bool) -> UInt8[np.ndarray, "*s 3"]:
    """The colour of each value.

    Args:
      values: between -1 and 1 (signed) or 0 and 1, as `normalise` returns them; what lies
        outside gets the colour at that end.
      signed: which table.

    Returns:
      RGB, 0 to 255.
    """
    place = (values + 1) / 2 if signed else values
    steps = np.clip(np.round(place * (_STEPS - 1)), 0, _STEPS - 1).astype(int)
    return table(signed=signed)[steps]


def ink(background: UInt8[np.ndarray, "3"]) -> str:
    """Black or white, whichever is easier to read on the background.

    The better of the two has a contrast ratio of at least 4.5 on any colour (WCAG 2.2, 1.4.3).
    """
    # Contrast with black exceeds contrast with white from this luminance on:
    # (L + 0.05) / 0.05 = 1.05 / (L + 0.05).
    return "#000000" if luminance(background) > 0.1791 else "#ffffff"


def luminance(rgb: UInt8[np.ndarray, "3"]) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2, "relative luminance")."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def hex_code(rgb: UInt8[np.ndarray, "3"]) -> str:
    """A colour as CSS writes it, such as #f0803f."""
    return "#{:02x}{:02x}{:02x}".format(*(int(part) for part in rgb))


def gradient(*, signed: bool) -> str:
    """The colour table as a CSS gradient from left to right."""
    return f"linear-gradient(to right, {', '.join(_SIGNED if signed else _UNSIGNED)})"
