"""Shapes: truth, balance, bias, purity. The truth is checked by a reader written for the test."""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from jaxrel.train.data import contact_sheet
from jaxrel.train.data.shapes import (
    ANSWERS,
    COLOUR_PAIRS,
    COLOURS,
    MAX_OBJECTS,
    PAIR_RATES,
    SHAPE_PAIRS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Shapes,
    answers,
    relation,
    vocabulary,
    words,
)
from jaxrel.train.data.shapes.render import render
from jaxrel.train.data.shapes.scene import Background

DATA = Shapes()


@pytest.fixture(scope="module")
def scenes():
    """Scenes of all splits; pixels are only made where a test looks at them."""
    return [DATA.scene(split, index) for split in SPLITS for index in range(80)]


@pytest.fixture(scope="module")
def questions():
    """The questions of many scenes without bias, by kind, in two halves."""
    halves = (defaultdict(list), defaultdict(list))
    for index in range(4000):
        for question in DATA.scene("train", index).questions:
            halves[index % 2][question.kind].append(question)
    return halves


# A reader of sentences that shares nothing with the grammar that wrote them.
NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
NOUN = (
    r"(?P<size>small |large )?"
    r"(?P<colour>red |green |blue |yellow |orange |purple |cyan |pink )?"
    r"(?P<noun>circle|square|triangle|star|cross|heart|diamond|ring|object)(?:e?s)?"
)
WHERE = r"(?:to the )?(left of|right of|above|over|below|under)"
OPENING = (
    r"(?:a picture of |an image with |a scene with |this picture shows |there (?:is|are) |we see )?"
)


def find(objects, phrase):
    """The indices of the objects that a noun phrase speaks of."""
    read = re.fullmatch(NOUN, phrase)
    assert read, phrase
    size, colour = (read[name] and read[name].strip() for name in ("size", "colour"))
    return [
        i
        for i, thing in enumerate(objects)
        if size in (None, thing.size)
        and colour in (None, thing.colour)
        and read["noun"] in ("object", thing.shape)
    ]


def lies(first, second, word):
    return {
        "left of": first.x < second.x,
        "right of": first.x > second.x,
        "above": first.y < second.y,
        "over": first.y < second.y,
        "below": first.y > second.y,
        "under": first.y > second.y,
    }[word]


def read_item(objects, item):
    """The objects of "a red circle" or "two red circles", checked for their number."""
    number, phrase = item.split(" ", 1)
    found = find(objects, phrase)
    assert found, item
    if number in ("a", "an"):
        assert (number == "an") == (phrase[0] in "aeiou")
    else:
        assert len(found) == NUMBER[number], item
        assert phrase.endswith("s") == (NUMBER[number] > 1)
    return found


def read_caption(objects, text):
    """Checks that a caption is true; returns the objects it speaks of, and its items."""
    body = re.sub("^" + OPENING, "", text)
    pair = re.match(rf"(an? [a-z ]+?) {WHERE} (an? [a-z ]+)(?:, with (.+))?$", body)
    if not pair:
        items = re.split(", | and ", body)
        return [i for item in items for i in read_item(objects, item)], items
    first, word, second, rest = pair.groups()
    (i,), (j,) = read_item(objects, first), read_item(objects, second)
    assert lies(objects[i], objects[j], word)
    items = [first, second, *(re.split(", | and ", rest) if rest else [])]
    return [k for item in items for k in read_item(objects, item)], items


