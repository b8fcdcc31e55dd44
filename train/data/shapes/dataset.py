"""The data set: scenes as pure functions of (seed, split, index)."""

import dataclasses
import functools
import operator
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from jaxrel.train.data.shapes import captions as _captions
from jaxrel.train.data.shapes import questions as _questions
from jaxrel.train.data.shapes.biased import PAIR_RATES, bias
from jaxrel.train.data.shapes.captions import Caption, write_captions
from jaxrel.train.data.shapes.language import NUMBERS, RELATIONS, pluralise, words
from jaxrel.train.data.shapes.questions import ANSWERS, Question, ask_questions
from jaxrel.train.data.shapes.render import render
from jaxrel.train.data.shapes.scene import (
    COLOURS,
    SHAPES,
    SIZES,
    Attribute,
    Background,
    Object,
    draw_attributes,
    draw_background,
    draw_objects,
)

# A scene is drawn by the number of its split: new splits come last.
SPLITS = ("train", "val", "test", "biased_train", "biased_test", "biased_val")
MIN_SIZE, MAX_SIZE = 32, 2048

# Seeds and indices are hashed as words of 32 bits: larger ones could collide.
_LIMIT = 2**32
# What a scene draws, each from its own stream, so that a change to one leaves the others alone.
_LAYOUT, _CAPTIONS, _QUESTIONS = range(3)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene. Pixels and sentences are made when first asked for.

    Attributes:
        seed: of the data set.
        split: one of `SPLITS`.
        index: number in the split.
        size: side of the image in pixels.
        objects: back to front.
        background: what lies behind them.
        repeated: the attribute of which two or three objects may share a value; the others
            differ in it (splits without bias).
    """

    seed: int
    split: str
    index: int
    size: int
    objects: tuple[Object, ...]
    background: Background
    repeated: Attribute

    @functools.cached_property
    def _pixels(
        self,
    ) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "objects height width"]]:
        image, masks = render(self.objects, self.background, self.size)
        for array in (image, masks):
            array.flags.writeable = False
        return image, masks

    @property
    def image(self) -> UInt8[np.ndarray, "height width 3"]:
        """The image, RGB, 0 to 255, read-only."""
        return self._pixels[0]

    @property
    def masks(self) -> Bool[np.ndarray, "objects height width"]:
        """Per object, the pixels that show it. Masks do not overlap."""
        return self._pixels[1]

    @functools.cached_property
    def boxes(self) -> Float32[np.ndarray, "objects 4"]:
        """Per object, the box around its mask: left, top, width, height in pixels (as COCO)."""
        return np.array([_box(mask) for mask in self.masks], np.float32)

    @functools.cached_property
    def captions(self) -> tuple[Caption, ...]:
        """Five true captions; the first two name every object."""
        return write_captions(self._rng(_CAPTIONS), self.objects)

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most one question of each of the seven kinds."""
        return ask_questions(self._rng(_QUESTIONS), self.objects, self.repeated)

    def _rng(self, *stream: int) -> np.random.Generator:
        return _rng(self.seed, self.split, self.index, *stream)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Procedural scenes of one to five objects with captions and questions.

    Scene i of split s is a pure function of (seed, s, i) at any size: nothing is stored, and
    every split goes on as long as anyone asks.

    Attributes:
        seed: from 0 to 2**32 - 1.
        size: side of the images in pixels, 32 to 2048.

    Raises:
        ValueError: the seed or the size is out of range.
    """

    seed: int = 0
    size: int = 64

    def __post_init__(self):
        _checked("seed", self.seed)
        if not MIN_SIZE <= operator.index(self.size) <= MAX_SIZE:
            raise ValueError(
                f"Shapes: size is {self.size}; expected {MIN_SIZE} to {MAX_SIZE} pixels. Smaller "
                "images do not tell the shapes apart; render at 64 and resize."
            )

    def scene(self, split: str, index: SupportsIndex) -> Scene:
        """Makes one scene.

        Args:
            split: one of `SPLITS`.
            index: number in the split, from 0 to 2**32 - 1.

        Returns:
            The scene.

        Raises:
            ValueError: no such split, or the index is out of range.
        """
        if split not in SPLITS:
            raise ValueError(f"Shapes: split is {split!r}; expected one of {', '.join(SPLITS)}.")
        index = _checked("index", index)
        rng = _rng(self.seed, split, index, _LAYOUT)
        rate = PAIR_RATES.get(split)
        if rate is None:
            attributes = draw_attributes(rng)
        else:
            attributes = bias(rng, draw_attributes(rng, least=2), rate)
        objects, background = draw_objects(rng, attributes), draw_background(rng)
        return Scene(self.seed, split, index, self.size, objects, background, attributes.repeated)


def vocabulary() -> tuple[str, ...]:
    """Every word that captions and questions can contain, sorted; split texts with `words`."""
    sentences = (
        *_captions.OPENINGS,
        *(template for templates in _questions.TEMPLATES.values() for template in templates),
        *(form for forms in RELATIONS.values() for form in forms),
        *_questions.AMOUNTS,
        *_questions.EXTENTS,
    )
    grammar = {word for sentence in sentences for word in words(sentence.replace("{be}", ""))}
    grammar |= {"a", "an", "and", "are", "is", "object", "objects", "the", "with"}
    nouns = {*SHAPES, *(pluralise(shape) for shape in SHAPES)}
    # Captions never speak of what is not there: no "zero".
    return tuple(sorted(grammar | nouns | {*COLOURS, *SIZES, *NUMBERS[1:]}))


def answers() -> tuple[str, ...]:
    """Every answer that questions can have, each once, grouped by kind."""
    return tuple(dict.fromkeys(answer for kind in ANSWERS.values() for answer in kind))


def _rng(seed: int, split: str, index: int, *stream: int) -> np.random.Generator:
    # The stream's first number says what is drawn. SeedSequence does not tell apart two lists
    # of numbers that differ by zeros at the end; the length ends this one.
    entropy = (seed, SPLITS.index(split), index, *stream, 3 + len(stream))
    return np.random.default_rng(np.random.SeedSequence(entropy))


def _checked(name: str, value: SupportsIndex) -> int:
    number = operator.index(value)
    if not 0 <= number < _LIMIT:
        raise ValueError(f"Shapes: {name} is {number}; expected 0 to {_LIMIT - 1} (2**32 - 1).")
    return number


def _box(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left, top = columns[0], rows[0]
    return int(left), int(top), int(columns[-1] - left + 1), int(rows[-1] - top + 1)
