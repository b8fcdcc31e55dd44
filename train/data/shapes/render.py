"""Scenes as pixels: signed distances, anti-aliased over one pixel, painted back to front.

A shape is a function that gives, for points in its own frame, the signed distance to its outline
(negative inside; exact near the edges, which is all that anti-aliasing needs). In that frame the
circle around the object has radius 1 and v points up.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from jaxrel.train.data.shapes.scene import Background, Object

Points = Float32[np.ndarray, "rows columns"]

_ROOT_HALF = math.sqrt(0.5)


def _circle(u: Points, v: Points) -> Points:
    return np.hypot(u, v) - 0.9


def _square(u: Points, v: Points) -> Points:
    return np.maximum(abs(u), abs(v)) - _ROOT_HALF


def _triangle(u: Points, v: Points) -> Points:
    return np.maximum(-v, math.sqrt(0.75) * abs(u) + 0.5 * v) - 0.5


def _star(u: Points, v: Points) -> Points:
    # All ten edges are mirror images of the one from the tip (angle 0, radius 1) to the notch
    # (angle 36 degrees, radius 0.42).
    sector = math.pi / 5
    angle = abs((np.arctan2(u, v) + sector) % (2 * sector) - sector)
    radius = np.hypot(u, v)
    edge_x, edge_y = 0.42 * math.cos(sector) - 1, 0.42 * math.sin(sector)
    across = (radius * np.cos(angle) - 1) * edge_y - radius * np.sin(angle) * edge_x
    return across / math.hypot(edge_x, edge_y)


def _cross(u: Points, v: Points) -> Points:
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(u - 0.28, v - 0.95), np.maximum(u - 0.95, v - 0.28))


def _heart(u: Points, v: Points) -> Points:
    # A square on its corner, and a half disc on each of its two upper edges.
    u, v, half = abs(u), v + 0.2, 0.78
    square = (u + abs(v) - half) * _ROOT_HALF
    return np.minimum(square, np.hypot(u - half / 2, v - half / 2) - half * _ROOT_HALF)


def _diamond(u: Points, v: Points) -> Points:
    width = 0.58
    return (abs(u) + width * abs(v) - width) / math.hypot(1, width)


def _ring(u: Points, v: Points) -> Points:
    return abs(np.hypot(u, v) - 0.7) - 0.24


_OUTLINES: dict[str, Callable[[Points, Points], Points]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "diamond": _diamond,
    "ring": _ring,
}


def render(
    objects: tuple[Object, ...], background: Background, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], Bool[np.ndarray, "objects {size} {size}"]]:
    """Paints a scene.

    Args:
        objects: back to front.
        background: what lies behind them.
        size: side of the image in pixels.

    Returns:
        The image (RGB), and per object the pixels that show it: covered by at least half, and
        by no later object.
    """
    image = _paint_background(background, size)
    masks = np.zeros((len(objects), size, size), bool)
    for i, thing in enumerate(objects):
        window, coverage = _cover(thing, size)
        patch = image[window]
        patch += coverage[..., None] * (np.array(thing.rgb, np.float32) - patch)
        inside = coverage >= 0.5
        masks[(slice(i), *window)] &= ~inside
        masks[(i, *window)] = inside
    return np.rint(image).astype(np.uint8), masks


def _cover(thing: Object, size: int) -> tuple[tuple[slice, slice], Points]:
    """The window that holds the object, and how much of each of its pixels is covered."""
    rows, columns = (
        slice(
            max(math.floor((centre - thing.radius) * size) - 1, 0),
            math.ceil((centre + thing.radius) * size) + 1,
        )
        for centre in (thing.y, thing.x)
    )
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    right = (pixels[None, columns] - thing.x) / thing.radius
    up = (thing.y - pixels[rows, None]) / thing.radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    distance = _OUTLINES[thing.shape](cos * right + sin * up, cos * up - sin * right)
    return (rows, columns), np.clip(0.5 - distance * (thing.radius * size), 0, 1)


def _paint_background(background: Background, size: int) -> Float32[np.ndarray, "{size} {size} 3"]:
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along = cos * pixels[None, :] + sin * pixels[:, None]
    if background.kind == "gradient":
        share = 0.5 + along * _ROOT_HALF
    else:
        share = 0.5 + 0.5 * _texture(background, along, pixels)
    first = np.array(background.first, np.float32)
    second = np.array(background.second, np.float32)
    return first + share[..., None] * (second - first)


def _texture(
    background: Background, along: Points, pixels: Float32[np.ndarray, " pixels"]
) -> Points:
    """A pattern from -1 to 1."""
    pitch = 2 * math.pi * background.frequency
    if background.kind == "stripes":
        return np.clip(3 * np.sin(pitch * along + background.phase), -1, 1)
    # The next two are products of a function of the row and one of the column.
    row = np.sin(pitch * pixels + background.phase)[:, None]
    column = np.sin(pitch * pixels + background.angle)[None, :]
    if background.kind == "checks":
        return np.clip(6 * row * column, -1, 1)
    return 0.5 * (row * column + np.sin(pitch * along + background.phase))