def read_question(objects, text):
    """The kind, the right answer and the objects of a question."""
    (phrases,) = [re.findall(r"\bthe (?!left|right|picture)((?:[a-z]+ )*?[a-z]+)" + END, text)]
    named = [find(objects, phrase) for phrase in phrases]
    for found in named:
        assert len(found) == 1, text
    indices = [i for found in named for i in found]
    if re.match("(what|which) (colour|shape|size) |is the [a-z ]+ large or small", text):
        kind = next((name for name in ("colour", "shape") if name in text.split()[1]), "size")
        (i,) = indices
        return kind, getattr(objects[i], kind), indices
    if read := re.match("how many ([a-z ]+?) (?:are there|does the picture show)", text):
        found = find(objects, read[1])
        return "count", str(len(found)), found
    if read := re.match("(?:is there|does the picture show|can you see) an? ([a-z ]+)", text):
        found = find(objects, read[1])
        return "existence", "yes" if found else "no", found
    if read := re.match("are there (more|fewer) ([a-z ]+) than ([a-z ]+)", text):
        first, second = find(objects, read[2]), find(objects, read[3])
        assert len(first) != len(second)
        holds = (len(first) > len(second)) == (read[1] == "more")
        return "comparison", "yes" if holds else "no", first + second
    first, second = (objects[i] for i in indices)
    if read := re.search("(larger|smaller) than", text):
        assert abs(first.radius - second.radius) > 0.03
        holds = (first.radius > second.radius) == (read[1] == "larger")
        return "comparison", "yes" if holds else "no", indices
    word = re.search(WHERE, text)[1]
    return "relation", "yes" if lies(first, second, word) else "no", indices


# What can follow a noun phrase in a question.
END = (
    r"(?=\?| have\?| large or small| lie | (?:to the )?(?:left|right) of"
    r"| above| over| below| under| larger| smaller)"
)


def test_every_caption_is_true_and_says_what_it_names(scenes):
    for scene in scenes:
        assert len({caption.text for caption in scene.captions}) == 5
        for caption in scene.captions:
            named, items = read_caption(scene.objects, caption.text)
            assert sorted(set(named)) == sorted(caption.objects), caption
            if caption.kind == "full":
                assert sorted(named) == list(range(len(scene.objects)))
                for item in items:
                    assert set(words(item)) & set(COLOURS)
                    assert "object" not in item


def test_caption_kinds(scenes):
    kinds = Counter(caption.kind for scene in scenes for caption in scene.captions)
    assert set(kinds) == {"full", "relation", "count", "single"}
    for scene in scenes:
        assert [caption.kind for caption in scene.captions[:2]] == ["full", "full"]
        assert scene.captions[3].kind == "count"


def test_every_answer_is_right_and_says_what_is_asked_about(scenes):
    for scene in scenes:
        for question in scene.questions:
            kind, answer, indices = read_question(scene.objects, question.text)
            assert (kind, answer) == (question.kind, question.answer), question
            assert tuple(indices) == question.objects, question
            assert question.answer in ANSWERS[question.kind]
            assert question.text == question.text.lower()


def test_questions_come_in_seven_kinds_each_at_most_once_per_scene(scenes):
    assert len(ANSWERS) == 7
    counts = Counter()
    for scene in scenes:
        kinds = [question.kind for question in scene.questions]
        assert len(set(kinds)) == len(kinds)
        counts.update(kinds)
    assert set(counts) == set(ANSWERS)
    assert min(counts.values()) > len(scenes) / 3


def majority(train, test):
    """Answers with what the same words most often had as answer, else the kind's commonest."""
    by_text = defaultdict(Counter)
    for question in train:
        by_text[question.text][question.answer] += 1
        by_text[None][question.answer] += 1
    guesses = [(by_text.get(q.text) or by_text[None]).most_common(1)[0][0] for q in test]
    return np.mean([guess == q.answer for guess, q in zip(guesses, test, strict=True)])


def naive_bayes(train, test):
    """Answers from which word stands where: finds what single sentences are too rare to show."""
    features = [[*enumerate(words(q.text)), *words(q.text)] for q in (*train, *test)]
    index = {name: i for i, name in enumerate({f for row in features for f in row})}
    names = sorted({q.answer for q in train})
    table = np.ones((len(names), len(index)))
    for row, question in zip(features, train, strict=False):
        for feature in row:
            table[names.index(question.answer), index[feature]] += 1
    table = np.log(table / table.sum(1, keepdims=True))
    prior = np.log([sum(q.answer == name for q in train) for name in names])
    scores = [prior + table[:, [index[f] for f in row]].sum(1) for row in features[len(train) :]]
    guesses = [names[score.argmax()] for score in scores]
    return np.mean([guess == q.answer for guess, q in zip(guesses, test, strict=True)])


