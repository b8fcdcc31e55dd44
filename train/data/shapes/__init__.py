"""Shapes: procedural scenes with captions, questions, boxes and masks."""

from jaxrel.train.data.shapes.biased import COLOUR_PAIRS, PAIR_RATES, SHAPE_PAIRS
from jaxrel.train.data.shapes.captions import Caption
from jaxrel.train.data.shapes.dataset import SPLITS, Scene, Shapes, answers, vocabulary
from jaxrel.train.data.shapes.language import words
from jaxrel.train.data.shapes.questions import ANSWERS, Question
from jaxrel.train.data.shapes.scene import (
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Background,
    Object,
    relation,
)

__all__ = [
    "ANSWERS",
    "COLOURS",
    "COLOUR_PAIRS",
    "MAX_OBJECTS",
    "PAIR_RATES",
    "SHAPES",
    "SHAPE_PAIRS",
    "SIZES",
    "SPLITS",
    "Background",
    "Caption",
    "Object",
    "Question",
    "Scene",
    "Shapes",
    "answers",
    "relation",
    "vocabulary",
    "words",
]
