"""Questions with one right answer, balanced so that the words alone do not give it away.

Colours, shapes, sizes and mirror images are equally likely in scenes, so an answer that the
question does not mention is uniform. Yes-or-no questions are drawn by tossing the answer first,
or by tossing the order in which two things are named. How many: see `_count`. The balance holds
in the splits without bias.
"""

import dataclasses
from collections import Counter
from typing import Literal

import numpy as np

from jaxrel.train.data.shapes.language import (
    OPPOSITES,
    RELATIONS,
    Description,
    references,
    with_article,
)
from jaxrel.train.data.shapes.scene import (
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Attribute,
    Object,
    pick,
    related_pairs,
)

Kind = Literal["colour", "shape", "size", "count", "existence", "relation", "comparison"]

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "count": tuple(str(number) for number in range(MAX_OBJECTS + 1)),
    "existence": ("yes", "no"),
    "relation": ("yes", "no"),
    "comparison": ("yes", "no"),
}
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "colour": ("what colour is {}?", "which colour does {} have?"),
    "shape": ("what shape is {}?", "which shape does {} have?"),
    "size": ("is {} large or small?", "what size is {}?"),
    "count": ("how many {} are there?", "how many {} does the picture show?"),
    "existence": ("is there {}?", "does the picture show {}?", "can you see {}?"),
    "relation": ("is {} {} {}?", "does {} lie {} {}?"),
    "comparison": ("are there {} {} than {}?", "is {} {} than {}?"),
}
_MORE, _LARGER = TEMPLATES["comparison"]
AMOUNTS = ("more", "fewer")
EXTENTS = ("larger", "smaller")