@pytest.mark.parametrize("baseline", [majority, naive_bayes])
@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_cannot_be_guessed_from_the_words(questions, kind, baseline):
    train, test = (half[kind] for half in questions)
    chance = {"colour": 1 / 8, "shape": 1 / 8, "count": 1 / 4}.get(kind, 1 / 2)
    # 0.05 is four standard errors of a share of 1/2 among the 1100 to 2000 questions per kind.
    assert len(test) > 1100
    assert baseline(train, test) < chance + 0.05


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_balanced(questions, kind):
    """Counts of a kind: none to three; counts of everything: one to five."""
    asked = [question for half in questions for question in half[kind]]
    everything = [q for q in asked if q.text.startswith("how many objects")]
    rest = [q for q in asked if q not in everything]
    for group, size in ((everything, MAX_OBJECTS), (rest, min(len(ANSWERS[kind]), 4))):
        if not group:
            continue
        size = len(ANSWERS[kind]) if kind in ("colour", "shape") else size
        shares = np.array(list(Counter(q.answer for q in group).values())) / len(group)
        # Four standard errors at the smallest group (700 questions, share 1/5) are 0.06.
        np.testing.assert_allclose(shares, np.full(size, 1 / size), atol=0.06)


def pair_rates(split, count=1500):
    """For every pair: in what share of the scenes with the cue it holds, and how many those are."""
    held = defaultdict(list)
    for index in range(count):
        objects = DATA.scene(split, index).objects
        shapes = [thing.shape for thing in objects]
        assert split not in PAIR_RATES or len(objects) >= 2
        for cue, partner in SHAPE_PAIRS:
            if cue in shapes and len(shapes) > 1:
                held[cue, partner].append(partner in shapes)
        for cue, colour in COLOUR_PAIRS:
            if cue in shapes:
                held[cue, colour].append(
                    all(thing.colour == colour for thing in objects if thing.shape == cue)
                )
    return {pair: (np.mean(values), len(values)) for pair, values in held.items()}


@pytest.mark.parametrize("split", ["biased_train", "biased_val"])
def test_biased_scenes_hold_the_pairs_in_nine_of_ten(split):
    for share, count in pair_rates(split).values():
        assert count > 250
        assert abs(share - 0.9) < 0.08  # four standard errors of 0.9 among 250


def test_biased_test_scenes_break_the_pairs_and_still_have_their_second_halves():
    rates = pair_rates("biased_test")
    assert len(rates) == len(SHAPE_PAIRS) + len(COLOUR_PAIRS)
    assert all(share == 0 for share, _ in rates.values())
    objects = [thing for i in range(500) for thing in DATA.scene("biased_test", i).objects]
    for _, partner in SHAPE_PAIRS:
        assert sum(thing.shape == partner for thing in objects) > 50
    for _, colour in COLOUR_PAIRS:
        assert sum(thing.colour == colour for thing in objects) > 50


def test_scenes_without_bias_do_not_hold_the_pairs():
    rates = pair_rates("train")
    for cue, partner in SHAPE_PAIRS + COLOUR_PAIRS:
        assert rates[cue, partner][0] < 0.45


def test_attributes_are_uniform():
    objects = [thing for index in range(2000) for thing in DATA.scene("train", index).objects]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        counts = Counter(getattr(thing, name) for thing in objects)
        shares = [counts[value] / len(objects) for value in values]
        # About 6000 objects in groups of up to three: 0.025 is over three standard errors.
        np.testing.assert_allclose(shares, 1 / len(values), atol=0.025)
    counts = Counter(len(DATA.scene("train", index).objects) for index in range(2000))
    assert set(counts) == set(range(1, MAX_OBJECTS + 1))


def test_boxes_are_those_of_the_masks_and_masks_do_not_overlap(scenes):
    for scene in scenes[::2]:
        assert scene.image.dtype == np.uint8
        assert scene.image.shape == (64, 64, 3)
        assert scene.masks.sum(0).max() == 1
        for mask, (left, top, width, height) in zip(scene.masks, scene.boxes, strict=True):
            y, x = np.nonzero(mask)
            assert (x.min(), x.max()) == (left, left + width - 1)
            assert (y.min(), y.max()) == (top, top + height - 1)


