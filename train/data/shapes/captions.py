"""Five captions per scene, from a grammar with paraphrases. Every one is true.

"A red circle" says that there is at least one; a number ("two red circles") says that there are
exactly so many.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxrel.train.data.shapes.language import (
    NUMBERS,
    RELATIONS,
    Description,
    describe,
    with_article,
)
from jaxrel.train.data.shapes.scene import Object, pick, related_pairs

# {be} becomes "is" or "are". The first one, nothing, is what people type: it is drawn as often
# as all the others together.
OPENINGS = (
    "",
    "a picture of ",
    "an image with ",
    "a scene with ",
    "this picture shows ",
    "there {be} ",
    "we see ",
)
_SINGLE = (
    ("colour", "shape"),
    ("colour", "shape"),
    ("size", "colour", "shape"),
    ("shape",),
    ("colour",),
)
_COUNTED = (("colour",), ("shape",), ("size",), ("colour", "shape"))


@dataclasses.dataclass(frozen=True)
class Caption:
    """A true sentence about a scene.

    Attributes:
        kind: `"full"` (names every object with colour and shape), `"relation"`, `"count"` or
            `"single"`.
        text: the sentence, lower case.
        objects: indices of all objects it speaks of.
    """

    kind: Literal["full", "relation", "count", "single"]
    text: str
    objects: tuple[int, ...]


class _Body(NamedTuple):
    """A caption without its opening."""

    kind: Literal["full", "relation", "count", "single"]
    text: str
    objects: tuple[int, ...]
    plural: bool = False


def write_captions(rng: np.random.Generator, objects: tuple[Object, ...]) -> tuple[Caption, ...]:
    """Writes five captions: two full ones, a relation (where one is clear), a count, a single.

    Args:
        rng: source of randomness.
        objects: the scene.

    Returns:
        Five captions with different texts.
    """
    bodies = (
        _list_all(rng, objects),
        _relate_and_list(rng, objects) or _list_all(rng, objects),
        _relate(rng, objects) or _name_one(rng, objects),
        _count(rng, objects),
        _name_one(rng, objects),
    )
    captions: list[Caption] = []
    for body in bodies:
        taken = {caption.text for caption in captions}
        text = _open(rng, body)
        while text in taken:
            text = _open(rng, body)
        captions.append(Caption(body.kind, text, body.objects))
    return tuple(captions)


def _open(rng: np.random.Generator, body: _Body) -> str:
    opening = OPENINGS[0] if rng.random() < 0.5 else pick(rng, OPENINGS[1:])
    return opening.format(be="are" if body.plural else "is") + body.text


def _said(rng: np.random.Generator) -> tuple[str, ...]:
    return ("size", "colour", "shape") if rng.random() < 0.5 else ("colour", "shape")


def _items(
    rng: np.random.Generator, objects: Sequence[Object], said: tuple[str, ...]
) -> tuple[str, bool]:
    """A list such as "a red circle and two blue stars", and whether it begins with a plural."""
    counts = list(Counter(describe(thing, said) for thing in objects).items())
    counts = [counts[i] for i in rng.permutation(len(counts))]
    items = [_item(description, count) for description, count in counts]
    text = " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))
    return text, counts[0][1] > 1


def _item(description: Description, count: int) -> str:
    if count == 1:
        return with_article(description.text())
    return f"{NUMBERS[count]} {description.text(plural=True)}"


def _list_all(rng: np.random.Generator, objects: tuple[Object, ...]) -> _Body:
    text, plural = _items(rng, objects, _said(rng))
    return _Body("full", text, tuple(range(len(objects))), plural)


def _related_pair(
    rng: np.random.Generator, objects: tuple[Object, ...], said: tuple[str, ...]
) -> tuple[int, int, str] | None:
    """Two objects in a clear relation that the attributes said tell from all others."""
    counts = Counter(describe(thing, said) for thing in objects)
    unique = [i for i, thing in enumerate(objects) if counts[describe(thing, said)] == 1]
    pairs = related_pairs(objects, unique)
    return pick(rng, pairs) if pairs else None


def _relation_text(
    rng: np.random.Generator, first: Description, word: str, second: Description
) -> str:
    form = pick(rng, RELATIONS[word])
    return f"{with_article(first.text())} {form} {with_article(second.text())}"


def _relate(rng: np.random.Generator, objects: tuple[Object, ...]) -> _Body | None:
    said = _said(rng)
    pair = _related_pair(rng, objects, said)
    if pair is None:
        return None
    i, j, word = pair
    text = _relation_text(rng, describe(objects[i], said), word, describe(objects[j], said))
    return _Body("relation", text, (i, j))


def _relate_and_list(rng: np.random.Generator, objects: tuple[Object, ...]) -> _Body | None:
    said = _said(rng)
    pair = _related_pair(rng, objects, said)
    if pair is None:
        return None
    i, j, word = pair
    text = _relation_text(rng, describe(objects[i], said), word, describe(objects[j], said))
    rest = [thing for k, thing in enumerate(objects) if k not in (i, j)]
    if rest:
        text += ", with " + _items(rng, rest, said)[0]
    return _Body("full", text, tuple(range(len(objects))))


def _count(rng: np.random.Generator, objects: tuple[Object, ...]) -> _Body:
    counted = Counter(describe(thing, said) for said in _COUNTED for thing in objects)
    kinds = [description for description, count in counted.items() if count > 1]
    description = pick(rng, [Description(), *kinds])
    found = description.matches(objects)
    plural = len(found) > 1
    return _Body("count", f"{NUMBERS[len(found)]} {description.text(plural=plural)}", found, plural)


def _name_one(rng: np.random.Generator, objects: tuple[Object, ...]) -> _Body:
    description = describe(pick(rng, objects), pick(rng, _SINGLE))
    return _Body("single", with_article(description.text()), description.matches(objects))
