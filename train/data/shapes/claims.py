"""What a caption claims about a scene of Shapes, and whether it is true.

Made for captions that a model wrote in the words of the grammar: words it does not know are
skipped, and no text is an error.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrel.train.data.shapes.dataset import Scene
from jaxrel.train.data.shapes.language import NUMBERS, RELATIONS, Description, pluralise
from jaxrel.train.data.shapes.scene import COLOURS, SHAPES, SIZES, Object, related_pairs


class Claim(NamedTuple):
    """An object, or a number of like objects, that a caption says is there.

    Attributes:
      description: what is said of it.
      number: the one stated; None where at least one is meant ("a red circle").
    """

    description: Description
    number: int | None = None


class Relation(NamedTuple):
    """Where a caption says that one object lies.

    Attributes:
      first: the object spoken of.
      word: `"left of"`, `"right of"`, `"above"` or `"below"`.
      second: the object it is compared with.
    """

    first: Claim
    word: str
    second: Claim


_FORMS = {form: word for word, forms in RELATIONS.items() for form in forms}
_NOUNS: dict[str, str | None] = {"object": None, "objects": None}
_NOUNS |= {form: shape for shape in SHAPES for form in (shape, pluralise(shape))}
_NUMBERS = {"no": 0} | {word: i for i, word in enumerate(NUMBERS)}
# What was said of an object ends here, where no noun has come: "a red and a blue circle".
_BREAKS = {"a", "an", "the", "of", "and", "with", "is", "are", *_NUMBERS, *_FORMS}
# Where a new part of a list begins, whose first object is in no relation to the last.
_PARTS = {"and", "with"}
# A relation of several words is one token; the longer form goes first.
_TOKEN = re.compile(rf"\b(?:{'|'.join(sorted(_FORMS, key=len, reverse=True))})\b|[a-z]+")


def claims(text: str) -> tuple[Claim, ...]:
    """What a caption says is there, in the order in which it says so.

    A claim ends with its noun: a shape or "object". Of two colours or sizes before one noun the
    last counts. Not read: what follows the noun ("a circle that is red"), what is denied ("no
    circle"), and numbers other than the words zero to five.

    Args:
      text: any text.

    Returns:
      The claims; empty where there are none.
    """
    return _read(text)[0]


def relations(text: str) -> tuple[Relation, ...]:
    """The relations that a caption states between neighbouring claims.

    Args:
      text: any text.

    Returns:
      The relations; empty where there are none.
    """
    return _read(text)[1]


def true_of(claim: Claim, objects: Sequence[Object]) -> bool:
    """Whether some object of a scene is as described; a stated number is not looked at.

    Args:
      claim: what is said.
      objects: the scene.
    """
    return bool(claim.description.matches(objects))


def count_right(claim: Claim, objects: Sequence[Object]) -> bool:
    """Whether exactly as many objects are as described as was stated.

    Args:
      claim: what is said; without a number, at least one is right.
      objects: the scene.
    """
    found = len(claim.description.matches(objects))
    return found > 0 if claim.number is None else found == claim.number


def relation_true(relation: Relation, objects: Sequence[Object]) -> bool:
    """Whether two objects as described clearly lie so, by the rule of the captions (`relation`).

    Args:
      relation: what is said.
      objects: the scene.
    """
    first = relation.first.description.matches(objects)
    second = relation.second.description.matches(objects)
    pairs = related_pairs(objects, range(len(objects)))
    return any(i in first and j in second and word == relation.word for i, j, word in pairs)


def facts(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Int[np.ndarray, " captions"]]:
    """Counts per caption of what is claimed and what of it is true.

    All are counts, so that shares can be taken over captions, and intervals by resampling
    captions: `facts["true"].sum() / facts["stated"].sum()`.

    Args:
      texts: captions, one per scene.
      scenes: the scene of each; for several captions of a scene give it several times.

    Returns:
      Arrays `[captions]`: `"stated"` objects (one per claim, whatever its number), of these
      `"true"` (some object is as described) and `"hallucinated"` (none is); `"coloured"`, the
      claims with colour and shape, and `"coloured_true"`; `"counted"`, the claims with a number,
      and `"counted_true"`; `"related"`, the relations, and `"related_true"`; `"objects"` of the
      scene, and `"mentioned"`, those that fit a claim. The share of the scene that is mentioned
      is `"mentioned"` / `"objects"`.

    Raises:
      ValueError: the numbers of captions and scenes differ.
    """
    if len(texts) != len(scenes):
        raise ValueError(
            f"facts: {len(texts)} captions and {len(scenes)} scenes; give one scene per caption"
        )
    rows = [_facts(text, scene.objects) for text, scene in zip(texts, scenes, strict=True)]
    return {name: np.array([row[name] for row in rows], int) for name in _facts("", ())}


def _facts(text: str, objects: Sequence[Object]) -> dict[str, int]:
    stated, related = _read(text)
    true = [claim for claim in stated if true_of(claim, objects)]
    counted = [claim for claim in stated if claim.number is not None]
    return {
        "stated": len(stated),
        "true": len(true),
        "hallucinated": len(stated) - len(true),
        "coloured": sum(map(_coloured, stated)),
        "coloured_true": sum(map(_coloured, true)),
        "counted": len(counted),
        "counted_true": sum(count_right(claim, objects) for claim in counted),
        "related": len(related),
        "related_true": sum(relation_true(relation, objects) for relation in related),
        "objects": len(objects),
        "mentioned": len({i for claim in true for i in claim.description.matches(objects)}),
    }


def _coloured(claim: Claim) -> bool:
    return None not in (claim.description.colour, claim.description.shape)


def _read(text: str) -> tuple[tuple[Claim, ...], tuple[Relation, ...]]:
    found: list[Claim] = []
    related: list[Relation] = []
    # Of the phrase that is open: what was said, the number, and where it lies to the claim before.
    said: dict[str, str] = {}
    number: int | None = None
    word: str | None = None
    before: Claim | None = None
    for token in _TOKEN.findall(text.lower()):
        if token in SIZES:
            said["size"] = token
        elif token in COLOURS:
            said["colour"] = token
        elif token in _BREAKS:
            said, number, word = {}, _NUMBERS.get(token), _FORMS.get(token, word)
            before = None if token in _PARTS else before
        elif token in _NOUNS:
            claim = Claim(Description(**said, shape=_NOUNS[token]), number)
            denied = number == 0
            if not denied:
                found.append(claim)
            if not denied and before and word:
                related.append(Relation(before, word, claim))
            before = None if denied else claim
            said, number, word = {}, None, None
    return tuple(found), tuple(related)