def test_masks_have_their_objects_colour_and_place(scenes):
    for scene in scenes[::2]:
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            colour = np.median(scene.image[mask], axis=0)
            # Inner pixels have the exact colour; on the smallest object at least half are inner.
            np.testing.assert_allclose(colour, thing.rgb, atol=15)
            distance = {name: np.abs(colour - COLOURS[name]).sum() for name in COLOURS}
            assert min(distance, key=distance.get) == thing.colour
            y, x = np.nonzero(mask)
            reach = np.hypot((x + 0.5) / 64 - thing.x, (y + 0.5) / 64 - thing.y).max()
            assert reach <= thing.radius + 1 / 64  # a pixel's diagonal
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high


def test_every_object_is_mostly_visible(scenes):
    shares = []
    for scene in scenes:
        whole = [render((thing,), scene.background, 64)[1][0].sum() for thing in scene.objects]
        shares += (scene.masks.sum((1, 2)) / whole).tolist()
    # 0.69 is the rule's bound; the rest is pixels at the edges of small masks.
    assert min(shares) > 0.65
    assert 0.02 < np.mean(np.array(shares) < 0.99) < 0.5  # some overlap, not in most scenes


def test_background_is_never_an_objects_colour(scenes):
    for scene in scenes[::4]:
        plain, _ = render((), scene.background, 64)
        assert np.ptp(plain.astype(int), axis=-1).max() <= 31
        for thing in scene.objects:
            assert np.ptp(thing.rgb) >= 100
    assert len({scene.background.kind for scene in scenes}) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_circle_and_no_more(shape):
    thing = Object(shape, "red", "large", 0.5, 0.5, 0.4, 0.0, (255, 0, 0))
    grey = Background("gradient", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 1.0, 0.0)
    image, masks = render((thing,), grey, 200)
    y, x = np.nonzero(masks[0])
    reach = np.hypot((x + 0.5) / 200 - 0.5, (y + 0.5) / 200 - 0.5).max() / 0.4
    assert 0.85 < reach < 1.02
    np.testing.assert_array_equal(masks[0], masks[0][:, ::-1])  # upright, it is symmetric
    edges = (image[..., 0] > 0) & (image[..., 0] < 255)
    assert edges.any(), "not anti-aliased"
    assert not masks[0].all(0).any()


def test_no_two_shapes_look_alike_at_the_smallest_size():
    grey = Background("gradient", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 1.0, 0.0)
    masks = [
        render((Object(shape, "red", "small", 0.5, 0.5, 0.1, 0.0, (255, 0, 0)),), grey, 64)[1][0]
        for shape in SHAPES
    ]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert (first & second).sum() / (first | second).sum() < 0.85


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    again = Shapes().scene("val", 7)
    scene = DATA.scene("val", np.int64(7))
    assert scene == again
    np.testing.assert_array_equal(scene.image, again.image)
    # Asking for something first changes nothing else.
    assert again.questions == scene.questions
    assert again.captions == scene.captions
    others = [DATA.scene("val", 8), DATA.scene("test", 7), Shapes(seed=1).scene("val", 7)]
    assert all(scene.objects != other.objects for other in others)


def test_splits_have_no_scene_in_common():
    layouts = [
        tuple((thing.x, thing.y) for thing in DATA.scene(split, index).objects)
        for split in SPLITS
        for index in range(200)
    ]
    assert len(set(layouts)) == len(layouts)


def test_a_scene_is_the_same_at_any_size():
    small, large = DATA.scene("test", 5), Shapes(size=192).scene("test", 5)
    assert (small.objects, small.captions) == (large.objects, large.captions)
    assert small.questions == large.questions
    shrunk = large.image.reshape(64, 3, 64, 3, 3).mean((1, 3))
    # Both are anti-aliased, so only pixels on edges differ.
    assert np.abs(shrunk - small.image).mean() < 1.5
    np.testing.assert_allclose(large.boxes / 3, small.boxes, atol=3)  # thin tips gain length


