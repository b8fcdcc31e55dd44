"""Images and maps as the page carries them: small, and as text."""

import base64
import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Real, UInt8
from PIL import Image

from jaxrel.report import colours
from jaxrel.report.heat import hatched, pale, png
from jaxrel.report.places import pool

# A photograph is sent no larger than it is shown beside its map, and smaller below the heat.
_LONGEST, _LONGEST_BELOW = 640, 400
# Up to this many cells a map is sent as it is; larger ones are rounded to 8 bits.
_EXACT = 1024
# Characters of all maps of one image, by the size of its largest map: 64 x 64 pixels must fit
# into a page of 300 kB, and 15 words of 224 x 224 into one of 1.5 MB.
_PER_CELL, _MOST = 40, 1_000_000
# Cells and pixels on a side of a map that is shown without script.
_STILL_CELLS, _STILL = 24, 96


def photograph(image: UInt8[np.ndarray, "_ _ 3"]) -> str:
    """An image as a data URL: PNG where that is smaller, else JPEG."""
    return _image(_thumbnail(image, _LONGEST))


def below(image: UInt8[np.ndarray, "_ _ 3"]) -> str:
    """The image as `heat.pale` draws it below the heat, as a data URL."""
    small = np.asarray(_thumbnail(image, _LONGEST_BELOW))
    return _image(Image.fromarray(np.round(255 * pale(small)).astype(np.uint8)))


def _thumbnail(image: UInt8[np.ndarray, "_ _ 3"], longest: int) -> Image.Image:
    drawn = Image.fromarray(image)
    drawn.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return drawn


def _image(drawn: Image.Image) -> str:
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=85, optimize=True)
    lossless, lossy = png(drawn), buffer.getvalue()
    small = len(lossless) <= max(len(lossy), 16_000)
    return _url("png", lossless) if small else _url("jpeg", lossy)


def still(values: Real[np.ndarray, "rows columns"], *, signed: bool) -> str:
    """The colours of a map as a PNG, to be laid over its image; negative parts are hatched."""
    if max(values.shape) > _STILL_CELLS:
        values = pool(values, _STILL_CELLS)
    limit = colours.scale(values)
    times = max(1, _STILL // max(values.shape))
    shown = np.kron(colours.normalise(values, limit), np.ones((times, times)))
    drawn = hatched(colours.colour(shown, signed=signed), shown)
    return _url("png", png(Image.fromarray(drawn).quantize(64)))


def maps(values: Sequence[Real[np.ndarray, "_ _"] | None]) -> list[dict[str, Any] | None]:
    """All maps of one image as what JSON holds; averaged over blocks where they are too many.

    Returns:
      By map: "shape" and "own" (the method's shape), "limit" (the largest absolute value),
      "data" (base64 of zlib's stream) and "bits": 32 for float32, 8 for an int8 times limit / 127.
      None for None.
    """
    given = [None if one is None else np.asarray(one) for one in values]
    cells = max((one.size for one in given if one is not None), default=0)
    budget = min(_MOST, max(20_000, _PER_CELL * cells))
    side = max((max(one.shape) for one in given if one is not None), default=0)
    while True:
        found = [None if one is None else _map(one, side) for one in given]
        if side <= _CELLS_LEFT or sum(len(one["data"]) for one in found if one) <= budget:
            return found
        side -= side // 8


_CELLS_LEFT = 16


def _map(values: np.ndarray, side: int) -> dict[str, Any]:
    limit = colours.scale(values)
    sent = pool(values, side) if max(values.shape) > side else values
    if values.size <= _EXACT:
        bits, data = 32, np.asarray(sent, "<f4").tobytes()
    else:
        steps = np.round(127 * colours.normalise(sent, limit))
        bits, data = 8, steps.astype(np.int8).tobytes()
    return {
        "shape": list(sent.shape),
        "own": list(values.shape),
        "limit": limit,
        "bits": bits,
        "data": base64.b64encode(zlib.compress(data, 9)).decode(),
    }


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
