"""What a scene is made of, and how it is drawn by chance.

Lengths and positions are shares of the image's side, so a scene is the same at any resolution.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
COLOURS = {
    "red": (214, 36, 40),
    "green": (30, 155, 55),
    "blue": (35, 75, 215),
    "yellow": (245, 222, 35),
    "orange": (250, 130, 10),
    "purple": (125, 40, 170),
    "cyan": (30, 205, 215),
    "pink": (255, 130, 200),
}
# The radius of the circle around the object. The ranges lie well apart, so that the two words
# are never a matter of taste.
SIZES = {"small": (0.09, 0.11), "large": (0.15, 0.18)}
MAX_OBJECTS = 5
MAX_ANGLE = math.radians(15)
COLOUR_JITTER = 12

# The circles around two objects may overlap by at most this share of the smaller radius, and an
# object takes part in at most one overlap. Even a straight cut that deep leaves 69% of a ring, and
# at least 76% of any other shape; what lies on top stays within its own circle and takes less.
MAX_OVERLAP = 0.6

# The odds of one, two or three objects sharing the repeated attribute, by the number of objects.
# Over all scenes there is a group of two with probability 0.2, and one of three with 0.2, which
# is what lets the answers of count questions be balanced (see questions.py).
_GROUP_ODDS = {
    1: (1.0,),
    2: (1 / 2, 1 / 2),
    3: (1 / 2, 1 / 6, 1 / 3),
    4: (1 / 2, 1 / 6, 1 / 3),
    5: (1 / 2, 1 / 6, 1 / 3),
}

# One centre lies above another when it is at least this much higher, and the vertical distance
# is at least this many times the horizontal one.
_RELATION_DISTANCE = 0.15
_RELATION_DOMINANCE = 1.25

BACKGROUNDS = ("gradient", "stripes", "checks", "waves")

T = TypeVar("T")
Attribute = Literal["colour", "shape"]


@dataclasses.dataclass(frozen=True)
class Object:
    """One object of a scene.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: `"small"` or `"large"`.
        x: centre, as a share of the image's side, from the left.
        y: centre, from the top.
        radius: radius of the circle around the object, as a share of the image's side.
        angle: rotation in radians, at most `MAX_ANGLE` either way.
        rgb: the colour as painted, 0 to 255: that of the name, give or take `COLOUR_JITTER`.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Background:
    """A gradient or a texture that mixes two near-greys, so that it is never an object's colour.

    Attributes:
        kind: one of `BACKGROUNDS`.
        first: one colour, RGB from 0 to 255.
        second: the other.
        angle: direction in radians.
        frequency: periods per image, for textures.
        phase: in radians, for textures.
    """

    kind: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float
    frequency: float
    phase: float


class Attributes(NamedTuple):
    """The words of a scene before anything has a place; entry i belongs to object i."""

    shapes: list[str]
    colours: list[str]
    sizes: list[str]
    repeated: Attribute


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Returns one of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def draw_attributes(rng: np.random.Generator, *, least: int = 1) -> Attributes:
    """Draws how many objects there are (uniformly) and what they are.

    One attribute, colour or shape, is the repeated one: a group of one to three objects shares
    a value and the others all differ. The other attribute is free: uniform and independent. So
    is the size.

    Args:
        rng: source of randomness.
        least: smallest number of objects.

    Returns:
        The attributes of `least` to `MAX_OBJECTS` objects.
    """
    count = int(rng.integers(least, MAX_OBJECTS + 1))
    repeated: Attribute = "colour" if rng.random() < 0.5 else "shape"
    if repeated == "colour":
        colours, shapes = _grouped(rng, tuple(COLOURS), count), _free(rng, SHAPES, count)
    else:
        colours, shapes = _free(rng, tuple(COLOURS), count), _grouped(rng, SHAPES, count)
    return Attributes(shapes, colours, _free(rng, tuple(SIZES), count), repeated)