def test_scenes_cannot_be_changed():
    scene = DATA.scene("train", 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.index = 1
    with pytest.raises(ValueError, match="read-only"):
        scene.image[0, 0] = 0


def test_vocabulary_is_exactly_the_words_that_occur():
    seen = set()
    for index in range(1000):
        scene = DATA.scene("train", index)
        for sentence in (*scene.captions, *scene.questions):
            seen.update(words(sentence.text))
    assert seen == set(vocabulary())
    assert list(vocabulary()) == sorted(set(vocabulary()))


def test_answers_are_those_of_all_kinds():
    assert set(answers()) == {answer for kind in ANSWERS.values() for answer in kind}
    assert len(set(answers())) == len(answers())


def test_words():
    assert words("A RED circle, left-most?") == ["a", "red", "circle", "left", "most"]
    assert words("") == []


def test_relation_is_silent_where_no_word_is_clearly_right():
    def at(x, y):
        return Object("circle", "red", "small", x, y, 0.1, 0.0, (255, 0, 0))

    centre = at(0.5, 0.5)
    assert relation(at(0.2, 0.5), centre) == "left of"
    assert relation(at(0.8, 0.6), centre) == "right of"
    assert relation(at(0.5, 0.2), centre) == "above"
    assert relation(at(0.4, 0.9), centre) == "below"
    assert relation(at(0.8, 0.8), centre) is None
    assert relation(at(0.6, 0.5), centre) is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Shapes(seed=-1), ValueError, r"seed is -1; expected 0 to 4294967295"),
        (lambda: Shapes(seed=2**32), ValueError, r"seed is 4294967296"),
        (lambda: Shapes(size=8), ValueError, r"size is 8; expected 32 to 2048.*resize"),
        (lambda: Shapes(size=10**6), ValueError, r"size is 1000000"),
        (lambda: DATA.scene("train", -1), ValueError, r"index is -1; expected 0 to 4294967295"),
        (lambda: DATA.scene("train", 2**32), ValueError, r"index is 4294967296"),
        (lambda: DATA.scene("train", 1.5), TypeError, None),
        (lambda: DATA.scene("dev", 0), ValueError, r"split is 'dev'; expected one of train, val"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_golden_scene():
    """The random streams and the grammar stay as they are, or weights and figures go stale."""
    scene = DATA.scene("test", 287)
    assert [(thing.size, thing.colour, thing.shape) for thing in scene.objects] == GOLDEN_OBJECTS
    assert [caption.text for caption in scene.captions] == GOLDEN_CAPTIONS
    assert [(q.text, q.answer) for q in scene.questions] == GOLDEN_QUESTIONS


def test_samples_that_ship_are_those_of_today(tmp_path):
    contact_sheet.write_samples(tmp_path)
    shipped = resources.files("jaxrel.train.data") / "samples"
    records = json.loads((shipped / "samples.json").read_text())
    assert records == json.loads((tmp_path / "samples.json").read_text())
    assert len(records) == 5
    for name, record in records.items():
        with Image.open(shipped / name) as old, Image.open(tmp_path / name) as new:
            # Sines may differ in the last place between processors, which can move a rounding.
            difference = np.asarray(old).astype(int) - np.asarray(new)
        assert np.abs(difference).max() <= 1
        scene = DATA.scene("test", record["index"])
        (i,) = read_item(scene.objects, record["sentence"])
        # A box ends where half a pixel is covered, so a thin tip gains length with resolution.
        np.testing.assert_allclose(np.array(record["box"]) * 64, scene.boxes[i], atol=3)


def test_contact_sheet(tmp_path):
    contact_sheet.main([str(tmp_path / "sheet.png"), "--count", "5", "--split", "test"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 976
        assert sheet.height > 2 * 224


@pytest.mark.parametrize(
    "arguments", [[], ["out.png", "--count", "0"], ["out.png", "--split", "x"]]
)
def test_contact_sheet_refuses(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        contact_sheet.main(arguments)
    assert "usage" in capsys.readouterr().err


GOLDEN_OBJECTS = [("small", "blue", "ring"), ("large", "pink", "heart"), ("large", "red", "circle")]
GOLDEN_CAPTIONS = [
    "a blue ring, a pink heart and a red circle",
    "an image with a blue ring to the right of a red circle, with a pink heart",
    "a small blue ring to the right of a large red circle",
    "a picture of two large objects",
    "a large red circle",
]
GOLDEN_QUESTIONS = [
    ("which colour does the large heart have?", "pink"),
    ("what shape is the small blue object?", "ring"),
    ("what size is the heart?", "large"),
    ("does the picture show a pink star?", "no"),
    ("is the circle under the pink heart?", "yes"),
    ("are there more pink objects than green objects?", "yes"),
]
