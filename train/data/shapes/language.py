"""Noun phrases: how captions and questions speak of objects."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxrel.train.data.shapes.scene import Object

NUMBERS = ("zero", "one", "two", "three", "four", "five")

# Every word of a relation, in the forms that sentences use.
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Description(NamedTuple):
    """What is said of an object; None where nothing is said."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def text(self, *, plural: bool = False) -> str:
        """The noun phrase without an article: `"large red circle"`, `"small objects"`."""
        noun = self.shape or "object"
        words = (self.size, self.colour, pluralise(noun) if plural else noun)
        return " ".join(word for word in words if word)

    def matches(self, objects: Sequence[Object]) -> tuple[int, ...]:
        """The indices of the objects of which everything said is true."""
        return tuple(
            i
            for i, thing in enumerate(objects)
            if self.size in (None, thing.size)
            and self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
        )


def pluralise(noun: str) -> str:
    """The plural of a shape, or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(noun_phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def describe(thing: Object, said: Sequence[str]) -> Description:
    """Describes an object.

    Args:
        thing: the object.
        said: the attributes to name, of `"size"`, `"colour"`, `"shape"`.

    Returns:
        The description.
    """
    return Description(**{name: getattr(thing, name) for name in said})


def references(
    objects: Sequence[Object], index: int, allowed: Sequence[str]
) -> tuple[Description, ...]:
    """All descriptions that are true of one object of the scene and of no other.

    Args:
        objects: the scene.
        index: the object meant.
        allowed: the attributes that may be named.

    Returns:
        The descriptions, the shortest first; empty where the object cannot be told apart.
    """
    subsets = itertools.chain.from_iterable(
        itertools.combinations(allowed, length) for length in range(len(allowed) + 1)
    )
    found = (describe(objects[index], said) for said in subsets)
    return tuple(description for description in found if description.matches(objects) == (index,))


def words(text: str) -> list[str]:
    """The words of a sentence: lower case, without punctuation.

    Args:
        text: any sentence.

    Returns:
        Its words in order.
    """
    return re.findall("[a-z]+", text.lower())