def _free(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    return [options[i] for i in rng.integers(len(options), size=count)]


def _grouped(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    bounds = np.cumsum(_GROUP_ODDS[count])
    group = min(int(np.searchsorted(bounds, rng.random(), side="right")) + 1, len(bounds))
    different = [options[i] for i in rng.permutation(len(options))[: count - group + 1]]
    values = different[:1] * group + different[1:]
    return [values[i] for i in rng.permutation(count)]


def draw_objects(rng: np.random.Generator, attributes: Attributes) -> tuple[Object, ...]:
    """Gives every object its place, exact size, rotation and exact colour.

    Args:
        rng: source of randomness.
        attributes: what the objects are.

    Returns:
        The objects; a later one is painted over an earlier one.
    """
    count = len(attributes.shapes)
    radii = [float(rng.uniform(*SIZES[size])) for size in attributes.sizes]
    # Radii stay as they are when there is no room: drawing them again would make small objects
    # more likely than large ones.
    while (centres := _place(rng, radii)) is None:
        pass
    angles = rng.uniform(-MAX_ANGLE, MAX_ANGLE, count).tolist()
    named = np.array([COLOURS[colour] for colour in attributes.colours])
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, named.shape)
    painted = np.clip(named + jitter, 0, 255).tolist()
    return tuple(
        Object(
            shape=attributes.shapes[i],
            colour=attributes.colours[i],
            size=attributes.sizes[i],
            x=centres[i][0],
            y=centres[i][1],
            radius=radii[i],
            angle=angles[i],
            rgb=tuple(painted[i]),
        )
        for i in range(count)
    )


def _place(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]] | None:
    """One attempt to place circles of these radii; None where one finds no room in 20 tries."""
    centres: list[tuple[float, float]] = []
    overlapped: set[int] = set()
    for radius in radii:
        low, span = radius + 0.01, 0.98 - 2 * radius
        for u, v in rng.random((20, 2)).tolist():
            centre = (low + span * u, low + span * v)
            overlaps = _overlaps(centre, radius, centres, radii)
            if overlaps is None or len(overlaps) > 1 or overlapped & overlaps:
                continue
            if overlaps:
                overlapped |= overlaps | {len(centres)}
            centres.append(centre)
            break
        else:
            return None
    return centres


def _overlaps(
    centre: tuple[float, float],
    radius: float,
    others: list[tuple[float, float]],
    radii: list[float],
) -> set[int] | None:
    """Which circles a new one overlaps; None where it goes deeper than allowed."""
    found = set()
    for i, other in enumerate(others):
        depth = radius + radii[i] - math.dist(centre, other)
        if depth > MAX_OVERLAP * min(radius, radii[i]):
            return None
        if depth > 0:
            found.add(i)
    return found


def draw_background(rng: np.random.Generator) -> Background:
    """Draws a background: two near-greys and a way to mix them.

    Args:
        rng: source of randomness.

    Returns:
        The background. Its colours' channels differ by at most 30, those of an object by at
        least 100.
    """
    level = rng.uniform(60, 195)
    contrast = rng.uniform(15, 45) * (1 if rng.random() < 0.5 else -1)
    tint = rng.uniform(-15, 15, 3)
    first = tuple((level + tint).tolist())
    second = tuple((level + tint + contrast).tolist())
    kind = pick(rng, BACKGROUNDS)
    angle, phase = rng.uniform(0, 2 * math.pi, 2).tolist()
    return Background(kind, first, second, angle, float(rng.uniform(2.5, 7)), phase)


def relation(first: Object, second: Object) -> str | None:
    """How the first object's centre lies to the second's.

    Args:
        first: the object spoken of.
        second: the object it is compared with.

    Returns:
        `"left of"`, `"right of"`, `"above"` or `"below"`; None where no word is clearly right
        (centres too close, or on a diagonal).
    """
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < _RELATION_DISTANCE:
        return None
    if abs(dx) >= _RELATION_DOMINANCE * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= _RELATION_DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def related_pairs(objects: Sequence[Object], indices: Sequence[int]) -> list[tuple[int, int, str]]:
    """All ordered pairs of objects in a clear relation.

    Args:
        objects: the scene.
        indices: the objects to consider.

    Returns:
        (first, second, how the first lies to the second), in the order of the indices.
    """
    return [
        (i, j, word) for i in indices for j in indices if (word := relation(objects[i], objects[j]))
    ]