_VALUES: dict[Attribute, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES}
# How many of a kind: 0, 1, 2 and 3 should be equally likely answers. 20% of the scenes have a
# group of two and 20% one of three. In nine of ten of those the group is asked about, otherwise
# (as where there is no group) a kind of which there is one or none, by a toss. Of the 60% without
# a group, a share s is asked at all: 0.2 * 0.9 = (0.4 * 0.1 + 0.6 * s) / 2 gives 8/15.
_ASK_ABOUT_GROUP = 0.9
_ASK_WITHOUT_GROUP = 8 / 15
_ASK_ABOUT_ALL = 0.25


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: what it asks for.
        text: the question, lower case, with its question mark.
        answer: the one right answer, one of `ANSWERS[kind]`.
        named: indices of the objects that each phrase of the question stands for, in the order
            of the phrases; none where what is asked for is not there.
    """

    kind: Kind
    text: str
    answer: str
    named: tuple[tuple[int, ...], ...]

    @property
    def objects(self) -> tuple[int, ...]:
        """Indices of all objects asked about, in the order in which they are named."""
        return tuple(index for phrase in self.named for index in phrase)


def ask_questions(
    rng: np.random.Generator, objects: tuple[Object, ...], repeated: Attribute
) -> tuple[Question, ...]:
    """Asks one question of each kind that the scene allows.

    Args:
        rng: source of randomness.
        objects: the scene.
        repeated: the attribute of which objects may form a group.

    Returns:
        At most seven questions. Colour, shape and size need an object that can be told from the
        others without the answer; a relation needs two objects in a clear relation; some scenes
        go without a count, for balance.
    """
    asked = (
        _attribute(rng, objects, "colour"),
        _attribute(rng, objects, "shape"),
        _attribute(rng, objects, "size"),
        _count(rng, objects, repeated),
        _existence(rng, objects),
        _relation(rng, objects),
        _comparison(rng, objects),
    )
    return tuple(question for question in asked if question)


def _the(rng: np.random.Generator, descriptions: tuple[Description, ...]) -> str:
    return "the " + pick(rng, descriptions).text()


def _named(
    objects: tuple[Object, ...], allowed: tuple[str, ...]
) -> dict[int, tuple[Description, ...]]:
    """The objects that can be told apart by the allowed attributes, and how."""
    found = {i: references(objects, i, allowed) for i in range(len(objects))}
    return {i: descriptions for i, descriptions in found.items() if descriptions}


def _attribute(
    rng: np.random.Generator,
    objects: tuple[Object, ...],
    kind: Literal["colour", "shape", "size"],
) -> Question | None:
    named = _named(objects, tuple(name for name in ("size", "colour", "shape") if name != kind))
    if not named:
        return None
    i = pick(rng, list(named))
    text = pick(rng, TEMPLATES[kind]).format(_the(rng, named[i]))
    return Question(kind, text, getattr(objects[i], kind), ((i,),))


def _count(
    rng: np.random.Generator, objects: tuple[Object, ...], repeated: Attribute
) -> Question | None:
    if rng.random() < _ASK_ABOUT_ALL:
        description = Description()
    else:
        value = _counted_value(rng, [getattr(thing, repeated) for thing in objects], repeated)
        if value is None:
            return None
        description = Description(**{repeated: value})
    text = pick(rng, TEMPLATES["count"]).format(description.text(plural=True))
    found = description.matches(objects)
    return Question("count", text, str(len(found)), (found,))


def _counted_value(rng: np.random.Generator, values: list[str], attribute: Attribute) -> str | None:
    counts = Counter(values)
    groups = [value for value in counts if counts[value] > 1]
    if groups and rng.random() < _ASK_ABOUT_GROUP:
        return pick(rng, groups)
    if not groups and rng.random() >= _ASK_WITHOUT_GROUP:
        return None
    single = [value for value in counts if counts[value] == 1]
    absent = [value for value in _VALUES[attribute] if value not in counts]
    return pick(rng, single if single and rng.random() < 0.5 else absent)


def _existence(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question:
    exists = rng.random() < 0.5
    thing = pick(rng, objects)
    if exists:
        description = Description(colour=thing.colour, shape=thing.shape)
    else:
        description = _absent_variant(rng, objects, thing)
    text = pick(rng, TEMPLATES["existence"]).format(with_article(description.text()))
    answer = "yes" if exists else "no"
    return Question("existence", text, answer, (description.matches(objects),))


def _absent_variant(
    rng: np.random.Generator, objects: tuple[Object, ...], thing: Object
) -> Description:
    """Shares the colour or the shape with an object, so that seeing one of them is not enough."""
    if rng.random() < 0.5:
        variants = [Description(colour=colour, shape=thing.shape) for colour in COLOURS]
    else:
        variants = [Description(colour=thing.colour, shape=shape) for shape in SHAPES]
    return pick(rng, [variant for variant in variants if not variant.matches(objects)])


def _relation(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question | None:
    named = _named(objects, ("size", "colour", "shape"))
    pairs = related_pairs(objects, list(named))
    if not pairs:
        return None
    i, j, word = pick(rng, pairs)
    holds = rng.random() < 0.5
    form = pick(rng, RELATIONS[word if holds else OPPOSITES[word]])
    text = pick(rng, TEMPLATES["relation"]).format(_the(rng, named[i]), form, _the(rng, named[j]))
    return Question("relation", text, "yes" if holds else "no", ((i,), (j,)))


def _comparison(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question:
    compare_extents = rng.random() < 0.5
    return (_compare_extents(rng, objects) if compare_extents else None) or _compare_amounts(
        rng, objects
    )


def _compare_extents(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question | None:
    named = _named(objects, ("colour", "shape"))
    pairs = [(i, j) for i in named for j in named if objects[i].size != objects[j].size]
    if not pairs:
        return None
    i, j = pick(rng, pairs)
    word = pick(rng, EXTENTS)
    text = _LARGER.format(_the(rng, named[i]), word, _the(rng, named[j]))
    holds = (objects[i].size == "large") == (word == "larger")
    return Question("comparison", text, "yes" if holds else "no", ((i,), (j,)))


def _compare_amounts(rng: np.random.Generator, objects: tuple[Object, ...]) -> Question:
    attribute: Attribute = pick(rng, ("colour", "shape"))
    values = [getattr(thing, attribute) for thing in objects]
    value = pick(rng, values)
    others = [other for other in _VALUES[attribute] if values.count(other) != values.count(value)]
    pair = [value, pick(rng, others)]
    if rng.random() < 0.5:
        pair.reverse()
    word = pick(rng, AMOUNTS)
    first, second = (Description(**{attribute: name}) for name in pair)
    text = _MORE.format(word, first.text(plural=True), second.text(plural=True))
    more = values.count(pair[0]) > values.count(pair[1])
    answer = "yes" if more == (word == "more") else "no"
    return Question("comparison", text, answer, (first.matches(objects), second.matches(objects)))
