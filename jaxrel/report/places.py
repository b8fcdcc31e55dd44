"""Where relevance lies, in words: what a map and a line of words say to who cannot see them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Real

from jaxrel.report import texts
from jaxrel.report.panels import Panel

_ROWS, _COLUMNS = ("upper", "", "lower"), ("left", "", "right")

# Single pixels say little of where relevance lies: larger maps are averaged to this many cells.
_CELLS = 8


def pool(values: Real[np.ndarray, "rows columns"], cells: int) -> Float[np.ndarray, "_ _"]:
    """A map as means of equal areas, with at most so many cells on a side."""
    rows, columns = (_means(side, min(cells, side)) for side in values.shape)
    return rows @ np.asarray(values, np.float64) @ columns.T


def _means(side: int, parts: int) -> Float[np.ndarray, "{parts} {side}"]:
    """The share of each of `side` pixels in the mean of each of `parts` equal stretches."""
    edges = np.arange(parts + 1) * side / parts
    inside = np.minimum(edges[1:, None], np.arange(1, side + 1))
    inside -= np.maximum(edges[:-1, None], np.arange(side))
    return np.maximum(inside, 0) * parts / side


def place(values: Real[np.ndarray, "rows columns"]) -> str:
    """In which of nine parts of the image the largest value is: "upper right", "centre", ..."""
    pooled = pool(values, _CELLS)
    row, column = np.unravel_index(int(pooled.argmax()), pooled.shape)
    thirds = [3 * (2 * i + 1) // (2 * n) for i, n in zip((row, column), pooled.shape, strict=True)]
    return f"{_ROWS[thirds[0]]} {_COLUMNS[thirds[1]]}".strip() or "centre"


def summary(panel: Panel) -> str:
    """Where a panel's relevance lies: "most relevant: upper right, word 'red'"."""
    parts = []
    if panel.map is not None and (found := _extreme(panel.map.ravel().tolist())):
        sign, _ = found
        against = "" if sign > 0 else " (against)"
        parts.append(f"{place(sign * np.asarray(panel.map, np.float64))}{against}")
    if panel.words and (found := _extreme([value for _, value in panel.words])):
        sign, at = found
        against = "" if sign > 0 else " (against)"
        parts.append(f"word '{texts.clean(panel.words[at][0])}'{against}")
    return f"most relevant: {', '.join(parts)}" if parts else "no relevance anywhere"


def _extreme(values: Sequence[float]) -> tuple[int, int] | None:
    """The sign and index of the most relevant value: the largest one, if any is positive."""
    largest = max(values, default=0.0)
    if largest > 0:
        return 1, values.index(largest)
    smallest = min(values, default=0.0)
    return (-1, values.index(smallest)) if smallest < 0 else None
