"""Claims of captions: the grammar's own are all true, and what is wrong is found wrong."""

import numpy as np
import pytest

from jaxrel.train.data.shapes import Background, Object, Scene, Shapes, words
from jaxrel.train.data.shapes.claims import (
    Claim,
    Relation,
    claims,
    count_right,
    facts,
    relation_true,
    relations,
    true_of,
)
from jaxrel.train.data.shapes.language import Description

DATA = Shapes()
KINDS = ("coloured", "counted", "related")


def thing(size, colour, shape, x, y):
    return Object(shape, colour, size, x, y, 0.1, 0.0, (0, 0, 0))


# A star on the left, two red circles one above the other on the right.
OBJECTS = (
    thing("small", "blue", "star", 0.2, 0.5),
    thing("large", "red", "circle", 0.8, 0.2),
    thing("small", "red", "circle", 0.8, 0.8),
)
GREY = Background("gradient", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 1.0, 0.0)
SCENE = Scene(0, "train", 0, 64, OBJECTS, GREY, "colour")


def said(words, number=None):
    """ "- red circle" and a number as a claim."""
    return Claim(Description(*(None if word == "-" else word for word in words.split())), number)


@pytest.mark.parametrize("split", ["train", "biased_test"])
def test_every_caption_of_the_grammar_is_true_of_its_scene_and_few_are_of_another(split):
    scenes = [DATA.scene(split, index) for index in range(300)]
    captions = [caption for scene in scenes for caption in scene.captions]
    texts = [caption.text for caption in captions]
    own = facts(texts, [scene for scene in scenes for _ in range(5)])
    assert own["hallucinated"].sum() == 0
    for name in KINDS:
        np.testing.assert_array_equal(own[f"{name}_true"], own[name])
    assert min(own["stated"]) > 0
    # What a caption says it speaks of is what its claims fit.
    np.testing.assert_array_equal(own["mentioned"], [len(c.objects) for c in captions])
    related = {"left", "right", "above", "over", "below", "under"}
    np.testing.assert_array_equal(own["related"], [bool(related & {*words(t)}) for t in texts])

    other = facts(texts, [scenes[(i + 1) % 300] for i in range(300) for _ in range(5)])
    for name in ("stated", *KINDS):
        np.testing.assert_array_equal(other[name], own[name])
    # One of three objects is of a given one of 64 kinds with a chance of 1/21.
    assert other["coloured_true"].sum() < 0.1 * own["coloured"].sum()
    assert other["related_true"].sum() < 0.05 * own["related"].sum()
    assert other["counted_true"].sum() < 0.3 * own["counted"].sum()  # "three objects" can fit
    assert other["true"].sum() + other["hallucinated"].sum() == own["stated"].sum()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a red circle", ["- red circle"]),
        ("there are two small crosses and an object", [("small - cross", 2), "- - -"]),
        ("we see five objects", [("- - -", 5)]),
        ("one large pink diamond, with three rings", [("large pink diamond", 1), ("- - ring", 3)]),
        # From here on: what a model may write, and the grammar does not.
        ("", []),
        ("a red", []),
        ("2 dogs!? <unk> \N{SNOWMAN} of of the", []),
        ("A shiny RED, very round circle.", ["- red circle"]),
        ("a red and a blue circle", ["- blue circle"]),
        ("a red one and squares", ["- - square"]),
        ("two images of a star", ["- - star"]),
        ("a blue red circle", ["- red circle"]),
        ("no red circle and zero stars above a ring", ["- - ring"]),
        ("a circleround starfish", []),
    ],
)
def test_claims_of_a_text(text, found):
    want = tuple(said(*claim) if isinstance(claim, tuple) else said(claim) for claim in found)
    assert claims(text) == want


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a red circle to the left of a star", [("- red circle", "left of", "- - star")]),
        ("a star over a ring under a cross", [
            ("- - star", "above", "- - ring"), ("- - ring", "below", "- - cross"),
        ]),
        ("a circle is right of the red star, with a ring and a cross", [
            ("- - circle", "right of", "- red star"),
        ]),
        ("a ring, with a circle above a star", [("- - circle", "above", "- - star")]),
        ("above a star", []),
        ("a circle above", []),
        ("a circle above, and a star", []),
        ("a ring, no circle above a star", []),
    ],
)  # fmt: skip
def test_relations_of_a_text(text, found):
    assert relations(text) == tuple(Relation(said(a), word, said(b)) for a, word, b in found)


def test_claims_about_a_known_scene():
    assert true_of(said("small red circle"), OBJECTS)
    assert not true_of(said("large blue star"), OBJECTS)
    assert not true_of(said("- blue circle"), OBJECTS)
    assert true_of(said("- red circle", 3), OBJECTS)
    assert [count_right(said("- red circle", n), OBJECTS) for n in (1, 2, 3)] == [0, 1, 0]
    assert count_right(said("- red circle"), OBJECTS)
    assert not count_right(said("- green circle"), OBJECTS)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a large circle above a small circle", True),
        ("a circle below a circle", True),  # one of two
        ("a small circle above a large circle", False),
        ("a large circle over a large circle", False),  # no object lies above itself
        ("a star left of a ring", False),
    ],
)
def test_relations_in_a_known_scene(text, holds):
    (relation,) = relations(text)
    assert relation_true(relation, OBJECTS) == holds


def test_a_diagonal_is_no_clear_relation():
    across = (thing("small", "red", "circle", 0.2, 0.2), thing("small", "red", "ring", 0.7, 0.7))
    for word in ("left of", "right of", "above", "below"):
        (relation,) = relations(f"a circle {word} a ring")
        assert not relation_true(relation, across)


def test_facts_of_wrong_captions():
    found = facts(
        [
            "a red star above a small circle, with a blue ring",
            "three red circles and a blue star",
            "a red circle left of a blue star",
            "what a day",
        ],
        [SCENE] * 4,
    )
    want = {
        "stated": [3, 2, 2, 0],
        "true": [1, 2, 2, 0],
        "hallucinated": [2, 0, 0, 0],
        "coloured": [2, 2, 2, 0],
        "coloured_true": [0, 2, 2, 0],
        "counted": [0, 1, 0, 0],
        "counted_true": [0, 0, 0, 0],
        "related": [1, 0, 1, 0],
        "related_true": [0, 0, 0, 0],
        "objects": [3, 3, 3, 3],
        "mentioned": [1, 3, 3, 0],
    }
    assert {name: values.tolist() for name, values in found.items()} == want


def test_facts_of_no_captions_and_of_too_few():
    assert all(values.shape == (0,) for values in facts([], []).values())
    with pytest.raises(ValueError, match=r"facts: 2 captions and 1 scenes; give one scene per"):
        facts(["a star", "a ring"], [SCENE])
